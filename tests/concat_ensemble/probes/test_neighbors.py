"""The votes against scikit-learn's KNeighborsClassifier, which computes all cosines at once."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from concat_ensemble import KNNProbe, PrototypeProbe
from concat_ensemble.features.standardized import CHUNK
from concat_ensemble.features.table import TableSplit
from tests.concat_ensemble.probes.test_linear import clouds


def scikit_learn(X, y, k, temperature=0.07, standardize=False):
    """A function that returns the shares of the votes (N, C)."""
    scaler = StandardScaler().fit(X) if standardize else StandardScaler(with_mean=False, with_std=False).fit(X)
    votes = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / temperature))
    votes.fit(scaler.transform(X), y)
    return lambda new: votes.predict_proba(scaler.transform(new))


@st.composite
def problems(draw):
    rows, num_features, classes = draw(st.integers(6, 60)), draw(st.integers(2, 20)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    X = rng.standard_normal((rows + 20, num_features)) * 10.0 ** rng.uniform(-1, 1, num_features) + rng.uniform(0, 2)
    y = np.concatenate([np.arange(2), rng.integers(0, classes, rows - 2)])
    return X[:rows], y, X[rows:], draw(st.integers(1, rows)), draw(st.sampled_from([0.07, 0.5])), draw(st.booleans())


@settings(max_examples=60)
@given(problems())
def test_equals_scikit_learn(problem):
    X, y, new, k, temperature, standardize = problem
    probe = KNNProbe((k,), temperature, standardize).fit(X, y)
    expected = scikit_learn(X, y, k, temperature, standardize)(new)
    np.testing.assert_allclose(probe.predict_proba(new), expected, atol=1e-9)


def test_k_is_chosen_on_validation_rows_and_all_rows_vote_afterwards():
    (X, y), (X_held, y_held), (new, _) = (clouds(n, spread=2, seed=n) for n in (120, 80, 30))
    probe = KNNProbe(ks=(20, 1, 5)).fit(X, y, validation=(X_held, y_held))
    path = {k: np.mean(scikit_learn(X, y, k)(X_held).argmax(1) == y_held) for k in (20, 5, 1)}
    assert probe.path_ == pytest.approx(path) and len(set(path.values())) > 1
    assert probe.k_ == max(path, key=path.get)
    everything = scikit_learn(np.vstack([X, X_held]), np.concatenate([y, y_held]), probe.k_)
    np.testing.assert_allclose(probe.predict_proba(new), everything(new), atol=1e-9)


def test_the_largest_of_equally_good_ks_is_chosen():
    X, y = clouds(60, spread=0.01)
    probe = KNNProbe(ks=(1, 5, 10)).fit(X, y)
    assert set(probe.path_.values()) == {1.0} and probe.k_ == 10


def test_more_neighbors_than_rows_means_all_rows():
    X, y = clouds(12)
    np.testing.assert_allclose(KNNProbe((50,)).fit(X, y).predict_proba(X), scikit_learn(X, y, 12)(X), atol=1e-9)


def test_a_class_without_votes_has_a_finite_score():
    X, y = clouds(60)
    probe = KNNProbe((1,), temperature=0.01).fit(X, y)
    assert np.isfinite(probe.logits(X)).all()
    np.testing.assert_allclose(probe.predict_proba(X), np.eye(3)[y], atol=1e-300)  # each row is nearest to itself


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bank_of_several_chunks_streams_to_the_same_votes(dtype):
    X, y = clouds(CHUNK + 900)
    X = X.astype(dtype)
    new = clouds(40, seed=1)[0].astype(dtype)
    probes = [KNNProbe((10,), standardize=True, in_memory=in_memory).fit(X, y) for in_memory in (True, False)]
    np.testing.assert_array_equal(probes[0].logits(new), probes[1].logits(new))
    np.testing.assert_allclose(probes[0].predict_proba(new), scikit_learn(X, y, 10, standardize=True)(new), atol=1e-4)


def test_queries_of_several_chunks():
    (X, y), (new, _) = clouds(60), clouds(CHUNK + 60, seed=1)
    in_memory, streamed = (KNNProbe((5,), in_memory=choice).fit(X, y).logits(new) for choice in (True, False))
    np.testing.assert_array_equal(in_memory, streamed)
    np.testing.assert_array_equal(in_memory[-60:], KNNProbe((5,)).fit(X, y).logits(new[-60:]))


def test_float16_and_mapped_table_splits_are_as_arrays(tmp_path):
    X, y = clouds(80)
    half = X.astype(np.float16)
    np.save(tmp_path / "block.npy", half)
    split, single = TableSplit([np.load(tmp_path / "block.npy", mmap_mode="r")], y), half.astype(np.float32)
    probe = KNNProbe().fit(split.select(np.arange(50)), validation=split.select(np.arange(50, 80)))
    plain = KNNProbe().fit(single[:50], y[:50], validation=(single[50:], y[50:]))
    np.testing.assert_array_equal(probe.logits(split), plain.logits(single))
    assert probe.path_ == plain.path_ and probe.score(split) == plain.score(single, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(probe)).logits(split), probe.logits(split))


@pytest.mark.parametrize("standardize", [True, False])
def test_cosines_are_the_mean_of_the_members_cosines_at_every_scale(standardize):
    (X, y), (new, labels) = clouds(60), clouds(30, seed=1)
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(X)
    parts = [np.split(scaler.transform(rows), [4], axis=1) for rows in (X, new)]
    bank_rows, query_rows = (np.hstack([normalize(part) for part in halves]) for halves in parts)
    expected = scikit_learn(bank_rows, y, 5)(query_rows)
    for scale in (1, 1e9):
        bank = TableSplit([scale * X[:, :4], X[:, 4:]], y)
        queries = TableSplit([scale * new[:, :4], new[:, 4:]], labels)
        probabilities = KNNProbe((5,), standardize=standardize).fit(bank).predict_proba(queries)
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_without_validation_rows_the_seed_picks_a_fifth():
    X, y = clouds(210, spread=3)
    first, again = KNNProbe(seed=1).fit(X, y), KNNProbe(seed=1).fit(X, y)
    assert first.path_ == again.path_ and np.array_equal(first.logits(X), again.logits(X))
    assert any(KNNProbe(seed=seed).fit(X, y).path_ != first.path_ for seed in (2, 3, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": (0, 5)}, r"ks=\(0, 5\)"),
        ({"ks": ()}, r"ks=\(\)"),
        ({"temperature": 0}, "temperature=0 .*above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KNNProbe(**settings).fit(*clouds(30))


def test_validation_labels_of_another_number_are_refused():
    X, y = clouds(30)
    with pytest.raises(ValueError, match=r"\[10, 11\]"):
        KNNProbe().fit(X[:20], y[:20], validation=(X[20:], y[:11]))


def test_nan_in_a_table_is_refused():
    X, y = clouds(30)
    X[3, 2] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        KNNProbe().fit(TableSplit([X], y))


@pytest.mark.parametrize("probe", [KNNProbe(), PrototypeProbe()])
def test_the_old_name_of_the_feature_dims_warns(probe):
    X, y = clouds(30)
    probe.fit(TableSplit([X[:, :4], X[:, 4:]], y))
    with pytest.warns(FutureWarning, match="widths_.*use feature_dims_"):
        assert probe.widths_ == [4, 2]


@parametrize_with_checks(
    [KNNProbe(), KNNProbe(ks=(20,), temperature=1.0, class_weight="balanced")],
    expected_failed_checks=lambda probe: (
        {"check_class_weight_classifiers": "k = 1 is chosen, and one neighbor decides whatever its weight"}
        if len(probe.ks) > 1
        else {}
    ),
)
def test_keeps_scikit_learns_contract(estimator, check):
    check(estimator)
