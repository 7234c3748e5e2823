"""What an audit finds, what it leaves out, and what it says."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from concat_ensemble import extract_features, load_data
from concat_ensemble.data.audit import Audit, audit_splits, is_imbalanced
from concat_ensemble.data.images import image_hashes, with_hashes
from concat_ensemble.data.options import DatasetOptions


def numbers(split):
    return [int(image["bytes"]) for image in split["image"]]


def audited(train, validation, test):
    return audit_splits(load_data(DatasetDict(train=train, validation=validation, test=test)))


@pytest.fixture
def leaking(numbered):
    """40 of 100 test images are in training, 10 others in validation, and 5 of 20 validation images in training."""
    return audited(
        numbered(range(100), [0, 1] * 50),
        numbered([*range(5), *range(200, 215)], [0, 1] * 10),
        numbered([*range(60, 100), *range(205, 215), *range(300, 350)], [0, 1] * 50),
    )


def test_test_images_that_are_also_in_training_or_validation_are_left_out_and_counted(leaking):
    data, audit = leaking
    assert numbers(data["test"]) == list(range(300, 350))
    assert numbers(data["validation"]) == list(range(200, 215))
    assert len(data["train"]) == 100
    assert audit.duplicates_across == {"train/validation": 5, "train/test": 40, "validation/test": 10}
    assert (audit.removed_from_test, audit.removed_from_validation) == (50, 5)
    assert audit.num_images == {"train": 100, "validation": 15, "test": 50}
    assert audit.sentences() == [
        "40 of 100 test images are also in training.",
        "10 of 100 test images are also in validation; 50 of 100 images are left out of the score for that.",
        "5 of 20 validation images are also in training; they are not used to choose the regularization.",
    ]


def test_one_leak_is_one_sentence(numbered):
    train, validation = numbered(range(20), [0, 1] * 10), numbered(range(20, 40), [0, 1] * 10)
    _, audit = audited(train, validation, numbered([0, *range(40, 59)], [0, 1] * 10))
    assert audit.sentences() == ["1 of 20 test images is also in training; it is left out of the score."]


def test_clean_data_has_nothing_to_say(numbered):
    data, audit = audited(*(numbered(range(start, start + 20), [0, 1] * 10) for start in (0, 20, 40)))
    assert audit.sentences() == [] and not audit.imbalanced and audit.groups is None
    assert audit.classes == {name: dict.fromkeys(("train", "validation", "test"), 10) for name in ("c0", "c1")}
    assert {kind: len(split) for kind, split in data.items()} == audit.num_images


def test_a_test_split_that_is_a_copy_of_random_training_rows_is_refused(numbered):
    """Such a split gave untrained networks 16 points above their best member."""
    split = numbered(range(60), np.random.default_rng(0).integers(0, 2, 60))
    data = load_data(DatasetDict(train=split, test=split))
    with pytest.raises(ValueError, match="all 60 test images are copies of images of the training") as error:
        audit_splits(data)
    assert "test_split='train" in str(error.value) and "\n" not in str(error.value)


def test_a_validation_split_that_is_a_copy_is_refused(numbered):
    split = numbered(range(60), [0, 1] * 30)
    with pytest.raises(ValueError, match="all 60 validation images are copies of images of the training split"):
        audited(split, split, numbered(range(60, 80), [0, 1] * 10))


def test_copies_within_a_split_and_conflicting_labels_are_counted(numbered):
    train = numbered([0, 1, 1, 2, 2, 2, *range(3, 17)], [0, 1, 1, 0, 1, 1] + [0, 1] * 7)
    _, audit = audited(train, numbered(range(20, 40), [0, 1] * 10), numbered([40, *range(40, 59)], [0, 1] * 10))
    assert audit.duplicates_within == {"train": 3, "validation": 0, "test": 1}
    assert audit.conflicting_labels == 2, "2 in training and 40 in the test split"
    assert audit.sentences() == [
        "2 images stand in the data with different labels; at most one label of each is right.",
        "3 images repeat an earlier image of the training split; they count several times.",
        "1 image repeats an earlier image of the test split; it counts several times.",
    ]


def test_imbalance_is_said_with_the_majoritys_share(numbered):
    train = numbered(range(100), [0] * 97 + [1] * 3, names=["ok", "broken"])
    others = [numbered(range(n, n + 20), [0, 1] * 10, names=["ok", "broken"]) for n in (100, 120)]
    _, audit = audited(train, *others)
    assert audit.imbalanced and audit.majority_class == "ok" and audit.majority_share == 0.97
    (sentence,) = audit.sentences()
    assert sentence == (
        "class 'ok' has 97.0% of the training images, over two thirds (even: 50.0%): top-1 misleads; read "
        "mean-per-class recall."
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([97, 3], True),
        ([67, 33], True),
        ([66, 34], False),
        ([50, 50], False),
        ([21] + [79 / 9] * 9, True),  # 10 classes: an even share is 10%
        ([19] + [9] * 9, False),
        ([40, 0, 20, 0], False),  # of two classes that are there
        ([8, 1, 1], True),
        ([3] + [1] * 500, False),  # chance
        ([], False),
    ],
)
def test_imbalance_is_over_twice_the_even_share_or_two_thirds_of_two_classes(counts, expected):
    assert is_imbalanced(counts) == expected


def test_classes_with_few_images_and_missing_classes_are_named(numbered):
    train = numbered(range(34), [0] * 15 + [1] * 15 + [2] * 4, names=[*"abcd"])
    validation = numbered(range(100, 120), [0, 1] * 10, names=[*"abcd"])
    _, audit = audited(train, validation, numbered(range(200, 223), [0] * 10 + [1] * 10 + [3] * 3, names=[*"abcd"]))
    assert audit.few_images == ["c", "d"]
    assert audit.missing_classes == {"train": ["d"], "validation": ["c", "d"], "test": ["c"]}
    assert audit.sentences() == [
        "class d has no images in the train split.",
        "2 of 4 classes (c, d) have no images in the validation split.",
        "class c has no images in the test split.",
        "2 of 4 classes (c, d) have fewer than 5 images to train or to test on; read their recall with care.",
    ]


def test_rows_without_an_image_at_the_same_places_are_no_copies(numbered):
    """Rows without an image, at the same places of several splits."""
    splits = [numbered(range(start, start + 20), [0, 1] * 10) for start in (0, 100, 200)]
    splits = [
        Dataset.from_dict(
            {"image": [None, None, *split["image"][2:]], "label": split["label"]}, features=split.features
        )
        for split in splits
    ]
    data, audit = audited(*splits)
    assert audit.sentences() == [] and [len(split) for split in data.values()] == [20, 20, 20]
    assert [len(split) for split in load_data(splits[0], validation_size=0.5).values()] == [5, 5, 10]


def test_repetitions_are_those_that_are_scored(numbered):
    train, validation = numbered(range(20), [0, 1] * 10), numbered(range(100, 120), [0, 1] * 10)
    test = numbered([0, 0, 0, *range(200, 217)], [0, 1] * 10)
    _, audit = audited(train, validation, test)
    assert audit.removed_from_test == 3 and audit.duplicates_within["test"] == 0


def test_a_cut_of_a_balanced_dataset_is_not_called_imbalanced(numbered):
    """Six labelled images, of which the validation cut takes two of one class; and a test split of one class."""
    train, validation = numbered(range(4), [0, 0, 0, 1]), numbered(range(10, 12), [1, 1])
    _, audit = audited(train, validation, numbered(range(20, 40), [0, 1] * 10))
    assert not audit.imbalanced and not any("misleads" in sentence for sentence in audit.sentences())
    assert not is_imbalanced([0, 30])


@pytest.mark.parametrize("seed", range(30))
def test_six_images_leave_two_classes_to_train_on(numbered, seed):
    data = load_data(numbered(range(6), [0, 0, 0, 1, 1, 1]), seed=seed)
    assert set(data["train"]["label"]) == {0, 1} and sum(map(len, data.values())) == 6


@pytest.mark.parametrize("keep", [range(30), range(5, 25)])
def test_selected_rows_that_follow_each_other_are_audited(numbered, keep, tmp_path):
    """`filter` leaves row numbers that `Dataset.select` does not take as they are."""
    split = numbered(range(30), [0, 1] * 15).filter(lambda label: True, input_columns="label").select(keep)
    _, audit = audit_splits(load_data(split.filter(lambda label: label < 2, input_columns="label")))
    assert sum(audit.num_images.values()) == len(keep)


def test_a_class_without_any_image_is_named_once(numbered):
    """As in a cut of some digits that keeps the names of all."""
    splits = [numbered(range(start, start + 20), [0, 1] * 10, names=[*"abcd"]) for start in (0, 100, 200)]
    _, audit = audited(*splits)
    assert audit.missing_classes == {"train": ["c", "d"], "validation": ["c", "d"], "test": ["c", "d"]}
    assert audit.sentences() == ["2 of 4 classes (c, d) have no images in any split."]


def test_test_images_of_training_groups_are_left_out(numbered):
    train = numbered(range(20), [0, 1] * 10, group=[f"p{n // 4}" for n in range(20)])
    validation = numbered(range(20, 40), [0, 1] * 10, group=[f"q{n // 4}" for n in range(20)])
    test = numbered(range(40, 60), [0, 1] * 10, group=["p1"] * 4 + ["q2"] * 2 + [f"r{n // 7}" for n in range(14)])
    splits = DatasetDict(train=train, validation=validation, test=test)
    data, audit = audit_splits(load_data(splits, group_column="patient"))
    assert set(data["test"]["group"]) == {"r0", "r1"} and audit.removed_from_test == 6
    assert audit.groups == {"train": 5, "validation": 5, "test": 2}
    assert audit.groups_across == {"train/validation": 0, "train/test": 1, "validation/test": 1}
    assert audit.sentences() == [
        "1 group has images both in training and in the test split.",
        "1 group has images both in validation and in the test split; 6 of 20 images are left out of the score for "
        "that.",
    ]
    alone = DatasetDict(train=train, validation=validation, test=test.select(range(6)))
    with pytest.raises(
        ValueError, match="all 6 test images share an image or a group with the training or validation"
    ):
        audit_splits(load_data(alone, group_column="patient"))


def test_scattered_copies_of_an_image_are_copies(images, tmp_path):
    """Their canvases are the same in every split."""
    pool = images(["a", "b"] * 20)
    pool.select(range(30)).to_parquet(tmp_path / "train.parquet")
    pool.select(range(24, 40)).to_parquet(tmp_path / "test.parquet")
    options = DatasetOptions(name=f"scattered:{tmp_path}")
    data, audit = options.load()
    assert audit.duplicates_across["train/test"] + audit.duplicates_across["validation/test"] == 6
    assert len(data["test"]) == 10


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_image_is_left_on_both_sides_and_no_other_is_lost(numbered, data):
    drawn = {
        kind: data.draw(st.lists(st.integers(0, 30), min_size=4, max_size=25))
        for kind in ("train", "validation", "test")
    }
    splits = DatasetDict(
        {kind: numbered(rows, [row % 2 for row in rows], names=["a", "b"]) for kind, rows in drawn.items()}
    )
    train, validation = set(drawn["train"]), set(drawn["validation"])
    kept = {
        "train": drawn["train"],
        "validation": [row for row in drawn["validation"] if row not in train],
        "test": [row for row in drawn["test"] if row not in train | validation],
    }
    if not all(kept.values()):
        with pytest.raises(ValueError, match="none is left"):
            audit_splits(splits)
        return
    result = audit_splits(splits)
    assert {kind: numbers(split) for kind, split in result.data.items()} == kept
    assert result.audit.removed_from_test == len(drawn["test"]) - len(kept["test"])
    assert Audit.from_dict(json.loads(json.dumps(result.audit.to_dict()))) == result.audit


def test_what_a_later_version_writes_is_read():
    assert Audit.from_dict({"removed_from_test": 3, "of_a_later_version": 1}).removed_from_test == 3


def test_unreadable_images_are_said():
    assert Audit(unreadable={"train": 2, "test": 1}).sentences() == [
        "2 images of the training split cannot be read; they are left out.",
        "1 image of the test split cannot be read; it is left out.",
    ]


def test_options_load_the_audited_data_with_their_hashes(tmp_path, numbered):
    for kind, rows in (("train", range(40)), ("test", range(30, 50))):
        numbered(rows, [0, 1] * (len(rows) // 2)).to_parquet(tmp_path / f"{kind}.parquet")
    options = DatasetOptions(name=str(tmp_path))
    data, audit = options.load()
    assert numbers(data["test"]) == list(range(40, 50)) and audit.removed_from_test == 10
    assert all("image_hash" in split.column_names for split in data.values())
    assert options.describe(options.load())["test_images"] == 10
    assert load_data(tmp_path)["train"].column_names == ["image", "label"]


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_the_kept_hashes_are_used_and_stale_ones_are_not(numbered):
    split = numbered(range(30), [0, 1] * 15)
    kept = with_hashes(split)
    assert image_hashes(kept) == image_hashes(split) == list(kept["image_hash"])
    assert with_hashes(kept) is kept
    other = kept.map(lambda row: {"image": {"bytes": row["image"]["bytes"] + b"x", "path": None}})
    assert set(image_hashes(other)).isdisjoint(image_hashes(split))


def test_hashes_stay_with_their_images_in_a_shuffled_split(numbered):
    split = numbered(range(50), [0, 1] * 25).shuffle(seed=3).select(range(5, 45))
    kept = with_hashes(split)
    assert numbers(kept) == numbers(split) and image_hashes(kept) == image_hashes(split)
    assert kept["label"][:] == split["label"][:]


def test_missing_images_are_no_copies_of_each_other(numbered):
    rows = [
        {"bytes": None, "path": None},
        {"bytes": None, "path": "/nonesuch.png"},
        None,
        {"bytes": b"0", "path": None},
    ]
    split = (
        numbered(range(4), [0, 1, 0, 1]).remove_columns("image").add_column("image", rows, feature=Image(decode=False))
    )
    assert len(set(image_hashes(split))) == 4


def test_extraction_reads_kept_hashes(ensemble, digits, tmp_path):
    """The rows of the table are those of the same images without the column."""
    plain = extract_features(ensemble, digits, store=tmp_path, quiet=True)
    again = extract_features(ensemble, audit_splits(digits).data, store=tmp_path, quiet=True)
    assert plain.extracted == 90 and again.extracted == 0
    (expected, _), (features, _) = plain["test"], again["test"]
    np.testing.assert_array_equal(features, expected)


def test_a_file_and_its_bytes_are_one_image(tmp_path, numbered):
    PILImage.new("L", (4, 4), 7).save(tmp_path / "a.png")
    rows = [
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
    ]
    split = numbered(range(2), [0, 1]).remove_columns("image").add_column("image", rows, feature=Image(decode=False))
    first, second = image_hashes(split)
    assert first == second
