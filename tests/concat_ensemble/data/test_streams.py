"""Streams and WebDataset tars, of which only what is used is read."""

import io
import json
import tarfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, IterableDatasetDict, List, Value
from PIL import Image as PILImage

from concat_ensemble import load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names
from concat_ensemble.data.streams import BUFFER

NAMED = Features(image=Image(), label=ClassLabel(names=["a", "b"]))


def picture(number):
    return PILImage.fromarray(np.full((4, 4), number % 256, np.uint8))


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def stream(number, features=NAMED, label=lambda n: n % 2, read=None):
    """A stream of `number` images; the list `read` notes which of them were read."""

    def rows():
        for n in range(number):
            if read is not None:
                read.append(n)
            yield {"image": picture(n), "label": label(n)}

    return IterableDataset.from_generator(rows, features=features)


def shades(split):
    return [int(np.asarray(read_image(split, row))[0, 0]) for row in range(len(split))]


def test_only_as_many_images_of_a_stream_are_read_as_are_used():
    read = []
    data = load_data(stream(10**9, read=read), limit=20)
    assert sum(map(len, data.values())) == 20
    assert len(read) <= 20 + 10 * 20


def test_the_buffer_is_bounded():
    read = []
    data = load_data(stream(10**9, read=read), limit=300)
    assert sum(map(len, data.values())) == 300 and len(read) <= 300 + BUFFER


def test_the_images_of_a_stream_keep_their_labels_and_depend_on_the_seed():
    first, again, other = (load_data(stream(250), limit=40, seed=seed) for seed in (0, 0, 1))
    for kind, split in first.items():
        assert [shade % 2 for shade in shades(split)] == split["label"][:]
        assert shades(split) == shades(again[kind])
    assert shades(first["test"]) != shades(other["test"])


def test_each_stream_of_several_is_limited():
    streams = IterableDatasetDict(train=stream(200), validation=stream(100), test=stream(100))
    data = load_data(streams, limit=30)
    assert {kind: len(split) for kind, split in data.items()} == {"train": 30, "validation": 30, "test": 30}


def test_labels_of_a_stream_may_be_names():
    features = Features(image=Image(), label=Value("string"))
    data = load_data(stream(100, features=features, label=lambda n: ["owl", "cat"][n % 2]), limit=40)
    assert class_names(data["train"]) == ["cat", "owl"]


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (stream(50), {}, "the train split is a stream, which is read only as far as needed; set limit"),
        (
            stream(10**6, label=lambda n: int(n > 10**5)),
            {"limit": 10},
            "10 images of the train stream have the one label 0",
        ),
        (stream(50, features=None), {"limit": 10}, "does not state its columns.*give them as in IterableDataset"),
        (stream(0), {"limit": 10}, "train split is empty"),
        (
            stream(50, label=lambda n: int("x" * (n == 20) or n % 2)),
            {"limit": 40},
            "cannot read the train stream: invalid",
        ),
        (stream(50), {"limit": 10, "train_split": "train[:50%]"}, "is a slice, which a stream does not have"),
        (stream(50), {"limit": 10, "label_column": "kind"}, "no column 'kind'; it has image, label"),
    ],
    ids=["no limit", "sorted", "no types", "empty", "failing", "slice", "column"],
)
def test_a_stream_that_cannot_be_used_is_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        load_data(dataset, **arguments)
    assert "\n" not in str(error.value)


# --- WebDataset ------------------------------------------------------------------------------------------------------


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for ending, content in fields.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def samples(number, label, start=0, image="png"):
    return [(f"{n:06}", {image: png(n), **label(n)}) for n in range(start, start + number)]


def numbers(n):
    return {"cls": str(9 + n % 2).encode()}


def names(n):
    return {"cls": ["owl\n", "cat"][n % 2].encode()}


def values(n):
    return {"json": json.dumps({"label": n % 2, "patient": f"p{n // 8}", "sizes": [1, 2]}).encode()}


@pytest.mark.parametrize(
    ("label", "expected"), [(numbers, ["9", "10"]), (names, ["cat", "owl"]), (values, ["0", "1"])]
)
@pytest.mark.parametrize("limit", [None, 16])
def test_tars_are_read_with_their_labels(label, expected, limit, tmp_path):
    for number in range(2):
        write_tar(tmp_path / "tars" / f"shard-{number}.tar", samples(20, label, start=20 * number))
    data = load_data(tmp_path / "tars", limit=limit)
    assert sum(map(len, data.values())) == (limit or 40)
    assert class_names(data["train"]) == expected
    of_row = {0: "9", 1: "10"} if label is numbers else {0: "owl", 1: "cat"} if label is names else {0: "0", 1: "1"}
    for split in data.values():
        assert [class_names(split)[each] for each in split["label"]] == [of_row[shade % 2] for shade in shades(split)]


@pytest.mark.parametrize("place", ["{}-000.tar", "data-{}-000.tar", "{}/000.tar"])
def test_the_names_of_tars_and_folders_say_the_split(place, tmp_path):
    for start, kind in ((0, "train"), (50, "Val"), (100, "test")):
        write_tar(tmp_path / place.format(kind), samples(20, numbers, start=start))
    data = load_data(tmp_path)
    assert {kind: len(split) for kind, split in data.items()} == {"train": 20, "validation": 20, "test": 20}
    assert min(shades(data["test"])) == 100 and min(shades(data["validation"])) == 50


def test_jpg_and_png_stand_beside_each_other_and_other_files_are_ignored(tmp_path):
    rows = samples(10, lambda n: numbers(n) | {"seg.png": png(0), "npy": b"0"}) + samples(10, numbers, 10, image="JPG")
    write_tar(tmp_path / "a.tar", rows)
    data = load_data(f"webdataset:{tmp_path}/*.tar")
    assert sorted(shade for split in data.values() for shade in shades(split)) == list(range(20))
    assert sum(map(len, load_data(tmp_path / "a.tar").values())) == 20


def test_groups_of_tars_are_found_in_json(tmp_path):
    write_tar(tmp_path / "a.tar", samples(80, values))
    data = load_data(tmp_path, group_column="patient")
    groups = [set(split["group"]) for split in data.values()]
    assert sum(map(len, groups)) == 10 == len(set().union(*groups))


def test_a_tar_that_changed_is_read_again(tmp_path):
    write_tar(tmp_path / "a.tar", samples(20, numbers))
    load_data(tmp_path)
    write_tar(tmp_path / "a.tar", samples(30, numbers))
    assert sum(map(len, load_data(tmp_path).values())) == 30


TARS = {
    "no images": ([("1", {"cls": b"0"})] * 2, "no images in its first samples; a sample is NAME.jpg"),
    "no labels": (samples(20, lambda n: {}), "found no label column among image"),
    "hidden labels": (samples(20, lambda n: {"cls": b"-1"}), r"labels are hidden \(-1\)"),
    "some labels": (samples(20, lambda n: numbers(n) if n else {}), "1 images without a label, of 20"),
    "several images": (samples(20, lambda n: numbers(n) | {"jpg": png(n)}), "sample 000000 in .* has several images"),
    "broken json": (samples(20, lambda n: {"json": b"{"}), r"000000\.json in .*a\.tar cannot be read.*repair it"),
    "text that is none": (samples(20, lambda n: {"cls": b"\xff"}), r"000000\.cls in .*a\.tar cannot be read"),
    "labels of two kinds": (
        samples(150, numbers) + samples(10, names, start=150) + samples(150, numbers, start=160),
        "is no whole number, as in the first samples",
    ),
}


@pytest.mark.parametrize("case", TARS)
@pytest.mark.parametrize("limit", [None, 1000])
def test_tars_that_cannot_be_used_are_refused(case, limit, tmp_path):
    rows, message = TARS[case]
    write_tar(tmp_path / "a.tar", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_data(tmp_path, limit=limit)
    assert "\n" not in str(error.value)


def test_a_damaged_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", samples(20, numbers))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as a tar"):
        load_data(tmp_path)


# --- columns that are not one image a row ----------------------------------------------------------------------------

ENCODED = [{"bytes": png(n), "path": None} for n in range(20)]


def rows(image, feature, name="image"):
    features = Features({name: feature, "label": Value("int64")})
    return Dataset.from_dict({name: image, "label": [0, 1] * 10}, features=features)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows([[e, e] for e in ENCODED], List(Image())), "column 'image' of the train split has several images a row"),
        (
            rows([[e] for e in ENCODED], List(Image()), "images"),
            "column 'images' of the train split has several images",
        ),
        (rows(["https://a.b/c.jpg"] * 20, Value("string")), "images of the train split are addresses, such as https"),
        (rows([None] + ["http://a.b/c.jpg"] * 19, Value("string")), "are addresses, such as http://a"),
        (rows([[0.5, 1.0]] * 20, List(Value("float32")), "pixel_values"), "'pixel_values' .* holds List, not images"),
        (rows([3] * 20, Value("int64")), "column 'image' of the train split holds int64, not images"),
    ],
    ids=["several", "several, by type", "addresses", "some addresses", "arrays", "numbers"],
)
def test_rows_that_are_no_images_are_refused(dataset, message):
    with pytest.raises(ValueError, match=message) as error:
        load_data(dataset)
    assert "\n" not in str(error.value)


def test_a_row_without_an_image_is_named_where_it_is_read():
    data = load_data(rows([*ENCODED[:19], None], Image()))
    failures = []
    for split in data.values():
        for row in range(len(split)):
            try:
                read_image(split, row)
            except ValueError as error:
                failures.append(str(error))
    (failure,) = failures
    assert "cannot be read: the row has no image; remove or repair it" in failure and "\n" not in failure
