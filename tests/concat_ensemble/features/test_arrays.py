"""Tables of one's own features: what goes in comes out, what cannot be is named, and every probe takes it."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from concat_ensemble import KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe
from concat_ensemble.features.arrays import read_labels
from concat_ensemble.features.table import FeatureTable, TableSplit, row_hashes
from concat_ensemble.studies.cost import feature_costs
from concat_ensemble.studies.overlap import measure_overlap
from concat_ensemble.studies.selection import select_members

RNG = np.random.default_rng(0)
NAMES = np.array(["cat", "dog", "owl"])
y = NAMES[np.arange(60) % 3]
X = RNG.normal(size=(60, 4)) + (np.arange(60) % 3)[:, None] * [3, 0, 0, 0]
MORE = RNG.normal(size=(60, 2)).astype(np.float32)


def make(train=(X, y), members=None, **settings):
    return FeatureTable.from_arrays({"train": train}, members, **settings)


@given(
    st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_, ">f8", ">f4"]),
    st.sampled_from([np.asarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]]),
    st.data(),
)
def test_features_come_back_in_their_precision(dtype, layout, data):
    values = data.draw(
        hnp.arrays(
            dtype,
            (5, 3),
            elements={"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whole numbers beyond float32
        table = make((layout(values), list("ababa")))
    expected = np.float32 if np.dtype(dtype).kind != "f" else np.dtype(dtype).newbyteorder("=")
    assert table["train"].dtype == expected and table["train"].dtype.isnative
    assert np.array_equal(np.asarray(table["train"], dtype=np.float64), values.astype(expected).astype(np.float64))


def test_arrays_of_every_kind_make_the_same_table(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcd"))
    columns = frame.assign(label=y)
    columns.to_parquet(tmp_path / "own.parquet")
    lists = Dataset.from_dict({"features": X.tolist(), "label": y.tolist()})
    lists.to_parquet(tmp_path / "lists.parquet")
    frame.index = range(60, 0, -1)  # rows go by their order
    for train in [
        (X, y),
        [X, list(y)],
        (X.tolist(), pd.Series(y)),
        (torch.tensor(X, requires_grad=True), pd.Categorical(y)),
        (frame, pd.DataFrame({"animal": y})),
        (frame, pd.Series(y, dtype="string")),
        ({"own": X}, y),
        ([X], y[:, None]),
        columns,
        tmp_path / "own.parquet",
        str(tmp_path / "lists.parquet"),
        lists,
        lists.to_pandas(),
        Dataset.from_pandas(columns).select(range(59, -1, -1)).select(range(59, -1, -1)),
    ]:
        table = make(train)
        features, labels = table["train"]
        assert np.array_equal(features, X) and features.dtype == np.float64
        assert table.class_names == ["cat", "dog", "owl"] and np.array_equal(labels, np.arange(60) % 3)
        assert labels.dtype == np.int64


def test_several_members_by_list_by_name_and_by_column():
    frame = pd.DataFrame(np.hstack([X, MORE]), columns=[*"abcdef"]).assign(label=y, name="photo.jpg")
    lists = Dataset.from_dict({"label": y, "vit": MORE.tolist(), "resnet": X.tolist(), "name": y}).cast_column(
        "vit", List(Value("float32"), length=2)
    )
    for train, members in [
        (([X, MORE], y), ["resnet", "vit"]),
        (({"resnet": X, "vit": MORE}, y), None),
        (({"vit": MORE, "resnet": X}, y), ["resnet", "vit"]),
        (frame, {"resnet": ["a", "b", "c", "d"], "vit": ["e", "f"]}),
        (lists, ["resnet", "vit"]),
        (lists, {"resnet": "resnet", "vit": ["vit"]}),
    ]:
        table = make(train, members)
        assert table.member_names == ["resnet", "vit"] and table.feature_dims == [4, 2]
        assert np.allclose(table["train"], np.hstack([X, MORE]), atol=1e-7)
        assert table.members([1]).member_names == ["vit"] and table.members([1])["train"].shape == (60, 2)
    assert make(lists).member_names == ["vit", "resnet"], "every column of lists is a member"


def test_a_probe_of_one_member_refuses_another():
    table = make(({"resnet": X, "vit": X[:, ::-1]}, y))
    probe = RidgeProbe().fit(table.members([0])["train"])
    with pytest.raises(ValueError, match=r"4 features of members vit, .* 4 of resnet"):
        probe.score(table.members([1])["train"])
    assert probe.score(X, table["train"].labels) > 0.5, "an array has no names"


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([3, 7, 7], ["3", "7"], [0, 1, 1]),
        ([2.0, 10.0, 2.0], ["2", "10"], [0, 1, 0]),
        ([1, -1, 1], ["-1", "1"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["10", "9", "10"], ["10", "9"], [0, 1, 0]),
        (pd.Series([5, 6, 5], dtype="Int64"), ["5", "6"], [0, 1, 0]),
        (torch.tensor([4, 4, 9]), ["4", "9"], [0, 0, 1]),
        (np.array(["b", "a", "b"], dtype=object), ["a", "b"], [1, 0, 1]),
    ],
)
def test_labels_of_every_kind_become_class_numbers(labels, names, numbers):
    table = make((X[:3], labels))
    assert table.class_names == names and table.labels["train"].tolist() == numbers


def test_classes_are_numbered_alike_in_all_splits():
    table = FeatureTable.from_arrays(
        {"train": (X[:3], ["b", "c", "b"]), "test": (MORE[:3].repeat(2, 1), ["a", "c", "b"])}
    )
    assert table.class_names == ["a", "b", "c"] and table.labels["test"].tolist() == [0, 2, 1]
    named = make((X[:3], [2, 0, 2]), class_names=["x", "y", "z"])
    assert named.class_names == ["x", "y", "z"] and named.labels["train"].tolist() == [2, 0, 2]
    assert make((X[:2], ["z", "x"]), class_names=["z", "y", "x"]).labels["train"].tolist() == [0, 2]
    features = Features({"f": List(Value("float32")), "label": ClassLabel(names=["n", "m"])})
    data = Dataset.from_dict({"f": MORE[:2].tolist(), "label": [1, 0]}, features=features)
    assert make(data).class_names == ["n", "m"] and make(data).labels["train"].tolist() == [1, 0]


NAN = X.copy()
NAN[17, 2] = np.nan
HIDDEN = Dataset.from_dict(
    {"f": MORE[:2].tolist(), "label": [1, -1]},
    features=Features({"f": List(Value("float32")), "label": ClassLabel(names=["n", "m"])}),
)
REFUSED = {
    "nan": ((NAN, y), "the train split: row 17 of member 0 holds NaN"),
    "nan of a named member": (({"vit": MORE, "resnet": NAN}, y), "row 17 of resnet holds NaN"),
    "infinity": ((np.where(NAN == NAN, X, np.inf), y), "row 17 .*infinity"),
    "nan in a frame": (pd.DataFrame(NAN).assign(label=y), "row 17"),
    "missing whole number": (pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "label": ["x", "y"]}), "row 1"),
    "objects": ((X.astype(object), y), "dtype object"),
    "texts": ((y[:, None], y), "dtype <U3"),
    "complex": ((X.astype(complex), y), "dtype complex128"),
    "ragged": (([[1.0], [1.0, 2.0]], ["a", "b"]), "not an array"),
    "sparse": ((sparse.csr_matrix(X), y), "sparse matrix .*toarray"),
    "one feature": ((X[:, 0], y), r"shape \(60,\).*reshape\(-1, 1\)"),
    "images": ((X.reshape(60, 2, 2), y), r"shape \(60, 2, 2\).*pool or flatten"),
    "no rows": ((X[:0], y[:0]), r"shape \(0, 4\)"),
    "no features": ((X[:, :0], y), r"shape \(60, 0\)"),
    "lengths": ((X, y[:59]), "the train split: member 0 has 60 rows for 59 labels"),
    "lengths of members": (([X, MORE[:9]], y), "member 1 has 9 rows for 60 labels"),
    "label nan": ((X, np.where(np.arange(60) == 5, np.nan, 1.0)), "row 5 has no label"),
    "label none": ((X, [*y[:5], None, *y[6:]]), "row 5 has no label"),
    "labels that int64 does not hold": ((X, np.arange(60) * 1e300), "y holds 1e.300; class numbers must"),
    "unsigned labels that int64 does not hold": ((X, np.arange(60).astype(np.uint64) + 2**63), "must be at most 2.53"),
    "label nan among texts": ((X, [*y[:5], float("nan"), *y[6:]]), "row 5 has no label"),
    "label NA": ((X, pd.Series([1] * 5 + [None] + [2] * 54, dtype="Int64")), "row 5 has no label"),
    "label empty": ((X, np.where(np.arange(60) == 5, "", y)), "row 5 has no label"),
    "label hidden": ((X, np.where(np.arange(60) == 5, -1, np.arange(60) % 3)), "label -1 marks rows"),
    "label hidden in ClassLabel": (HIDDEN, "label -1 is hidden"),
    "fractions": ((X, np.arange(60) / 7), "y holds 0.14.*whole numbers"),
    "mixed labels": ((X, [*y[:59], 3]), "texts and numbers"),
    "several labels": ((X, [["cat"], ["cat", "dog"]] * 30), r"row 0 has several labels, \['cat'\]; .*one table"),
    "one-hot": ((X, np.eye(3)[np.arange(60) % 3]), r"\(60, 3\).*argmax"),
    "dates": ((X, pd.to_datetime(["2020-01-01"] * 60)), "y holds"),
    "dates in nanoseconds": ((X, np.array(["2020-01-01"] * 60, "datetime64[ns]")), "y holds 2020-01-01"),
    "durations": ((X, np.arange(60).astype("timedelta64[ns]")), "y holds 0 nanoseconds"),
    "array alone": (X, "it is a ndarray; give"),
    "four parts": ((X, y, y, y), "4 parts"),
    "no label column": (pd.DataFrame(X, columns=list("abcd")), "no column 'label' among a, b, c, d"),
    "texts in a frame": (pd.DataFrame(X).assign(label=y, name="x"), "column 'name' holds .*leave it out"),
    "two lengths": (Dataset.from_dict({"f": [[1.0], [1.0, 2.0]], "label": [0, 1]}), "'f' has lists of lengths 1, 2"),
    "missing list": (Dataset.from_dict({"f": [[1.0], None], "label": [0, 1]}), "'f' has lists of lengths 1, None"),
    "no file": ("nonesuch.parquet", "cannot be read: .*nonesuch"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_feature_or_label_is_named(case):
    train, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as error:
        make(train)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("splits", "settings", "said"),
    [
        ((X, y), {}, "splits must be a dict"),
        ({"test": (X, y)}, {}, 'dict with "train"'),
        ({"train": (X, y), "val": (X, y)}, {}, "'val' must be one of train, validation, test"),
        ({"train": (X, y), "tests": (X, y)}, {}, "did you mean test"),
        ({"train": (X, y), "test": (X[:, :2], y)}, {}, r"the test split has the members \{'member 0': 2\}"),
        ({"train": ({"a": X}, y), "test": ({"b": X}, y)}, {}, "the test split has the members {'b': 4}"),
        ({"train": (X, y), "test": (X, [0] * 60)}, {}, "the test split has other labels than train: 0, and 'cat'"),
        ({"train": (X, y), "test": (NAN, y)}, {}, "the test split: row 17"),
        ({"train": ([X, MORE], y)}, {"members": ["one"]}, "must be 2 different names"),
        ({"train": ([X, MORE], y)}, {"members": ["one", "one"]}, "must be 2 different names"),
        ({"train": (X, y)}, {"members": "resnet"}, "must be 1 different names"),
        ({"train": ({"a": X}, y)}, {"members": ["b"]}, "names others"),
        ({"train": (X, y)}, {"groups": {"train": [1, 2]}}, "groups has 2 entries for 60 rows"),
        ({"train": (X, y, y), "test": (X, y)}, {}, "for some splits only"),
        ({"train": (X, y)}, {"class_names": ["cat", "dog"]}, "labels owl are not among class_names"),
        ({"train": (X, y)}, {"class_names": ["cat", "dog", "owl", "cat"]}, "a name twice"),
        ({"train": (X, [0, 3] * 30)}, {"class_names": ["a", "b"]}, "label 3 is hidden or has no name: 2"),
        ({"train": (X, y), "test": (X, y)}, {"test_size": 0.2}, "there is a test split already"),
        ({"train": (X, y)}, {"test_size": 1.5}, "between 0 and 1"),
        ({"train": pd.DataFrame(X).assign(label=y)}, {"group_column": "patient"}, "no column 'patient'"),
        ({"train": pd.DataFrame(X).assign(label=y)}, {"members": {"a": ["9"]}}, "no column '9'"),
    ],
)  # fmt: skip
def test_splits_that_do_not_go_together_are_named(splits, settings, said):
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        FeatureTable.from_arrays(splits, **settings)


def test_numpy_and_scikit_learn_take_a_split():
    table = make(([X.astype(np.float32), MORE], y))
    split = table["train"]
    assert np.array_equal(np.asarray(split), np.hstack([X.astype(np.float32), MORE])) and len(split) == 60
    assert np.asarray(split, dtype=np.float64).dtype == np.float64 and split.shape == np.shape(split) == (60, 6)
    ours = LogisticRegression().fit(split, split.labels).coef_
    assert np.array_equal(ours, LogisticRegression().fit(np.hstack([X.astype(np.float32), MORE]), split.labels).coef_)
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(split, copy=False)
    one = make()["train"]
    assert np.shares_memory(np.asarray(one), X) and not np.shares_memory(np.array(one, copy=True), X)
    assert np.shares_memory(np.asarray(one, copy=False), X)


def test_a_file_mapped_into_memory_is_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(make((mapped, y))["train"].blocks[0], mapped)


def test_they_are_readable():
    table = make(({"resnet": X, "vit": MORE}, y, np.arange(60) // 2), test_size=0.5)
    assert repr(table) == (
        "FeatureTable(\n  train: 30 rows\n  test: 30 rows\n  members: resnet (4), vit (2)\n"
        "  classes: 3 (cat, dog, owl)\n  groups: 30\n)"
    )
    assert repr(make()["train"]) == "TableSplit(60 rows, 4 features float64, member 0 (4), 3 classes)"
    assert table.shape == {"train": (30, 6), "test": (30, 6)} and len(table) == 2 and list(table) == ["train", "test"]
    stored = FeatureTable({"train": [X]}, {"train": np.arange(60) % 3}, list("abc"), ("0123456789abcdef" * 2,))
    assert "members: 01234567 (4)" in repr(stored)
    assert "60 rows, 4 features" in repr(TableSplit([X], np.asarray(None))), "rows without labels"


@given(st.integers(2, 4), st.integers(0, 5), st.floats(0.2, 0.6))
def test_a_cut_is_that_of_scikit_learn(num_classes, seed, size):
    labels = np.arange(60) % num_classes
    table = make((X, labels), test_size=size, seed=seed)
    rest, part = train_test_split(np.arange(60), test_size=size, random_state=seed, stratify=labels)
    assert np.array_equal(table["test"], X[np.sort(part)]) and np.array_equal(table["train"], X[np.sort(rest)])
    assert np.array_equal(table["test"].labels, labels[np.sort(part)])


@given(
    st.lists(st.integers(0, 8), min_size=20, max_size=20),
    st.lists(st.integers(0, 15), min_size=20, max_size=20),
    st.integers(0, 9),
)
def test_a_cut_separates_neither_groups_nor_copies(groups, copies, seed):
    features = np.stack([np.array(copies), np.array(copies) ** 2], axis=1).astype(np.float64)
    try:
        table = make((features, np.arange(20) % 2, groups), test_size=0.3, validation_size=0.3, seed=seed)
    except ValueError as error:
        assert re.search("cannot be cut off|cannot cut", str(error))
        return
    assert sorted(len(table[kind]) for kind in table) and sum(len(table[kind]) for kind in table) == 20
    for kind in table:
        for other in set(table) - {kind}:
            assert not set(table[kind].groups.tolist()) & set(table[other].groups.tolist())
            assert not set(row_hashes(table[kind])) & set(row_hashes(table[other]))


def test_copies_and_groups_in_two_splits_are_said():
    with pytest.warns(UserWarning, match="7 of the 20 test rows are also in the train split"):
        FeatureTable.from_arrays({"train": (X[:40], y[:40]), "test": (X[33:53].astype(np.float64), y[33:53])})
    with pytest.warns(UserWarning, match="2 groups are in the train and in the validation split"):
        FeatureTable.from_arrays({"train": (X[:3], y[:3], [1, 2, 3]), "validation": (X[3:6], y[3:6], [2, 3, 4])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureTable.from_arrays({"train": (X[:40], y[:40]), "test": (X[40:], y[40:])})


def test_rows_of_equal_numbers_have_one_hash():
    whole = make(([X, MORE], y))["train"]
    joined = make((np.hstack([X, MORE]), y))["train"]
    assert row_hashes(whole) == row_hashes(joined) and len(set(row_hashes(whole))) == 60
    assert (
        row_hashes(make((np.array([[0.0, 1.0], [-0.0, 1.0]]), ["a", "b"]))["train"])[0]
        == row_hashes(make((np.array([[-0.0, 1.0], [2, 3]], dtype=np.float32), ["a", "b"]))["train"])[0]
    )


@pytest.fixture(scope="module")
def three():
    """Two members that see a class each way, and a copy of the first."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 600)
    first = rng.normal(size=(600, 6)) + 1.5 * (labels % 2)[:, None]
    second = rng.normal(size=(600, 5)) + 1.5 * (labels // 2)[:, None]
    copy = first + 1e-3 * rng.normal(size=(600, 6))
    blocks = {"parity": first, "half": second, "again": copy}
    return FeatureTable.from_arrays({"train": (blocks, labels)}, test_size=0.3, validation_size=0.3)


@pytest.mark.parametrize("probe", [LinearProbe(), RidgeProbe(), KNNProbe(), PrototypeProbe(), ReferenceProbe()])
def test_every_probe_takes_the_table(probe, three):
    score = probe.fit(three["train"], validation=three["validation"]).score(three["test"])
    alone = three.members([0])
    assert score > 0.65 > 0.55 > type(probe)().fit(alone["train"], validation=alone["validation"]).score(alone["test"])


def test_members_are_selected_and_compared(three):
    selection = select_members(three, feature_costs(three), three.member_names)
    assert selection.names == ["parity", "half", "again"] and selection.best in ((0, 1), (1, 2))
    overlap = measure_overlap(three, quiet=True)
    assert [subject.name for subject in overlap.subjects] == ["parity", "half", "again"]
    sentences = {subject.name: text for subject, text in zip(overlap.subjects, overlap.verdict, strict=False)}
    assert sentences["parity"].startswith("parity repeats again: R2 1.00 (0.9 or more is a repeat).")
    assert "half has features that help on this dataset beyond" in sentences["half"]
    assert not re.search("untrained", " ".join(overlap.verdict))


def test_a_comparison_without_a_control_is_stored_and_shown(three, tmp_path):
    from concat_ensemble.commands.compare import overlap_table
    from concat_ensemble.reporting.figures import plot_overlap
    from concat_ensemble.studies.overlap_results import Overlap

    overlap = measure_overlap(three, quiet=True)
    overlap.save(tmp_path / "x.json")
    again = Overlap.load(tmp_path / "x.json")
    assert again.verdict == overlap.verdict and again.relations[0].untrained_r2 is None
    assert overlap_table(again).row_count == 3 + len(again.relations)
    plot_overlap(again, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_missing_split_says_how_to_cut_it():
    with pytest.raises(KeyError, match=r"no split 'validation'.*validation_size=0.2"):
        make()["validation"]


@given(st.lists(st.one_of(st.text(min_size=1, max_size=3), st.integers(-5, 5), st.booleans()), min_size=1, max_size=8))
def test_labels_are_numbers_or_texts_never_both(labels):
    are_texts = [isinstance(label, str) for label in labels]
    if any(are_texts) and not all(are_texts):
        with pytest.raises(ValueError, match="texts and numbers"):
            read_labels(labels)
        return
    read = read_labels(labels)
    assert len(read) == len(labels) and read.dtype.kind in "iU"
    if all(are_texts):
        assert read.tolist() == [label.rstrip("\0") for label in labels]
