import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concat_ensemble import LinearProbe, RidgeProbe
from concat_ensemble.features.table import FeatureTable, TableSplit


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.data())
def test_concatenated_and_selected_rows_equal_those_of_the_arrays(lengths, data):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 3)) for n in lengths]
    split = TableSplit.concatenate([TableSplit([a[:, :1], a[:, 1:]], np.arange(len(a))) for a in arrays])
    whole, labels = np.vstack(arrays), np.concatenate([np.arange(n) for n in lengths])
    numbers = np.array(
        data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=9)) if len(whole) else [], dtype=int
    )
    part = split.select(numbers)
    assert np.array_equal(part.features, whole[numbers]) and np.array_equal(part.labels, labels[numbers])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    assert np.array_equal(split.rows(slice(start, stop)), whole[start:stop])
    assert split.num_features == part.num_features == 3


def tables(keys, num_features=4):
    X, y = np.random.default_rng(0).normal(size=(30, num_features)), np.arange(30) % 3
    return FeatureTable({"train": [X]}, {"train": y}, list("abc"), keys)


@pytest.mark.parametrize("probe", [LinearProbe(l2_strengths=(1.0,)), RidgeProbe()])
def test_the_table_of_another_ensemble_is_refused(probe):
    probe.fit(tables(("aaaaaaaaaa",))["train"])
    assert probe.score(tables(("aaaaaaaaaa",))["train"]) > 0
    with pytest.raises(ValueError, match=r"4 .*bbbbbbbb.* 4 .*aaaaaaaa"):
        probe.score(tables(("bbbbbbbbbb",))["train"])
    with pytest.raises(ValueError, match=r"5 .*aaaaaaaa"):
        probe.score(tables(("aaaaaaaaaa",), num_features=5)["train"])


@pytest.mark.parametrize("probe", [LinearProbe(l2_strengths=(1.0,)), RidgeProbe()])
def test_labels_that_are_not_classes_are_refused(probe):
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    with pytest.raises(ValueError, match=r"\(30, 3\).*argmax"):
        probe.fit(X, np.eye(3)[y])
    with pytest.raises(ValueError, match="continuous"):
        probe.fit(X, y + 0.5)


def test_a_test_label_without_training_rows_counts_as_wrong():
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    probe = RidgeProbe().fit(X, y)
    assert probe.score(X, np.full(30, 7)) == 0.0


def test_rows_of_a_few_of_many_classes_are_accepted():
    """Three rows of classes numbered up to 99."""
    X = np.eye(3, dtype=np.float32)
    for probe in (LinearProbe(), RidgeProbe()):
        assert probe.fit(X, np.array([5, 50, 99])).classes_.tolist() == [5, 50, 99]
