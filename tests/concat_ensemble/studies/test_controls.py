import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel, extract_features, load_data
from concat_ensemble.data.bad_images import without_rows
from concat_ensemble.data.images import read_image
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.studies.controls import pixel_table, untrained_like


def weights(model):
    return torch.cat([tensor.flatten().float() for tensor in model.members.state_dict().values()])


def test_untrained_members_have_as_many_features_and_depend_on_the_seed_alone(ensemble):
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = (untrained_like(ensemble, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights(first), weights(again)) and not torch.equal(weights(first), weights(other))
    assert not torch.equal(weights(first), weights(ensemble))
    assert first.config.num_features == ensemble.config.num_features == 32 and not first.training
    kernels = [first.members[k].conv1[0].weight for k in "01"]
    assert not torch.equal(*kernels), "the members differ from each other"


def test_untrained_members_of_some_members_and_of_a_classifier(ensemble, folder):
    part = ConcatEnsembleModel.from_pretrained(folder, active_members=[1])
    assert untrained_like(part, 0).config.num_features == 16
    config = type(ensemble.config)(members=ensemble.config.members, num_labels=3)
    assert untrained_like(ConcatEnsembleForImageClassification(config), 0).config.num_features == 32


def in_memory(*arrays):
    return load_data(
        Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays], "label": ["a", "b"] * (len(arrays) // 2)})
    )


def test_small_images_become_their_pixels_divided_by_255():
    arrays = [np.full((2, 3), n, np.uint8) for n in range(20)]
    table = pixel_table(in_memory(*arrays), "L")
    assert table.feature_dims == [6] and table.class_names == ["a", "b"]
    values = sorted(round(float(row[0]) * 255) for kind in table for row in table[kind].features)
    assert values == list(range(20))
    assert all((row == row[0]).all() for kind in table for row in table[kind].features)


def test_the_colors_of_a_pixel_stay_together():
    arrays = [np.tile(np.array([n, 100, 200], np.uint8), (2, 2, 1)) for n in range(20)]
    rows = pixel_table(in_memory(*arrays), "RGB")["test"].features
    assert rows.shape[1] == 12
    np.testing.assert_allclose(rows[:, 1::3] * 255, 100, atol=1e-4)
    np.testing.assert_allclose(rows[:, 2::3] * 255, 200, atol=1e-4)
    assert pixel_table(in_memory(*arrays), "L").feature_dims == [4]


@pytest.mark.parametrize(
    "shapes", [[(40, 20)], [(8, 8), (8, 9)], [(33, 33)]], ids=["large", "two sizes", "one pixel too large"]
)
def test_other_images_are_resized_to_32_by_32(shapes):
    arrays = [np.full(shapes[n % len(shapes)], n, np.uint8) for n in range(20)]
    table = pixel_table(in_memory(*arrays), "L")
    assert table.feature_dims == [1024]
    assert sorted(round(float(row.mean()) * 255) for kind in table for row in table[kind].features) == list(range(20))


def test_pixels_keep_their_labels(images):
    """Images with label b are bright."""
    data = load_data(DatasetDict(train=images(["b", "a"] * 20), test=images(["a", "b"] * 5)))
    features, labels = pixel_table(data, "L")["test"]
    assert ((features.mean(1) * 255 > 60) == labels).all()


# --- all kinds of images, one at a time ------------------------------------------------------------------------------


def pixels_all_at_once(data, mode):
    """As `pixel_table` was, with all images in memory: {split: (N, D)}."""
    images = {
        name: [convert_image(read_image(split, n), mode) for n in range(len(split))] for name, split in data.items()
    }
    sizes = {image.size for split in images.values() for image in split}
    if len(sizes) > 1 or max(max(size) for size in sizes) > 32:
        images = {name: [image.resize((32, 32)) for image in split] for name, split in images.items()}
    return {
        name: np.stack([np.asarray(image, dtype=np.float32).ravel() / 255 for image in split])
        for name, split in images.items()
    }


@given(
    sizes=st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=1, max_size=3),
    modes=st.lists(st.sampled_from(["L", "RGB", "P", "RGBA", "I;16", "1"]), min_size=1, max_size=3),
    mode=st.sampled_from(["L", "RGB"]),
    turned=st.booleans(),
)
def test_values_are_those_of_all_images_at_once(sizes, modes, mode, turned):
    """Also where an EXIF rotation swaps width and height, which decides whether the sizes agree."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    rows = []
    for n in range(12):
        width, height = sizes[n % len(sizes)]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert("RGB")
        kind = modes[n % len(modes)]
        if kind == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
        else:
            image = image.convert(kind)
        file = io.BytesIO()
        image.save(file, "PNG", **({"exif": exif} if turned and n % 2 else {}))
        rows.append({"bytes": file.getvalue(), "path": None})
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=["a", "b"]))
    split = Dataset.from_dict({"image": rows, "label": [0, 1] * 6}, features=features)
    data = DatasetDict(train=split.select(range(8)), test=split.select(range(8, 12)))
    table, expected = pixel_table(data, mode, quiet=True), pixels_all_at_once(data, mode)
    for name in data:
        assert table[name].dtype == table[name].features.dtype == np.float32
        assert np.array_equal(table[name].features, expected[name])
        assert np.array_equal(table[name].rows(np.array([3, 1])), expected[name][[3, 1]])


def test_bad_images_are_named_or_left_out_as_in_extraction(ensemble, damaged, bad_images):
    data = damaged(train=list(bad_images), test=["cut.jpg"])
    with pytest.raises(
        ValueError, match=r"^9 of 50 images cannot be used: the train split, image 3 \(cut\.jpg\)"
    ) as error:
        pixel_table(data, "L", quiet=True)
    with pytest.raises(ValueError) as expected:
        extract_features(ensemble, data, quiet=True)
    assert str(error.value) == str(expected.value)
    pixels = pixel_table(data, "L", skip_bad=True, quiet=True)
    features = extract_features(ensemble, data, skip_bad=True, quiet=True)
    assert pixels.skipped == features.skipped and pixels.feature_dims == [64], "the bad ones do not count as a size"
    whole = pixel_table(without_rows(data, pixels.skipped), "L", quiet=True)
    for name in data:
        assert np.array_equal(pixels[name].features, whole[name].features)
        assert np.array_equal(pixels[name].labels, features[name].labels)
        assert np.array_equal(pixels[name].groups, features[name].groups)


def test_pixels_say_how_far_they_are_unless_quiet(damaged, capsys):
    pixel_table(damaged(train=["null"]), "L", skip_bad=True)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("raw pixels: 50 images\nraw pixels: 50 of 50 images in ")
    pixel_table(damaged(), "L", quiet=True)
    assert capsys.readouterr() == ("", "")


# Peaks of the resident memory of a process of its own: of 4 images of 4 megapixels, of 24, and of 12 of 12 megapixels.
MEMORY = """
import io, json, resource
import numpy as np, PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from concat_ensemble.studies.controls import pixel_table

def peak(number, width, height):
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "JPEG")
    columns = {"image": [{"bytes": file.getvalue(), "path": None}] * number, "label": [0, 1] * (number // 2)}
    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b"]))
    table = pixel_table(DatasetDict(train=Dataset.from_dict(columns, features=features)), "RGB", quiet=True)
    assert table["train"].features.shape == (number, 3072)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(json.dumps([peak(4, 2000, 2000), peak(24, 2000, 2000), peak(12, 4000, 3000)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_memory_does_not_grow_with_the_number_or_all_sizes_of_the_images():
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    few, many, large = json.loads(done.stdout)
    assert many - few < 80, "MB; the 20 more are 240 MB"
    assert large - many < 200, "MB; one image is 34 MB, thrice while it is converted, and all of them are 410 MB"
