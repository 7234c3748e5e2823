"""Folders of images: which are splits and which classes, and what is said of those that are neither."""

import io

import numpy as np
import pytest
from datasets import Image, load_dataset
from PIL import Image as PILImage

from concat_ensemble import load_data
from concat_ensemble.data.folders import load_folder
from concat_ensemble.data.images import read_image
from concat_ensemble.data.loading import load_stream


@pytest.fixture
def tree(tmp_path):
    """`tree(path, ...)`: a folder with four images in each path without an ending, an empty folder for one that ends
    with a slash, and one file for any other."""
    rng = np.random.default_rng(0)

    def png() -> bytes:
        buffer = io.BytesIO()
        PILImage.fromarray(rng.integers(0, 255, (8, 8)).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def make(*paths):
        root = tmp_path / "photos"
        for path in paths:
            place = root / path
            if path.endswith("/"):
                place.mkdir(parents=True)
            elif "." in place.name:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(png() if place.suffix.lower() in (".png", ".jpg") else b"no image")
            else:
                place.mkdir(parents=True)
                for number in range(4):
                    (place / f"{number}.png").write_bytes(png())
        return root

    return make


def classes(splits):
    """The classes of each split with their counts; -1 for hidden ones."""
    found = {}
    for kind, split in splits.items():
        labels = [-1 if label == -1 else split.features["label"].names[label] for label in split["label"]]
        found[kind] = {label: labels.count(label) for label in labels}
    return found


CD = {"cat": 4, "dog": 4}
LAYOUTS = {
    "classes": (["cat", "dog"], {"train": CD}),
    "a class with the name of a split": (["bus", "train", "car"], {"train": {"bus": 4, "train": 4, "car": 4}}),
    "splits": (["train/cat", "train/dog", "test/cat", "test/dog"], {"train": CD, "test": CD}),
    "capitals": (
        ["Train/cat", "Train/dog", "Val/cat", "TEST/dog"],
        {"train": CD, "validation": {"cat": 4}, "test": {"dog": 4}},
    ),
    "longer names": (
        ["train2017/cat", "val2017/cat", "my_test/cat"],
        {"train": {"cat": 4}, "validation": {"cat": 4}, "test": {"cat": 4}},
    ),
    "parts of a split": (["train_1/cat", "train_2/dog", "test/cat"], {"train": CD, "test": {"cat": 4}}),
    "a small copy of a split": (
        ["train/cat", "train/dog", "train_mini/cat", "val/cat"],
        {"train": CD, "train_mini": {"cat": 4}, "validation": {"cat": 4}},
    ),
    "a folder around them": (["data/train/cat", "data/train/dog", "data/test/cat"], {"train": CD, "test": {"cat": 4}}),
    "a folder around classes": (["data/cat", "data/dog"], {"train": CD}),
    "a hidden test split": (["train/cat", "train/dog", "test/1.png", "test/2.png"], {"train": CD, "test": {-1: 2}}),
    "a split of another name": (["train/cat", "train/dog", "extra/cat"], {"train": CD, "extra": {"cat": 4}}),
    "loose images beside splits": (
        ["train/cat", "test/dog", "preview.png"],
        {"train": {"cat": 4}, "test": {"dog": 4}},
    ),
    "notes beside splits": (["train/cat", "train/dog", "annotations/a.xml"], {"train": CD}),
    "a class that only one split has": (
        ["train/cat", "train/dog", "test/cat", "test/dog/"],
        {"train": CD, "test": {"cat": 4}},
    ),
    "nested classes": (["animals/cat", "animals/dog", "cars/bus"], {"train": CD | {"bus": 4}}),
    "endings in capitals": (["cat/1.PNG", "cat/2.JPG", "dog/3.png"], {"train": {"cat": 2, "dog": 1}}),
    "files that are no images": (["cat", "dog", "cat/notes.txt", "dog/Thumbs.db", "README.md"], {"train": CD}),
    "hidden files": (["cat", "dog", ".DS_Store", "cat/._1.png", ".git/x.png", "__MACOSX/cat/1.png"], {"train": CD}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_splits_and_classes(layout, tree):
    paths, expected = LAYOUTS[layout]
    assert classes(load_folder(tree(*paths))) == expected


REFUSED = {
    "a class in several places": (
        ["cats/a", "cats/b", "dogs/a", "dogs/b"],
        "2 classes have several folders: 'a' is cats/a and dogs/a; .* give each class one folder",
    ),
    "splits inside classes": (
        ["cat/train", "dog/train"],
        "1 class has several folders: 'train' is cat/train and dog/train",
    ),
    "a stray image": (["cat", "dog", "x.png"], r"1 image lies beside the class folders, such as x\.png; move each"),
    "stray images in a split": (
        ["train/cat", "train/dog", "train/x.png", "train/y.png", "test/cat"],
        r"2 images lie beside the class folders, such as train/x\.png",
    ),
    "no class folders": (["1.png", "2.png"], r"there are 2 images but no class folders; put .* as in cat/1\.jpg"),
    "no class folders in splits": (["train/1.png", "test/2.png"], "there are 2 images but no class folders"),
    "different depths": (["cat/a", "cat/b", "dog"], r"different depths, such as dog/0\.png and cat/a/0\.png"),
    "a class without images": (["cat", "dog", "owl/"], r"the folder owl has no images \(it is empty\); add images"),
    "a class of other files": (
        ["cat", "dog", "owl/1.heic", "owl/2.HEIC"],
        r"the folder owl has no images \(only 2 \.heic: convert them to PNG or JPEG\)",
    ),
    "notes beside classes": (
        ["cat", "dog", "annotations/1.xml"],
        r"annotations has no images \(only 1 \.xml\).*remove",
    ),
    "an empty class in every split": (
        ["train/cat", "train/dog", "train/owl/", "test/cat", "test/owl/"],
        "the folder (train|test)/owl has no images",
    ),
    "nothing": (["a/"], r"there are no images \(it is empty\)"),
    "no images": (["a/1.heic", "b/2.txt"], r"there are no images \(only 1 \.heic, 1 \.txt: convert them"),
    "archives": (["photos.zip"], r"there are no images \(only 1 \.zip: unpack them\)"),
    "one class": (["cat"], "the train split has the one class 'cat'"),
    "a test split without classes": (
        ["train/cat", "train/dog", "test/1.png"],
        r"test split's labels are hidden \(-1\)",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_folders_that_are_neither_are_refused_with_what_to_do(layout, tree):
    paths, message = REFUSED[layout]
    folder = tree(*paths)
    with pytest.raises(ValueError, match=message) as error:
        load_data(folder)
    assert "\n" not in str(error.value)


def test_nested_classes_are_said_with_their_counts(tree, caplog):
    load_folder(tree("animals/cat", "animals/dog", "cars/bus"))
    assert "classes are the innermost folders: cat (4), dog (4), bus (4)" in caplog.text


def test_pictures_that_cannot_be_read_are_said(tree, caplog):
    load_folder(tree("cat", "dog", "cat/1.heic", "dog/2.heic", "dog/3.avif"))
    assert "ignored (only 2 .heic, 1 .avif: convert them to PNG or JPEG)" in caplog.text


@pytest.mark.parametrize(
    "paths", [["cat", "dog", "a b", "Zebra", "zebra", "a-b"], ["train/cat", "train/dog", "test/cat", "test/dog"]]
)
def test_the_usual_folders_are_read_as_datasets_reads_them(paths, tree):
    """In the same order too, so that their cuts are what they were."""
    folder = tree(*paths)
    expected = load_dataset("imagefolder", data_dir=str(folder)).cast_column("image", Image(decode=False))
    splits = load_folder(folder)
    assert set(splits) == set(expected)
    for kind, split in splits.items():
        assert split["image"][:] == expected[kind]["image"][:] and split["label"][:] == expected[kind]["label"][:]
        assert split.features["label"].names == expected[kind].features["label"].names


def test_links_are_followed_and_loops_are_not(tree, tmp_path):
    folder = tree("cat", "dog")
    (tmp_path / "elsewhere").mkdir()
    (folder / "cat" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    (folder / "owl").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "loop").symlink_to(folder)
    splits = load_folder(folder)
    assert classes(splits) == {"train": {"cat": 3, "dog": 4, "owl": 1}}
    assert all(read_image(splits["train"], row).size == (8, 8) for row in range(8))


def test_folders_are_used_although_there_is_a_metadata_file(tree):
    folder = tree("cat", "dog")
    (folder / "metadata.csv").write_text("file_name,text\ncat/0.png,one\ndog/0.png,two\n")
    with pytest.raises(ValueError, match=r"found no label column.*set use_folders\."):
        load_data(folder)
    data = load_data(folder, use_folders=True)
    assert sum(map(len, data.values())) == 8 and data["train"].features["label"].names == ["cat", "dog"]
    (folder / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{c}/{n}.png,{n % 2}\n" for c in CD for n in range(4))
    )
    assert load_data(folder)["train"].features["label"].names == ["0", "1"], "a metadata file with labels has them"


def test_a_folder_of_images_can_be_streamed(tree):
    folder = tree("train/cat", "train/dog", "test/cat")
    stream = load_stream(folder)
    rows = [(row["image"]["path"], row["label"]) for row in stream]
    split = load_folder(folder)["train"]
    assert rows == [(row["image"]["path"], row["label"]) for row in split]
