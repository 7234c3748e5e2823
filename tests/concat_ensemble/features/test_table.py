import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concat_ensemble import LinearProbe, RidgeProbe
from concat_ensemble.features.table import FeatureTable, TableSplit


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.data())
def test_joined_and_taken_rows_are_those_of_the_arrays(lengths, data):
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


def tables(keys, width=4):
    X, y = np.random.default_rng(0).normal(size=(30, width)), np.arange(30) % 3
    return FeatureTable({"train": [X]}, {"train": y}, list("abc"), keys)


@pytest.mark.parametrize("probe", [LinearProbe(l2_strengths=(1.0,)), RidgeProbe()])
def test_the_table_of_another_ensemble_is_refused(probe):
    probe.fit(tables(("aaaaaaaaaa",))["train"])
    assert probe.score(tables(("aaaaaaaaaa",))["train"]) > 0
    with pytest.raises(ValueError, match=r"4 features of members bbbbbbbb.*fitted on 4 of aaaaaaaa"):
        probe.score(tables(("bbbbbbbbbb",))["train"])
    with pytest.raises(ValueError, match=r"5 features of members aaaaaaaa"):
        probe.score(tables(("aaaaaaaaaa",), width=5)["train"])


@pytest.mark.parametrize("probe", [LinearProbe(l2_strengths=(1.0,)), RidgeProbe()])
def test_labels_that_are_no_classes_are_refused(probe):
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    with pytest.raises(ValueError, match=r"shape \(30, 3\).*argmax"):
        probe.fit(X, np.eye(3)[y])
    with pytest.raises(ValueError, match="continuous"):
        probe.fit(X, y + 0.5)


def test_a_test_label_that_was_never_seen_counts_as_wrong():
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    probe = RidgeProbe().fit(X, y)
    assert probe.score(X, np.full(30, 7)) == 0.0


def test_fewer_rows_than_classes_can_be():
    """Of a hundred classes three rows show three."""
    X = np.eye(3, dtype=np.float32)
    for probe in (LinearProbe(), RidgeProbe()):
        assert probe.fit(X, np.array([5, 50, 99])).classes_.tolist() == [5, 50, 99]
