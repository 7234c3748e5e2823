import io
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from concat_ensemble import ConcatEnsembleImageProcessor, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names
from concat_ensemble.data.loading import load_stream
from concat_ensemble.data.scattered import Scatter

# --- the embedded digits ---------------------------------------------------------------------------------------------


def pixels(split, index):
    return np.asarray(read_image(split, index))


def rows(split):
    """The encoded bytes of each image, which identify it in the digits and in any dataset in memory."""
    return [image["bytes"] for image in split["image"]]


def labels(split):
    return np.asarray(split["label"][:])


def test_digits_are_those_of_scikit_learn_scaled_to_8_bits():
    data, source = load_data("digits"), load_digits()
    assert {kind: len(split) for kind, split in data.items()} == {"train": 718, "validation": 180, "test": 899}
    assert class_names(data["train"]) == list("0123456789")
    seen = {pixels(split, n).tobytes(): label for split in data.values() for n, label in enumerate(labels(split))}
    expected = np.rint(source.images / 16 * 255).astype(np.uint8)
    assert seen == {image.tobytes(): label for image, label in zip(expected, source.target, strict=True)}


def test_digits_and_scattered_digits_are_cut_at_the_same_rows():
    plain, scattered = load_data("digits", seed=3), load_data("scattered:digits", seed=3)
    for kind in plain:
        assert labels(plain[kind]).tolist() == labels(scattered[kind]).tolist()
    # ... of the same digits: the ink of an image, spread over its canvas, goes with that of the plain one
    ink = [[float(pixels(data["test"], n).astype(float).sum()) for n in range(200)] for data in (plain, scattered)]
    assert np.corrcoef(ink)[0, 1] > 0.3


@pytest.mark.parametrize("name", ["digits", "scattered:digits"])
def test_digits_are_fixed_by_the_seed(name):
    first, again, other = (load_data(name, limit=20, seed=seed) for seed in (1, 1, 2))
    assert rows(first["test"]) == rows(again["test"]) and rows(first["train"]) == rows(again["train"])
    assert rows(first["test"]) != rows(other["test"])


def test_the_place_of_a_digit_does_not_depend_on_the_selected_classes():
    everything = {row for split in load_data("scattered:digits").values() for row in rows(split)}
    few = [row for split in load_data("scattered:digits", classes=[7, 8]).values() for row in rows(split)]
    assert len(few) == 179 + 174 and set(few) <= everything
    assert PILImage.open(io.BytesIO(few[0])).size == (32, 32) and PILImage.open(io.BytesIO(few[0])).mode == "L"


# --- Scatter ---------------------------------------------------------------------------------------------------------


def white(number, side=8):
    return torch.ones(number, 1, side, side)


def test_images_from_anywhere_can_be_scattered(tmp_path):
    """The canvas of an image depends neither on where it is stored nor on the other images."""
    load_data("digits", limit=400)["train"].to_parquet(tmp_path / "train.parquet")
    whole, few = (load_data(f"scattered:parquet:{tmp_path}", limit=limit) for limit in (None, 20))
    assert all(set(rows(few[kind])) < set(rows(whole[kind])) for kind in whole)
    embedded = {row for split in load_data("scattered:digits").values() for row in rows(split)}
    assert {row for split in whole.values() for row in rows(split)} < embedded
    with pytest.raises(ValueError, match="scattered: the images of the train split differ in size"):
        sizes = [PILImage.new("L", (8 + n % 2, 8), n) for n in range(20)]
        mixed = Dataset.from_dict({"image": sizes, "label": [n % 2 for n in range(20)]})
        mixed.cast_column("image", Image()).to_parquet(tmp_path / "mixed.parquet")
        load_data(f"scattered:{tmp_path / 'mixed.parquet'}")


def test_scatter_that_moves_nothing_is_the_identity():
    images = torch.randint(0, 256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    still = Scatter(size=16, scale=(1, 1), degrees=0, noise=0)
    torch.testing.assert_close(still(images), images, atol=1e-6, rtol=0)


def test_scatter_gives_8_bit_values_on_the_canvas_and_repeats_with_its_generator():
    scattered, again = (Scatter(size=24, generator=torch.Generator().manual_seed(4))(white(5)) for _ in range(2))
    assert scattered.shape == (5, 1, 24, 24) and torch.equal(scattered, again)
    assert scattered.min() >= 0 and scattered.max() <= 1
    levels = scattered * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert not torch.equal(scattered[0], scattered[1]), "each image is placed anew"


def test_scatter_uses_torchs_seed_when_it_has_no_generator():
    torch.manual_seed(1)
    first = Scatter()(white(2))
    torch.manual_seed(1)
    assert torch.equal(first, Scatter()(white(2)))


def test_a_scattered_square_keeps_its_area_and_goes_everywhere_it_fits():
    """Half the canvas wide: 16x16 = 256 white pixels, with a center uniform from 8 to 24 (deviation 16 / sqrt 12)."""
    scatter = Scatter(size=32, scale=(0.5, 0.5), degrees=0, noise=0, generator=torch.Generator().manual_seed(0))
    canvas = scatter(white(2000))[:, 0].double()
    area = canvas.sum((1, 2))
    torch.testing.assert_close(area, torch.full_like(area, 256.0), atol=8, rtol=0)
    places = torch.arange(32) + 0.5
    for centre in ((canvas.sum(1) * places).sum(1) / area, (canvas.sum(2) * places).sum(1) / area):
        assert 7.7 < centre.min() < 8.6 and 23.4 < centre.max() < 24.3
        assert centre.mean() == pytest.approx(16, abs=0.4)
        assert centre.std() == pytest.approx(16 / 12**0.5, abs=0.2)


def test_a_rotated_bar_leans_by_up_to_the_angle_asked_for():
    bar = torch.zeros(500, 1, 32, 32)
    bar[:, :, :, 14:18] = 1
    turned = Scatter(size=32, scale=(0.5, 0.5), degrees=15, noise=0, generator=torch.Generator().manual_seed(0))(bar)[
        :, 0
    ].double()
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    total = turned.sum((1, 2), keepdim=True)
    dx, dy = x - (turned * x).sum((1, 2), keepdim=True) / total, y - (turned * y).sum((1, 2), keepdim=True) / total
    xx, yy, xy = ((turned * m).sum((1, 2)) for m in (dx * dx, dy * dy, dx * dy))
    lean = torch.rad2deg(0.5 * torch.atan2(2 * xy, yy - xx))  # of the bar's principal axis against the vertical
    assert 13 < lean.max() < 16 and -16 < lean.min() < -13
    assert lean.std() == pytest.approx(30 / 12**0.5, abs=0.7)


# --- cuts ------------------------------------------------------------------------------------------------------------


def numbered(labels) -> Dataset:
    """Images are never opened here: their bytes are their row number."""
    features = Features(image=Image(decode=False), label=ClassLabel(names=[f"c{n}" for n in range(max(labels) + 1)]))
    images = [{"bytes": str(n).encode(), "path": None} for n in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    # enough of each class on both sides of both cuts: where there is not, a cut cannot be stratified
    counts=st.lists(st.integers(20, 40), min_size=2, max_size=4),
    test_size=st.floats(0.2, 0.5),
    validation_size=st.floats(0.2, 0.6),
    seed=st.integers(0, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_cuts_are_complete_disjoint_stratified_and_deterministic(counts, test_size, validation_size, seed, shuffle):
    order = [label for label, count in enumerate(counts) for _ in range(count)]
    shuffle.shuffle(order)
    data, again = (
        load_data(numbered(order), test_size=test_size, validation_size=validation_size, seed=seed) for _ in range(2)
    )
    numbers = {kind: [int(row) for row in rows(split)] for kind, split in data.items()}
    assert sorted(chain(*numbers.values())) == list(range(len(order)))
    assert numbers == {kind: [int(row) for row in rows(split)] for kind, split in again.items()}
    assert all(numbers[kind] == sorted(numbers[kind]) for kind in numbers), "rows stay in the dataset's order"
    for kind, split in data.items():
        assert labels(split).tolist() == [order[row] for row in numbers[kind]], "an image keeps its label"
    assert np.abs(np.bincount(labels(data["test"])) - test_size * np.array(counts)).max() <= 1.5
    left = np.array(counts) - np.bincount(labels(data["test"]))
    assert np.abs(np.bincount(labels(data["validation"])) - validation_size * left).max() <= 1.5


def test_other_seeds_cut_elsewhere():
    order = [0, 1] * 50
    assert rows(load_data(numbered(order), seed=0)["test"]) != rows(load_data(numbered(order), seed=1)["test"])


def test_a_validation_split_alone_serves_as_the_test(images):
    data = load_data(DatasetDict(train=images(["a", "b"] * 20), validation=images(["a", "b"] * 3, seed=1)))
    assert {kind: len(split) for kind, split in data.items()} == {"train": 32, "validation": 8, "test": 6}


def test_all_three_splits_are_taken_as_they_are(images):
    given = DatasetDict(
        train=images(["a", "b"] * 5), val=images(["a", "b"] * 3, seed=1), testing=images(["a", "b"], seed=2)
    )
    assert {kind: len(split) for kind, split in load_data(given).items()} == {"train": 10, "validation": 6, "test": 2}


@pytest.mark.parametrize(
    ("slices", "lengths"),
    [
        ({"train_split": "train[:80%]", "test_split": "train[80%:]", "validation_split": "test"}, (32, 20, 8)),
        ({"train_split": "train[10:]", "test_split": "train[:10]"}, (24, 6, 10)),
        ({"train_split": "train[:-25%]", "test_split": "train[-10:]"}, (24, 6, 10)),
        ({"train_split": "train[4:30]", "test_split": "test[:200]"}, (20, 6, 20)),
    ],
)
def test_splits_are_cut_in_the_syntax_of_datasets(slices, lengths, splits):
    data = load_data(splits, **slices)
    assert (len(data["train"]), len(data["validation"]), len(data["test"])) == lengths


def test_a_slice_holds_the_rows_it_names():
    data = load_data(numbered([0, 1] * 10), train_split="train[:16]", test_split="train[-4:]")
    assert rows(data["test"]) == [b"16", b"17", b"18", b"19"]


def test_a_split_named_for_the_test_is_not_found_again_by_its_common_name():
    named = DatasetDict(train=numbered([0, 1] * 10), validation=numbered([0, 1] * 5), test=numbered([0, 1] * 3))
    data = load_data(named, test_split="validation")
    assert {kind: len(split) for kind, split in data.items()} == {"train": 16, "validation": 4, "test": 10}
    with pytest.raises(ValueError, match=r"no training split among \['train'\]; name it with train_split"):
        load_data(numbered([0, 1] * 10), test_split="train[:50%]")


def test_limit_keeps_the_same_few_images_of_each_split():
    order = [0, 1] * 50
    whole, ten, five = (load_data(numbered(order), limit=limit) for limit in (None, 10, 5))
    assert all(len(split) == 5 for split in five.values())
    for kind in whole:
        assert set(rows(five[kind])) < set(rows(ten[kind])) <= set(rows(whole[kind]))
    assert all(
        len(a) == len(b) for a, b in zip(whole.values(), load_data(numbered(order), limit=1000).values(), strict=True)
    )


@settings(max_examples=10)
@given(shots=st.integers(2, 12), seed=st.integers(0, 5))
def test_few_labels_are_as_many_of_each_class_and_leave_the_test_as_it_is(shots, seed):
    whole, few = (load_data("digits", seed=seed, shots=n, validation_size=0.5) for n in (None, shots))
    assert rows(few["test"]) == rows(whole["test"])
    known = {row for kind in ("train", "validation") for row in rows(whole[kind])}
    assert {row for kind in ("train", "validation") for row in rows(few[kind])} <= known
    counts = np.bincount(np.concatenate([labels(few["train"]), labels(few["validation"])]))
    assert counts.tolist() == [shots] * 10


# --- a stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "parquet:"])
def test_a_stream_has_the_images_of_the_training_split(prefix, splits, tmp_path):
    folder = write_parquet(numbered_classes(splits), tmp_path)
    streamed = [(row["image"]["bytes"], row["label"]) for row in load_stream(f"{prefix}{folder}")]
    table = pq.read_table(folder / "train-00000-of-00001.parquet").to_pylist()
    assert streamed == [(row["image"]["bytes"], row["label"]) for row in table]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "digits cannot be streamed: it is here already"),
        ("parquet:{}", "its labels are string .*cast them to ClassLabel"),
        ("nonesuch", "no dataset 'nonesuch'"),
    ],
)
def test_a_dataset_that_cannot_be_streamed_is_refused(name, message, splits, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_stream(name.format(write_parquet(splits, tmp_path)))


def test_a_stream_has_no_slices(splits, tmp_path):
    folder = write_parquet(numbered_classes(splits), tmp_path)
    with pytest.raises(ValueError, match=r"train_split='train\[:50%\]' is a slice.*set streaming=False"):
        load_stream(folder, split="train[:50%]")


def test_a_stream_without_column_types_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("image,label\na.png,x\n")
    with pytest.raises(ValueError, match=r"does not state its columns.*set streaming=False"):
        load_stream(f"csv:{tmp_path / 'train.csv'}")


# --- where images and labels come from -------------------------------------------------------------------------------


def contents(data):
    """Every image with its class name, by split, which must not depend on where a dataset is stored."""
    return {
        kind: sorted((pixels(split, n).tobytes(), class_names(split)[label]) for n, label in enumerate(labels(split)))
        for kind, split in data.items()
    }


def write_parquet(splits, folder):
    for kind, split in splits.items():
        (folder / "pq").mkdir(exist_ok=True)
        split.to_parquet(folder / "pq" / f"{kind}-00000-of-00001.parquet")
    return folder / "pq"


def numbered_classes(splits):
    return splits.cast_column("label", ClassLabel(names=["a", "b"]))


def write_images(splits, folder):
    for kind, split in splits.items():
        for n, row in enumerate(split):
            (folder / "if" / kind / row["label"]).mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / "if" / kind / row["label"] / f"{n:03}.png")
    return folder / "if"


def write_saved(splits, folder):
    splits.save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_parquet, "{}"),
        (write_parquet, "parquet:{}"),
        (write_images, "{}"),
        (write_images, "imagefolder:{}"),
        (write_saved, "{}"),
    ],
)
def test_a_dataset_is_the_same_from_disk_as_in_memory(write, name, splits, tmp_path):
    expected = load_data(splits)
    data = load_data(name.format(write(splits, tmp_path)))
    # a folder of images is read class by class, so its cuts differ; the test split exists in each and is not cut
    kinds = ["test"] if write is write_images else ["train", "validation", "test"]
    assert {kind: contents(data)[kind] for kind in kinds} == {kind: contents(expected)[kind] for kind in kinds}
    assert len(data["train"]) == len(expected["train"]) and class_names(data["train"]) == ["a", "b"]


def test_single_files_and_folders_of_one_split_are_cut(splits, tmp_path):
    splits["train"].to_parquet(tmp_path / "mine.parquet")
    splits["train"].save_to_disk(tmp_path / "one")
    expected = contents(load_data(splits["train"]))
    assert contents(load_data(tmp_path / "mine.parquet")) == expected
    assert contents(load_data(f"parquet:{tmp_path}/mine*.parquet")) == expected
    assert contents(load_data(tmp_path / "one")) == expected
    flat = write_images(DatasetDict(train=splits["train"]), tmp_path) / "train"
    assert {kind: len(split) for kind, split in load_data(flat).items()} == {"train": 16, "validation": 4, "test": 20}


def test_images_named_in_a_csv_file_are_read(splits, tmp_path):
    folder = write_images(splits, tmp_path)
    lines = [f"{path},{path.parent.name}" for path in sorted(folder.glob("train/*/*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["image,label", *lines]))
    data = load_data(f"csv:{tmp_path / 'list.csv'}")
    assert len(data["train"]) + len(data["validation"]) + len(data["test"]) == 40
    assert pixels(data["train"], 0).shape == (8, 8)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("photo", "class")])
def test_columns_are_found_by_type_and_common_names(image, label, images):
    data = load_data(images(["x", "y"] * 10, image=image, label=label))
    assert data["train"].column_names == ["image", "label"] and class_names(data["train"]) == ["x", "y"]


def test_named_columns_are_used(images):
    other = images(["dark"] * 20, image="photo").select_columns("photo")
    wide = concatenate_datasets([images(["x", "y"] * 10), other], axis=1).add_column("colour", ["red", "blue"] * 10)
    data = load_data(wide, label_column="colour", image_column="photo")
    assert class_names(data["train"]) == ["blue", "red"]
    assert pixels(data["train"], 0).max() < 60, "the other column's images are of two brightnesses, up to 110"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["cat", "ant"], ["ant", "cat"]),
        ([10, 9], ["9", "10"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_labels_may_be_names_numbers_or_booleans(given, names, images):
    dataset = images([str(label) for label in given] * 10).remove_columns("label").add_column("label", given * 10)
    data = load_data(dataset)
    assert class_names(data["train"]) == names
    by_image = {
        image["bytes"]: label
        for image, label in zip(dataset.cast_column("image", Image(decode=False))["image"], given * 10, strict=True)
    }
    for split in data.values():
        assert [class_names(split)[label] for label in labels(split)] == [str(by_image[row]) for row in rows(split)]


def test_splits_that_lack_classes_or_order_them_otherwise_get_one_numbering(images):
    train, test = images(["b", "a"] * 20), images(["c", "a"] * 4)
    data = load_data(DatasetDict(train=train, test=test))
    assert all(class_names(split) == ["a", "b", "c"] for split in data.values())
    assert np.bincount(labels(data["test"])).tolist() == [4, 0, 4]
    swapped = test.cast_column("label", ClassLabel(names=["c", "b", "a"]))
    data = load_data(DatasetDict(train=train.cast_column("label", ClassLabel(names=["a", "b", "c"])), test=swapped))
    assert [class_names(data["test"])[label] for label in labels(data["test"])] == test["label"][:]


def test_classes_are_kept_by_number_or_name_in_the_datasets_order():
    names = ["ant", "bee", "cow", "dog"]
    whole = numbered([0, 1, 2, 3] * 10).cast_column("label", ClassLabel(names=names))
    by_name, by_number = load_data(whole, classes=["dog", "bee"]), load_data(whole, classes=[3, 1])
    for kind, split in by_name.items():
        assert class_names(split) == ["bee", "dog"]
        assert [names[int(row) % 4] for row in rows(split)] == [class_names(split)[label] for label in labels(split)]
        assert rows(split) == rows(by_number[kind]) and labels(split).tolist() == labels(by_number[kind]).tolist()


# --- what images look like -------------------------------------------------------------------------------------------


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def flat(value, mode, palette=None):
    image = PILImage.new(mode, (4, 4), value)
    if palette:
        image.putpalette(palette)
    return image


def upside_down():
    """An image with a white top row, stored rotated by 180 degrees with the EXIF tag that says so."""
    array = np.zeros((4, 4), np.uint8)
    array[3] = 255
    exif = PILImage.Exif()
    exif[0x0112] = 3
    return encoded(PILImage.fromarray(array), exif=exif)


IMAGES = {
    "grey": (encoded(flat(100, "L")), 100),
    "one bit": (encoded(flat(1, "1")), 255),
    "palette": (encoded(flat(1, "P", [0, 0, 0, 10, 20, 30])), (10, 20, 30)),
    "CMYK": (encoded(flat((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0)),
    "16 bits": (encoded(PILImage.fromarray(np.full((4, 4), 100 * 257, np.uint16))), 100),
    "16 bits, TIFF": (encoded(PILImage.fromarray(np.full((4, 4), 200 * 257, np.uint16)), "TIFF"), 200),
    "with alpha": (encoded(flat((10, 20, 30, 0), "RGBA")), (10, 20, 30)),
    "grey with alpha": (encoded(flat((70, 9), "LA")), 70),
    "floats": (encoded(flat(50.0, "F"), "TIFF"), 50),
}


def processed(image, channels=3):
    """The image's 8-bit values as a member without any resizing sees them."""
    geometry = {
        "input_size": [channels, 4, 4],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "nearest",
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
    }
    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b"]))
    split = Dataset.from_dict({"image": [image], "label": [0]}, features=features)
    processor = ConcatEnsembleImageProcessor([geometry | {"image_mode": {1: "L", 3: "RGB"}[channels]}])
    return (processor([read_image(split, 0)])["pixel_values"][0] * 255).numpy()


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_mode_are_read_correctly(kind):
    image, value = IMAGES[kind]
    expected = np.broadcast_to(np.reshape(value, (-1, 1, 1)), (3, 4, 4))
    np.testing.assert_allclose(processed(image), expected, atol=1e-3)


def test_a_colour_image_is_grey_to_a_grey_member():
    """By ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    np.testing.assert_allclose(processed(encoded(flat((255, 0, 0), "RGB")), channels=1), 76, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_camera_image_is_turned_upright(channels):
    upright = processed(upside_down(), channels)
    assert (upright[:, 0] == 255).all() and (upright[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encoded(PILImage.new("L", (1, 1))), "1x1"),
        (encoded(flat(float("nan"), "F"), "TIFF"), "NaN or infinite"),
        (encoded(flat(float("-inf"), "F"), "TIFF"), "NaN or infinite"),
        ({"bytes": b"only text", "path": None}, "image 0 cannot be read.*remove or repair"),
        (
            {"bytes": encoded(PILImage.effect_noise((64, 64), 50))["bytes"][:500], "path": None},
            "image 0 cannot be read",
        ),
        ({"bytes": b"", "path": None}, "image 0 cannot be read"),
        ({"bytes": None, "path": "/nonesuch/a.png"}, r"/nonesuch/a\.png"),
    ],
    ids=["1x1", "NaN", "infinite", "text", "truncated", "empty", "missing file"],
)
def test_an_unusable_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        processed(image)


def test_a_text_file_named_png_is_named_by_its_file(splits, tmp_path):
    folder = write_images(splits, tmp_path)
    bad = folder / "test" / "a" / "001.png"
    bad.write_text("only text")
    split = load_data(folder)["test"]
    number = next(n for n, image in enumerate(split["image"]) if image["path"] == str(bad))
    with pytest.raises(ValueError, match=rf"image {number} \(.*001\.png\) cannot be read.*remove or repair it"):
        read_image(split, number)


# --- bad input -------------------------------------------------------------------------------------------------------


def with_labels(values, feature=None):
    dataset = numbered([0] * len(values)).remove_columns("label").add_column("label", values)
    return dataset.cast_column("label", feature) if feature else dataset


AB = ["a", "b"] * 20
NAMED = ClassLabel(names=["a", "b"])
# Dataset, arguments, and a pattern of the one-line message: the value and the remedy.
BAD_DATA = {
    "missing label column": (with_labels(AB), {"label_column": "breed"}, "no column 'breed'; it has image, label"),
    "missing image column": (with_labels(AB), {"image_column": "photo"}, "no column 'photo'; it has image, label"),
    "one column for both": (with_labels(AB), {"image_column": "label"}, "label"),
    "no label column": (
        with_labels(AB).rename_column("label", "notes"),
        {},
        "found no label column among image, notes.*label_column",
    ),
    "no image column": (
        with_labels(AB).remove_columns("image"),
        {},
        "found no image column among label.*image_column",
    ),
    "missing split": (
        with_labels(AB),
        {"test_split": "holdout"},
        "test_split='holdout' does not exist; the dataset has train",
    ),
    "no training split": (
        DatasetDict(one=with_labels(AB), two=with_labels(AB)),
        {},
        r"no training split among \['one', 'two'\].*train_split",
    ),
    "empty split": (with_labels(AB).select([]), {}, "train split is empty"),
    "empty test split": (
        DatasetDict(train=with_labels(AB), test=with_labels(AB).select([])),
        {},
        "test split is empty.*test_split",
    ),
    "empty slice": (with_labels(AB), {"train_split": "train[10:10]"}, "train split is empty"),
    "slice beyond the end": (with_labels(AB), {"train_split": "train[1000:]"}, "train"),
    "slice before the beginning": (with_labels(AB), {"train_split": "train[-2000:-1000]"}, "train"),
    "no slice": (with_labels(AB), {"train_split": "train[most]"}, r"'train\[most\]' is not a slice such as"),
    "open slice": (with_labels(AB), {"train_split": "train[:80%"}, r"'train\[:80%' is not a slice such as"),
    "one class": (with_labels(["a"] * 40), {}, "one class 'a'; a probe needs two"),
    "one class kept": (with_labels(AB), {"classes": ["b"]}, "one class 'b'; a probe needs two"),
    "unknown class": (with_labels(AB), {"classes": ["a", "z"]}, r"classes=\['z'\]: the dataset has 2, a, b"),
    "class number out of range": (with_labels(AB), {"classes": [0, 2]}, r"classes=\[2\]: the dataset has 2"),
    "no classes": (with_labels(AB), {"classes": []}, r"classes=\[\]"),
    "null labels": (with_labels(["a", None] * 20), {}, "images without a label.*label_column"),
    "null class labels": (with_labels([0, None] * 20, NAMED), {}, "images without a label"),
    "float labels": (
        with_labels([0.0, 1.0] * 20),
        {},
        "labels of the train split are (float|double).*class names or whole numbers",
    ),
    "several labels an image": (with_labels([[0], [0, 1]] * 20), {}, "must be class names or whole numbers"),
    "hidden labels": (with_labels([-1, -1] * 20, NAMED), {}, r"labels are hidden \(-1\); name a split that has them"),
    "hidden test labels": (
        DatasetDict(train=with_labels(AB), test=with_labels([-1, -1], NAMED)),
        {},
        r"test split's labels are hidden \(-1\)",
    ),
    "zero limit": (with_labels(AB), {"limit": 0}, "limit|empty"),
    "one label a class": (with_labels(AB), {"shots": 1}, "shots=1 must be at least 2"),
    "more labels than images": (with_labels(AB), {"shots": 15}, "shots=15: a class has 10 images for training"),
    "negative limit": (with_labels(AB), {"limit": -1}, "limit=-1"),
    "test share of nothing": (with_labels(AB), {"test_size": 0.0}, "test_size=0.0 must be a fraction between 0 and 1"),
    "test share above one": (with_labels(AB), {"test_size": 20}, "test_size=20 must be a fraction between 0 and 1"),
    "test share of everything": (with_labels(AB), {"test_size": 0.999}, "cannot cut test_size=0.999 off 40 images"),
    "unknown name": ("nonesuch", {}, "no dataset 'nonesuch'.*neither digits nor a local path"),
    "misspelt name": ("digit", {}, "no dataset 'digit'"),
    "unknown Hub id": ("nobody/nonesuch", {}, "no dataset 'nobody/nonesuch'"),
    "missing path": ("/nonesuch/folder", {}, "no dataset '/nonesuch/folder'.*nor a local path"),
    "missing parquet": ("parquet:/nonesuch.parquet", {}, r"'parquet:/nonesuch\.parquet'"),
    "missing folder": ("imagefolder:/nonesuch", {}, "'imagefolder:/nonesuch'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_the_message_about_bad_data_has_the_value_and_the_remedy(case):
    dataset, arguments, message = BAD_DATA[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_data(dataset, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", r"\.txt; give a folder of images or a \.parquet file"),
        ("x.parquet", r"cannot load dataset .*x\.parquet"),
    ],
)
def test_a_file_of_another_kind_is_named(name, message, tmp_path):
    (tmp_path / name).write_text("only text")
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / name)


def test_a_damaged_parquet_file_is_named(splits, tmp_path):
    """The end of the file, which lists the columns, is intact, but not its middle."""
    splits["train"].to_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:40] + b"\xff" * 200 + whole[240:])
    with pytest.raises(ValueError, match=r"cannot load dataset .*x\.parquet"):
        load_data(tmp_path / "x.parquet")


@pytest.mark.parametrize("prefix", ["", "parquet:", "imagefolder:"])
def test_an_empty_folder_is_named(prefix, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot load dataset .*{tmp_path.name}"):
        load_data(f"{prefix}{tmp_path}")


def test_an_empty_saved_dataset_is_named(splits, tmp_path):
    splits["train"].select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="none"):
        load_data(tmp_path / "none")


def test_too_few_images_for_a_cut_are_refused():
    with pytest.raises(ValueError, match="cannot cut"):
        load_data(with_labels(["a", "b", "a"]))


def test_labels_of_a_large_string_type_are_names():
    assert class_names(load_data(with_labels(AB, Value("large_string")))["train"]) == ["a", "b"]
