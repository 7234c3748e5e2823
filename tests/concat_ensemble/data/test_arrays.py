"""Images of many channels in datasets: as arrays, and as TIFFs."""

import io

import numpy as np
import pytest
import tifffile
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, List, Value

from concat_ensemble import LinearProbe, assemble, extract_features, load_data
from concat_ensemble.data.arrays import decode_array, encode_array
from concat_ensemble.data.audit import audit_splits
from concat_ensemble.data.images import encode_image, image_hashes, read_image
from concat_ensemble.studies.candidates import pixel_candidate
from concat_ensemble.studies.controls import pixel_table

NAMES = ["cat", "dog"]


def made(count=40, dtype=np.uint16, seed=0, channels=4) -> tuple[np.ndarray, list[int]]:
    """(N, 8, 9, C) noise, of which the last channel is brighter for dogs."""
    rng = np.random.default_rng(seed)
    labels = [n % 2 for n in range(count)]
    pixels = rng.integers(0, 100, (count, 8, 9, channels))
    pixels[..., -1] += 60 * np.reshape(labels, (-1, 1, 1))
    return pixels.astype(dtype), labels


def dataset(images, labels, feature, column="image") -> Dataset:
    columns = Features({column: feature, "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({column: list(images), "label": labels}, features=columns)


def nested(dtype) -> List:
    return List(List(List(Value(dtype))))


def tiffs(images, **options) -> list[dict]:
    contents = []
    for image in images:
        file = io.BytesIO()
        tifffile.imwrite(file, image, photometric="minisblack", **options)
        contents.append({"bytes": file.getvalue(), "path": None})
    return contents


@pytest.fixture(scope="module")
def four(backbone):
    """An ensemble of one member that sees channels 0 to 2 and one that sees all four."""
    return assemble([assemble(backbone(0, in_chans=3), channels=[0, 1, 2]), backbone(1, in_chans=4)])


FEATURES = {
    "Array3D": lambda dtype: Array3D((8, 9, 4), dtype),
    "lists": nested,
    "Array3D of any height": lambda dtype: Array3D((None, 9, 4), dtype),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_columns_of_arrays_are_loaded_as_they_are(kind, dtype):
    images, labels = made(dtype=dtype)
    data = load_data(dataset(images.tolist(), labels, FEATURES[kind](dtype)))
    found = {decode_array(row["image"]["bytes"]).tobytes() for split in data.values() for row in split}
    assert found == {image.tobytes() for image in images}
    first = decode_array(data["train"][0]["image"]["bytes"])
    assert first.dtype == dtype and first.shape == (8, 9, 4)


def test_a_column_of_arrays_is_found_by_its_type_and_pictures_are_preferred():
    images, labels = made()
    data = load_data(dataset(images.tolist(), labels, Array3D((8, 9, 4), "uint16"), column="bands"))
    assert data["train"].column_names == ["image", "label"]
    both = dataset(images.tolist(), labels, Array3D((8, 9, 4), "uint16"), column="bands")
    encoded = [encode_png(image[..., :3]) for image in images.astype(np.uint8)]
    both = both.add_column("photo", encoded, feature=Image(decode=False))
    assert load_data(both)["train"][0]["image"]["bytes"].startswith(b"\x89PNG")
    assert load_data(both, image_column="bands")["train"][0]["image"]["bytes"].startswith(b"\x93NUMPY")


def encode_png(pixels) -> dict:
    return encode_image(np.ascontiguousarray(pixels))


def test_arrays_of_a_stream_are_loaded_too():
    images, labels = made()
    stream = dataset(images.tolist(), labels, nested("uint16")).to_iterable_dataset()
    data = load_data(stream, limit=20)
    assert decode_array(data["test"][0]["image"]["bytes"]).shape == (8, 9, 4)


def test_gray_arrays_of_two_dimensions_are_images():
    images, labels = made(dtype=np.uint8)
    data = load_data(dataset(images[..., 0].tolist(), labels, Array2D((8, 9), "uint8")))
    assert read_image(data["train"], 0).mode == "L"


def test_the_hash_of_an_array_depends_on_its_values_shape_and_type():
    images, _ = made(4)
    variants = [
        images[0],
        images[0].reshape(9, 8, 4),
        images[0].astype(np.uint8),
        images[0].astype(np.float32),
        images[1],
    ]
    rows = [encode_array(each) for each in [*variants, images[0].copy()]]
    split = Dataset.from_dict({"image": rows}, features=Features(image=Image(decode=False)))
    hashes = image_hashes(split)
    assert len(set(hashes)) == len(variants) and hashes[0] == hashes[-1]


def test_copies_of_arrays_are_found_by_the_audit():
    images, labels = made(40)
    images[38], images[39] = images[0], images[1]
    data = load_data(
        dataset(images.tolist(), labels, nested("uint16")), train_split="train[:30]", test_split="train[30:]"
    )
    assert audit_splits(data).audit.removed_from_test == 2


@pytest.mark.parametrize("form", ["arrays", "pages", "samples", "arrays, channels first"])
def test_a_dataset_of_four_channels_is_probed(form, four, tmp_path):
    images, labels = made(120)
    first = images.transpose(0, 3, 1, 2)
    rows = {
        "arrays": lambda: dataset(images.tolist(), labels, nested("uint16")),
        "arrays, channels first": lambda: dataset(first.tolist(), labels, nested("uint16")),
        "pages": lambda: dataset(tiffs(first), labels, Image()),
        "samples": lambda: dataset(tiffs(images, planarconfig="contig"), labels, Image()),
    }
    data = load_data(rows[form]())
    table = extract_features(four, data, store=tmp_path, quiet=True)
    scores = [
        LinearProbe().fit(part["train"], validation=part["validation"]).score(part["test"])
        for part in (table.members([0]), table)
    ]
    assert scores[0] < 0.75 and scores[1] > 0.9  # only the last channel tells dogs from cats
    again = extract_features(assemble(four).export_active([1]), data, store=tmp_path, quiet=True)
    assert again.extracted == 0  # its rows are found in the store


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_control_of_raw_pixels_has_all_channels_that_members_see(four, dtype):
    images, labels = made(dtype=dtype)
    data = load_data(dataset(images.tolist(), labels, nested(np.dtype(dtype).name)))
    table = pixel_candidate(four, data, quiet=True).table
    scale = {np.uint8: 255, np.uint16: 65_535, np.float32: 1}[dtype]
    expected = decode_array(data["train"][0]["image"]["bytes"]).astype(np.float32).transpose(2, 0, 1) / scale
    assert np.allclose(table["train"].features[0], expected.ravel())
    assert pixel_table(data, [3], quiet=True)["train"].features.shape[1] == 72


def test_images_that_cannot_be_used_are_named_with_the_reason(four, tmp_path):
    images, labels = made(40)
    short, labels = [*images[:39].tolist(), images[39][..., :3].tolist()], labels
    data = load_data(dataset(short, labels, nested("uint16")), train_split="train[:30]", test_split="train[30:]")
    with pytest.raises(ValueError, match=r"1 of 40 .*the test split, image 9: .*channels") as error:
        extract_features(four, data, store=tmp_path, quiet=True)
    assert "\n" not in str(error.value)


def test_members_that_see_pictures_take_arrays_of_three_channels(backbone, tmp_path):
    images, labels = made(40, np.uint8, channels=3)
    member = assemble(backbone(0, in_chans=3))
    arrays = load_data(dataset(images.tolist(), labels, nested("uint8")))
    pictures = load_data(dataset([encode_png(image) for image in images], labels, Image()))
    tables = [extract_features(member, data, store=tmp_path, quiet=True) for data in (arrays, pictures)]
    assert np.array_equal(tables[0]["train"].features, tables[1]["train"].features)


def test_lists_that_are_no_images_are_still_refused():
    _, labels = made()
    vectors = dataset([[0.5, 1.0]] * 40, labels, List(Value("float32")))
    with pytest.raises(ValueError, match="holds List, not images"):
        load_data(vectors)
