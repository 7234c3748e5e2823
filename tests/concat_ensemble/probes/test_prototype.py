import numpy as np
import pytest
from scipy.special import softmax
from sklearn.preprocessing import normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from concat_ensemble import PrototypeProbe
from concat_ensemble.features.standardized import CHUNK
from concat_ensemble.features.table import TableSplit
from tests.concat_ensemble.probes.test_linear import clouds


def unit(row):
    return row / np.sqrt(np.sum(row**2))


def cosines_by_hand(X, y, new):
    """Row by row and class by class, without standardizing."""
    prototypes = [unit(np.mean([unit(row) for row in X[y == c]], axis=0)) for c in np.unique(y)]
    return np.array([[unit(row) @ prototype for prototype in prototypes] for row in new])


@pytest.mark.parametrize("standardize", [True, False])
def test_equals_the_formula_on_train_and_validation_together(standardize):
    (X, y), (new, _) = clouds(60), clouds(20, seed=1)
    mean, scale = (X.mean(0), X.std(0)) if standardize else (0, 1)
    expected = cosines_by_hand((X - mean) / scale, y, (new - mean) / scale)
    probe = PrototypeProbe(standardize).fit(X[:40], y[:40], validation=(X[40:], y[40:]))
    np.testing.assert_allclose(probe.logits(new), expected / 0.1, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(probe.prototypes_, axis=1), 1)


def test_the_temperature_changes_only_probabilities():
    X, y = clouds(60)
    cold, warm = (PrototypeProbe(temperature=t).fit(X, y) for t in (0.05, 1.0))
    np.testing.assert_array_equal(cold.predict(X), warm.predict(X))
    np.testing.assert_allclose(cold.predict_proba(X), softmax(20 * warm.logits(X), axis=1))


def test_one_row_per_class_is_enough():
    X = np.array([[3.0, 0.0], [0.0, 0.5]])
    probe = PrototypeProbe().fit(X, ["ant", "bee"])
    assert probe.predict([[5, 1], [0.1, 0.2]]).tolist() == ["ant", "bee"]


def test_float16_table_splits_of_several_chunks_equal_arrays():
    X, y = clouds(CHUNK + 60)
    half = X.astype(np.float16)
    split, single = TableSplit([half], y), half.astype(np.float32)
    probe = PrototypeProbe().fit(split.select(np.arange(CHUNK)), validation=split.select(np.arange(CHUNK, len(y))))
    plain = PrototypeProbe().fit(single, y)
    np.testing.assert_allclose(probe.prototypes_, plain.prototypes_, atol=1e-7)
    assert probe.score(split) == plain.score(single, y)


def test_a_member_with_large_features_counts_no_more_than_another():
    (X, y), (new, labels) = clouds(60), clouds(20, seed=1)
    train_rows, test_rows = (np.hstack([normalize(rows[:, :4]), normalize(rows[:, 4:])]) for rows in (X, new))
    for scale in (1, 1e9):
        train = TableSplit([scale * X[:, :4], X[:, 4:]], y)
        test = TableSplit([scale * new[:, :4], new[:, 4:]], labels)
        logits = PrototypeProbe().fit(train).logits(test)
        np.testing.assert_allclose(logits, cosines_by_hand(train_rows, y, test_rows) / 0.1, atol=1e-6)


def episodes_by_hand(probe, X, y, ways, shots, queries, number, seed):
    """The same random numbers; everything else one row at a time."""
    rng, accuracies = np.random.default_rng(seed), []
    X = (X - probe.mean_) / probe.scale_
    for _ in range(number):
        support, query = [], []
        for c in rng.choice(len(np.unique(y)), ways, replace=False):
            rows = rng.choice(np.flatnonzero(y == np.unique(y)[c]), shots + queries, replace=False)
            support.append(rows[:shots])
            query.append(rows[shots:])
        labels = np.repeat(np.arange(ways), shots)
        predictions = cosines_by_hand(X[np.concatenate(support)], labels, X[np.concatenate(query)]).argmax(1)
        accuracies.append(np.mean(predictions == np.repeat(np.arange(ways), queries)))
    return np.array(accuracies)


@pytest.mark.parametrize("shots", [1, 3])
def test_episodes_equal_the_protocol_by_hand(shots):
    (X, y), (novel, labels) = clouds(60), clouds(80, classes=8, spread=2, seed=3)
    probe, names = PrototypeProbe(standardize=True).fit(X, y), np.array(list("stuvwxyz"))[labels]
    episodes = probe.episodes(novel, names, ways=4, shots=shots, queries=5, number=12, seed=7)
    expected = episodes_by_hand(probe, novel, names, 4, shots, 5, 12, 7)
    np.testing.assert_allclose(episodes.accuracies, expected)
    half = 2.200985 * expected.std(ddof=1) / 12**0.5  # Student's t with 11 degrees of freedom
    assert episodes.mean == pytest.approx(expected.mean())
    assert episodes.interval == pytest.approx((expected.mean() - half, expected.mean() + half), abs=1e-6)


def test_episodes_with_random_labels_are_at_chance():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 8)), rng.integers(0, 5, 200)
    low, high = PrototypeProbe().fit(X, y).episodes(X, y, number=300).interval
    assert low < 0.2 < high and high - low < 0.04


def test_episodes_of_a_table_split_equal_those_of_arrays():
    X, y = clouds(90, spread=2)
    half = X.astype(np.float16)
    split = TableSplit([half], y)
    probe = PrototypeProbe(standardize=True).fit(split)
    first = probe.episodes(split, ways=3, number=20, seed=1).accuracies
    assert np.array_equal(first, probe.episodes(half.astype(np.float32), y, ways=3, number=20, seed=1).accuracies)
    assert not np.array_equal(first, probe.episodes(split, ways=3, number=20, seed=2).accuracies)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 4}, "ways=4 .*at most 3"),
        ({"ways": 1}, "ways=1 .*at least 2"),
        ({"ways": 3, "shots": 0}, "shots=0 .*at least 1"),
        ({"ways": 3, "queries": 0}, "queries=0 .*at least 1"),
        ({"ways": 3, "number": 1}, "number=1 .*at least 2"),
        ({"ways": 3, "shots": 20}, "'bee' has 20 images.* need 35"),
    ],
)
def test_impossible_episodes_are_refused(settings, message):
    X, y = clouds(75)
    names = np.array(["ant", "bee", "cow"])[y]
    rows = np.concatenate([np.flatnonzero(names != "bee"), np.flatnonzero(names == "bee")[:20]])
    with pytest.raises(ValueError, match=message):
        PrototypeProbe().fit(X, names).episodes(X[rows], names[rows], **settings)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"temperature=0 .*above 0"):
        PrototypeProbe(temperature=0).fit(*clouds(30))


@parametrize_with_checks([PrototypeProbe(standardize=True, temperature=1.0)])
def test_keeps_scikit_learns_contract(estimator, check):
    check(estimator)
