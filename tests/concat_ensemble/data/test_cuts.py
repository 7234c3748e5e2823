"""Cuts that keep copies and groups together, and that are what they were without these."""

from itertools import chain

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from concat_ensemble import load_data
from concat_ensemble.data.cuts import assign_units
from concat_ensemble.data.groups import number_units

KINDS = ("train", "validation", "test")


def numbers(split):
    return [int(image["bytes"]) for image in split["image"]]


def earlier_cut(rows, labels, size, seed):
    """The cut of version 0.1.0, by which its published numbers were measured."""
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    can_stratify = counts.min() >= 2 and min(size, 1 - size) * len(labels) >= len(counts)
    rest, part = train_test_split(
        np.arange(len(labels)), test_size=size, random_state=seed, stratify=labels if can_stratify else None
    )
    return np.sort(rest), np.sort(part)


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=30, max_size=80).filter(lambda labels: len(set(labels)) > 1),
    test_size=st.floats(0.2, 0.5),
    validation_size=st.floats(0.2, 0.5),
    seed=st.integers(0, 3),
    limit=st.sampled_from([None, 5, 15, 1000]),
)
def test_without_copies_and_groups_the_cut_is_what_it_was(numbered, labels, test_size, validation_size, seed, limit):
    labels = np.array([0, 0, 0, 1, 1, 1, *labels])  # so that a class is not gone after the cuts
    rest, test = earlier_cut(np.arange(len(labels)), labels, test_size, seed)
    train, validation = (rest[part] for part in earlier_cut(rest, labels[rest], validation_size, seed))
    expected = dict(zip(KINDS, (train, validation, test), strict=True))
    if limit is not None:
        for kind, rows in expected.items():
            if limit < len(rows):
                expected[kind] = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])]
    if len(set(labels[expected["train"]])) < 2:
        return
    split = numbered(range(len(labels)), labels)
    data = load_data(split, test_size=test_size, validation_size=validation_size, seed=seed, limit=limit)
    assert {kind: numbers(data[kind]) for kind in KINDS} == {kind: rows.tolist() for kind, rows in expected.items()}


def test_groups_of_one_image_do_not_change_the_cut(numbered):
    labels = [0, 1, 2] * 20
    plain = load_data(numbered(range(60), labels))
    grouped = load_data(numbered(range(60), labels, group=list(range(60))), group_column="patient")
    assert {kind: numbers(split) for kind, split in plain.items()} == {
        kind: numbers(split) for kind, split in grouped.items()
    }


@st.composite
def rows_with_copies_and_groups(draw):
    """(image, label, group) of each row: copies may have several labels and stand in several groups."""
    size = draw(st.integers(40, 100))
    images = draw(st.lists(st.integers(0, 60), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    groups = [f"g{image // draw(st.integers(2, 4))}" for image in images]
    return images, [0, 1, 2, *labels[3:]], groups


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_with_copies_and_groups(),
    grouped=st.booleans(),
    seed=st.integers(0, 3),
    limit=st.sampled_from([None, None, 10]),
    shots=st.sampled_from([None, None, 4]),
)
def test_no_cut_separates_copies_or_groups_and_every_row_is_in_one_split(numbered, rows, grouped, seed, limit, shots):
    images, labels, groups = rows
    places = numbered(images, labels, group=groups)
    arguments = {"group_column": "patient"} if grouped else {}
    try:
        data, again = (load_data(places, **arguments, limit=limit, shots=shots, seed=seed) for _ in range(2))
    except ValueError as error:
        assert any(reason in str(error) for reason in ("cannot cut", "one class", "shots=4", "is empty")), error
        return
    for column in ["image", *["group"] * grouped]:
        values = [{str(value) for value in split[column]} for split in data.values()]
        assert sum(map(len, values)) == len(set().union(*values)), f"{column} on both sides"
    assert {k: numbers(split) for k, split in data.items()} == {k: numbers(split) for k, split in again.items()}
    if limit is None and shots is None:
        assert sorted(chain(*(numbers(split) for split in data.values()))) == sorted(images)
        for split in data.values():
            assert set(zip(numbers(split), split["label"], strict=True)) <= set(zip(images, labels, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=6),
    largest=st.integers(2, 5),
    size=st.sampled_from([0.1, 0.2, 0.5]),
    seed=st.integers(0, 3),
)
def test_cuts_by_unit_are_stratified_as_far_as_units_allow(counts, largest, size, seed):
    """Units of one class each, of 1 to `largest` rows: each class and the whole are off by less than two of them."""
    rng = np.random.default_rng(seed)
    unit_sizes = [(label, rng.integers(1, largest + 1)) for label, count in enumerate(counts) for _ in range(count)]
    units = np.repeat(np.arange(len(unit_sizes)), [rows for _, rows in unit_sizes])
    labels = np.repeat([label for label, _ in unit_sizes], [rows for _, rows in unit_sizes])
    shuffle = rng.permutation(len(units))
    units, labels = units[shuffle], labels[shuffle]
    side = assign_units(units, labels, size, seed)
    assert all(len(set(side[units == unit])) == 1 for unit in np.unique(units))
    excess = np.bincount(labels, weights=side) - size * np.bincount(labels)
    assert np.abs(excess).max() <= 2 * largest and abs(side.sum() - size * len(side)) <= 2 * largest


def test_patients_with_several_classes_are_shared_out_evenly():
    """100 patients with 5 to 30 images of 3 classes: a fifth of each class within a tenth of it."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(100), rng.integers(5, 31, 100))
    labels = (rng.random(len(units)) + 0.5 * rng.random(100)[units]) // 0.5
    labels = labels.astype(int)
    shares = []
    for seed in range(10):
        side = assign_units(units, labels, 0.2, seed)
        shares.append(np.bincount(labels, weights=side) / np.bincount(labels))
    assert np.abs(np.array(shares) - 0.2).max() < 0.02
    assert len({tuple(share) for share in shares}) > 5, "other seeds cut elsewhere"


def test_small_classes_do_not_keep_everything_on_one_side():
    """Each of 200 classes has two units: alone, none would give one of them for a fifth."""
    units = np.arange(400)
    side = assign_units(units, np.arange(400) // 2, 0.2, 0)
    assert abs(side.sum() - 80) <= 2


def test_large_units_go_to_both_sides():
    """Not all to the part, which would be filled with them first."""
    units = np.repeat(np.arange(60), [50] * 10 + [1] * 50)
    side = assign_units(units, np.zeros(len(units), dtype=int), 0.5, 0)
    assert np.unique(units[side][units[side] < 10]).size == 5


def test_units_that_share_an_image_are_one(numbered):
    split = numbered([1, 2, 2, 3, 4, 5], [0, 1] * 3, group=["a", "a", "b", "b", "c", "d"])
    split = split.rename_column("patient", "group")
    assert number_units(split, copies=True).tolist() == [0, 0, 0, 0, 1, 2]
    assert number_units(split, copies=False).tolist() == [0, 0, 1, 1, 2, 3]
    assert number_units(split.remove_columns("group"), copies=True).tolist() == [0, 1, 1, 2, 3, 4]
    assert number_units(split.remove_columns("group"), copies=False) is None


def test_copies_of_one_image_cannot_be_cut(numbered):
    with pytest.raises(ValueError, match=r"cannot cut test_size=0\.5 off 20 images: they all are copies of one image"):
        load_data(numbered([7] * 20, [0, 1] * 10))
    grouped = numbered(range(20), [0, 1] * 10, group=["one"] * 20)
    with pytest.raises(ValueError, match="they all belong together by their groups; name another split"):
        load_data(grouped, group_column="patient")


def test_a_limit_leaves_out_copies_that_a_cut_of_rows_separated(numbered):
    """200 images twice each, of which 40 are used in each split."""
    data = load_data(numbered([*range(200)] * 2, [0, 1] * 200), limit=40)
    used = [set(numbers(split)) for split in data.values()]
    assert sum(map(len, used)) == len(set().union(*used))
    assert len(data["train"]) == 40 and all(20 < len(data[kind]) <= 40 for kind in ("validation", "test"))


def test_given_splits_are_not_compared_by_load_data(numbered):
    """That is what an audit is for."""
    split = numbered(range(20), [0, 1] * 10)
    data = load_data(DatasetDict(train=split, validation=split, test=split))
    assert all(len(each) == 20 for each in data.values())


def test_for_training_copies_may_be_in_validation(numbered):
    """Their images are not read; the rows are those of version 0.1.0."""
    split = numbered([*range(50)] * 2, [0, 1] * 50)
    data = load_data(DatasetDict(train=split, test=numbered(range(60, 80), [0, 1] * 10)), for_training=True)
    assert set(data) == {"train", "validation"}
    assert set(numbers(data["train"])) & set(numbers(data["validation"]))


def test_few_shots_of_each_class_in_linear_time(numbered):
    """40,000 rows of 1,000 classes with copies and groups pass through every step."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 38_000, 40_000)
    split = numbered(images.tolist(), (np.arange(40_000) % 1_000).tolist(), group=(images // 4).tolist())
    data = load_data(split, group_column="patient", classes=range(1, 1_000), shots=4)
    counts = sum(np.bincount(data[kind]["label"], minlength=999) for kind in ("train", "validation"))
    assert (counts == 4).all()
    groups = [set(each["group"]) for each in data.values()]
    assert not groups[0] & groups[2] and not groups[1] & groups[2] and not groups[0] & groups[1]


# --- the column of groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "feature", "expected"),
    [
        (["a", "b"] * 10, Value("string"), {"a", "b"}),
        ([3, 4] * 10, Value("int32"), {3, 4}),
        ([True, False] * 10, Value("bool"), {"True", "False"}),
        ([0, 1] * 10, ClassLabel(names=["left", "right"]), {"left", "right"}),
    ],
)
def test_groups_may_be_text_numbers_or_named(numbered, groups, feature, expected):
    split = numbered(range(20), [0, 0, 1, 1] * 5).add_column("patient", groups, feature=feature)
    splits = DatasetDict(train=split, validation=split, test=split)
    data = load_data(splits, group_column="patient")
    assert data["test"].column_names == ["image", "label", "group"]
    assert set(data["test"]["group"]) == expected


def test_groups_of_numbers_and_of_texts_are_compared_as_texts(numbered):
    train = numbered(range(20), [0, 1] * 10, group=[7] * 20)
    test = numbered(range(20, 40), [0, 1] * 10, group=["7"] * 20)
    data = load_data(DatasetDict(train=train, validation=train, test=test), group_column="patient")
    assert set(data["train"]["group"]) == set(data["test"]["group"]) == {"7"}


@pytest.mark.parametrize(
    ("groups", "feature", "message"),
    [
        (["a", None, "b", " "] * 5, Value("string"), "10 of 20 images of the train split have no group"),
        ([1, None] * 10, Value("int64"), "10 of 20 images of the train split have no group.*fill them in"),
        ([0, -1] * 10, ClassLabel(names=["a"]), "10 of 20 images of the train split have no group"),
        (
            [0.5, 1.0] * 10,
            Value("float64"),
            r"groups of the train split .*'patient'.* are float64; they must be",
        ),
    ],
)
def test_images_without_a_group_are_refused(numbered, groups, feature, message):
    split = numbered(range(20), [0, 1] * 10).add_column("patient", groups, feature=feature)
    with pytest.raises(ValueError, match=message):
        load_data(split, group_column="patient")


def test_a_column_of_groups_that_is_not_there_or_has_another_role_is_refused(numbered):
    split = numbered(range(20), [0, 1] * 10)
    with pytest.raises(ValueError, match="the train split has no column 'patient'; it has image, label"):
        load_data(split, group_column="patient")
    with pytest.raises(ValueError, match="label_column and group_column are both 'label'"):
        load_data(split, group_column="label")


def test_a_class_of_one_group_is_on_one_side(numbered):
    labels = [0, 1] * 20 + [2] * 10
    groups = [n // 4 for n in range(40)] + [99] * 10
    data = load_data(numbered(range(50), labels, group=groups), group_column="patient")
    assert sum(2 in split["label"][:] for split in data.values()) == 1
