"""Labels that are hidden, missing, or without a class name: refused where they are used, and only there."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets

from concat_ensemble import load_data
from concat_ensemble.data.columns import add_column
from concat_ensemble.data.labels import class_names, read_labels

NAMED = ClassLabel(names=["a", "b"])


def labelled(labels, feature=None):
    """Rows whose images are their numbers."""
    features = Features(image=Image(decode=False))
    images = Dataset.from_dict(
        {"image": [{"bytes": b"%d" % n, "path": None} for n in range(len(labels))]}, features=features
    )
    column = Dataset.from_dict({"label": labels}, features=None if feature is None else Features(label=feature))
    return concatenate_datasets([images, column], axis=1)


HIDDEN = {
    "named": ([-1] * 8, NAMED, "-1", [0, 1] * 10),
    "numbers": ([-1] * 8, Value("int64"), "-1", [0, 1] * 10),
    "small numbers": ([-1] * 8, Value("int8"), "-1", [0, 1] * 10),
    "texts": ([""] * 8, Value("string"), "''", ["a", "b"] * 10),
    "blank texts": (["  "] * 8, Value("string"), "'  '", ["a", "b"] * 10),
    "numbers as texts": (["-1"] * 8, Value("string"), "'-1'", ["a", "b"] * 10),
    "missing texts": ([None] * 8, Value("string"), "None", ["a", "b"] * 10),
    "missing numbers": ([None] * 8, Value("int64"), "None", [0, 1] * 10),
    "missing classes": ([None] * 8, NAMED, "None", [0, 1] * 10),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_split_of_hidden_labels_is_refused_where_it_is_used_and_ignored_where_it_is_not(case):
    hidden, feature, value, known = HIDDEN[case]
    train = labelled(known, feature)
    with pytest.raises(ValueError, match="the test split's labels are hidden") as error:
        load_data(DatasetDict(train=train, validation=train, test=labelled(hidden, feature)))
    assert f"hidden ({value}); name a split that has them, such as test_split='validation'" in str(error.value)
    splits = DatasetDict(train=train, validation=labelled(known, feature), test=labelled(hidden, feature))
    assert {k: len(split) for k, split in load_data(splits, test_split="validation").items()} == {
        "train": 16,
        "validation": 4,
        "test": 20,
    }
    pretraining = load_data(splits, for_training=True)
    assert {kind: len(split) for kind, split in pretraining.items()} == {"train": 20, "validation": 20}
    with pytest.raises(ValueError, match=r"the train split's labels are hidden"):
        load_data(DatasetDict(train=labelled(hidden, feature), test=train))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([-1, 0, 1, 1] * 5, NAMED, r"5 of 20 labels of the train split are hidden \(-1\); remove these images"),
        ([-1, 1] * 10, Value("int64"), r"10 of 20 labels .* if -1 is a class, write the labels as names"),
        ([-1, 1] * 10, Value("int8"), "10 of 20 labels"),
        (["", "a", "b", "c"] * 5, Value("string"), r"5 of 20 labels of the train split are hidden \(''\)"),
        ([None, "a", "b", "c"] * 5, Value("string"), "the train split has 5 images without a label, of 20"),
        ([None, 0, 1, 2] * 5, Value("int64"), "5 images without a label.*name another label_column"),
    ],
)
def test_some_hidden_labels_are_counted(labels, feature, message):
    with pytest.raises(ValueError, match=message) as error:
        load_data(labelled(labels, feature))
    assert "\n" not in str(error.value)


def test_hidden_labels_of_rows_that_are_not_selected_do_not_matter():
    data = load_data(labelled([0, 1] * 10 + [-1] * 5, Value("int64")), train_split="train[:20]")
    assert sum(map(len, data.values())) == 20


def test_labels_beyond_the_names_of_the_classes_are_refused(tmp_path):
    """Arrow stores any number in a column of classes."""
    split = labelled([0, 12] * 10, Value("int64"))
    table = split.with_format("arrow")[:]
    named = Dataset.from_dict({"image": [], "label": []}, features=Features(image=Image(decode=False), label=NAMED))
    split = Dataset(table, info=named.info)
    split.to_parquet(tmp_path / "train.parquet")
    for source in (split, tmp_path / "train.parquet"):
        with pytest.raises(ValueError, match="the train split has the label 12, but its column names 2 classes"):
            load_data(source)


@pytest.mark.parametrize("change", [lambda split: split, lambda split: split.shuffle(seed=1).select(range(3, 33))])
def test_a_column_is_put_beside_selected_rows(change):
    """The same as `datasets` gives, which copies every image for it."""
    split = change(labelled([0, 1, 1, 0] * 10, NAMED))
    values = [f"row {n}" for n in range(len(split))]
    beside = add_column(split, "more", values, Value("string"))
    expected = split.add_column("more", values)
    assert beside.column_names == expected.column_names and beside[:] == expected[:]
    assert beside.features["label"] == NAMED


def test_shuffled_names_keep_their_images():
    split = labelled(["owl", "cat", "bee"] * 20, Value("string")).shuffle(seed=2)
    for each in load_data(split).values():
        names = [["owl", "cat", "bee"][int(image["bytes"]) % 3] for image in each["image"]]
        assert [class_names(each)[label] for label in read_labels(each)] == names


def test_many_classes_are_numbered_alike(numbered):
    """3,000 classes, named in another order in the test split."""
    names = [f"class {n}" for n in range(3_000)]
    train = numbered(range(9_000), np.arange(9_000) % 3_000, names=names)
    test = numbered(range(9_000, 12_000), np.arange(3_000), names=names[::-1])
    data = load_data(DatasetDict(train=train, test=test))
    numbers = class_names(data["test"])
    assert [numbers[label] for label in data["test"]["label"]] == names[::-1]
