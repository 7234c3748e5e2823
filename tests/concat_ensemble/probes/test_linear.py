import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from concat_ensemble import LinearProbe, ReferenceProbe, RidgeProbe
from concat_ensemble.features.table import FeatureTable


def clouds(number, classes=3, num_features=6, spread=1.5, seed=0):
    """Gaussian clouds whose features have different scales, so that standardizing matters."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, num_features))
    labels = np.arange(number) % classes
    scales = 10.0 ** np.arange(-2, num_features - 2)
    return (centers[labels] + spread * rng.normal(size=(number, num_features))) * scales, labels


def scikit_learn(X, y, l2_strength, standardize=True):
    """scikit-learn's probabilities and predictions. It minimizes C * sum(loss) + ||coef||^2 / 2."""
    mean, scale = (X.mean(0), np.where(X.std(0) > 0, X.std(0), 1)) if standardize else (0, 1)
    model = LogisticRegression(C=1 / (len(X) * l2_strength), max_iter=10_000, tol=1e-8).fit((X - mean) / scale, y)
    return lambda new: model.predict_proba((new - mean) / scale), lambda new: model.predict((new - mean) / scale)


def objective(probe, X, y):
    rows = (X - probe.mean_) / probe.scale_
    losses = -log_softmax(rows @ probe.coef_.T + probe.intercept_, axis=1)[
        np.arange(len(y)), np.searchsorted(probe.classes_, y)
    ]
    return losses.mean() + probe.l2_strength_ / 2 * (probe.coef_**2).sum()


@pytest.mark.parametrize("l2_strength", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_equals_scikit_learn_on_train_and_validation_together(classes, standardize, l2_strength):
    X, y = clouds(90, classes)
    X = X if standardize else X / 10.0 ** np.arange(-2, 4)
    validation, new = (X[60:], y[60:]), X + 0.1
    probe = LinearProbe(l2_strengths=[l2_strength], standardize=standardize).fit(X[:60], y[:60], validation=validation)
    probabilities, predictions = scikit_learn(X, y, l2_strength, standardize)
    np.testing.assert_allclose(probe.predict_proba(new), probabilities(new), atol=2e-3)
    assert np.mean(probe.predict(new) == predictions(new)) >= 0.99
    assert probe.coef_.shape == (classes, 6) and probe.intercept_.shape == (classes,)


def test_minimizes_the_objective_of_its_docstring():
    """Any small step from the coefficients increases mean loss + l2_strength / 2 * ||coef||^2."""
    X, y = clouds(80)
    probe = LinearProbe(l2_strengths=[0.1]).fit(X[:60], y[:60], validation=(X[60:], y[60:]))
    least, solution = objective(probe, X, y), probe.coef_.copy()
    for step in np.random.default_rng(0).normal(size=(20, *solution.shape)):
        probe.coef_ = solution + 0.05 * step
        assert objective(probe, X, y) > least


def test_path_is_the_validation_accuracy_of_fits_on_training_rows_only():
    X, y = clouds(120, spread=2.5)
    X_held, y_held = clouds(80, spread=2.5, seed=1)
    probe = LinearProbe(l2_strengths=[0.01, 1.0, 0.1]).fit(X, y, validation=(X_held, y_held))
    expected = {
        l2_strength: np.mean(scikit_learn(X, y, l2_strength)[1](X_held) == y_held) for l2_strength in (1.0, 0.1, 0.01)
    }
    assert {s: probe.path_[s] for s in expected} == pytest.approx(expected, abs=1 / 80 + 1e-9)
    assert probe.selection_ == "validation rows"
    assert probe.l2_strength_ == max(probe.path_, key=lambda l2_strength: (probe.path_[l2_strength], l2_strength))


def test_strength_is_chosen_on_validation_rows():
    """Three in ten training labels are wrong, and one of 70 features is informative: a weak penalty memorizes the
    labels, a stronger one finds the truth."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 100)
    X = np.hstack([truth[:, None] * 2.0 + rng.normal(size=(100, 1)), rng.normal(size=(100, 69))])
    noisy = np.where(rng.random(100) < 0.3, 1 - truth, truth)
    new = rng.integers(0, 2, 400)
    X_new = np.hstack([new[:, None] * 2.0 + rng.normal(size=(400, 1)), rng.normal(size=(400, 69))])
    on_noisy = LinearProbe().fit(X, noisy, validation=(X, noisy))
    on_true = LinearProbe().fit(X, noisy, validation=(X_new, new))
    assert on_noisy.l2_strength_ < on_true.l2_strength_
    assert on_noisy.path_[1e-4] == 1.0 and on_true.path_[1e-4] < on_true.path_[on_true.l2_strength_]


def test_the_strongest_of_equally_good_strengths_is_chosen():
    X, y = clouds(60, spread=0.01)  # every strength separates the classes
    probe = LinearProbe().fit(X[:45], y[:45], validation=(X[45:], y[45:]))
    assert set(probe.path_.values()) == {1.0} and probe.l2_strength_ == 10.0


def table_with(test):
    X, y = clouds(60)
    blocks = {"train": [X[:40, :2], X[:40, 2:]], "validation": [X[40:, :2], X[40:, 2:]], "test": test[:1]}
    return FeatureTable(blocks, {"train": y[:40], "validation": y[40:], "test": test[1]}, list("abc"))


def test_accepts_splits_of_a_table():
    X, y = clouds(60)
    X_test, y_test = clouds(30, seed=5)
    table = table_with((X_test, y_test))
    probe = LinearProbe().fit(table["train"], validation=table["validation"])
    plain = LinearProbe().fit(X[:40], y[:40], validation=(X[40:], y[40:]))
    assert np.array_equal(probe.coef_, plain.coef_)
    assert probe.score(table["test"]) == plain.score(X_test, y_test) == np.mean(plain.predict(X_test) == y_test)


def test_the_test_split_is_never_read():
    unusable = table_with((np.full((3, 6), np.nan), np.array([7, 8, 9])))
    usable = table_with(clouds(30, seed=5))
    probes = [LinearProbe().fit(table["train"], validation=table["validation"]) for table in (unusable, usable)]
    assert np.array_equal(probes[0].coef_, probes[1].coef_)


@pytest.mark.parametrize("names", [(3, 7, 9), (-1, 0, 5), ("ant", "bee", "cow")])
def test_labels_may_be_anything(names):
    X, y = clouds(60)
    named = np.array(names)[y]
    probe = LinearProbe().fit(X[:40], named[:40], validation=(X[40:], named[40:]))
    plain = LinearProbe().fit(X[:40], y[:40], validation=(X[40:], y[40:]))
    assert probe.classes_.tolist() == list(names)
    assert probe.predict(X).tolist() == np.array(names)[plain.predict(X)].tolist()


def test_two_classes_have_opposite_coefficients_and_logistic_probabilities():
    X, y = clouds(60, 2)
    probe = LinearProbe(l2_strengths=[0.1]).fit(X[:40], y[:40], validation=(X[40:], y[40:]))
    np.testing.assert_allclose(probe.coef_[0], -probe.coef_[1], atol=1e-12)
    np.testing.assert_allclose(probe.predict_proba(X), scikit_learn(X, y, 0.1)[0](X), atol=2e-3)


def test_constant_features_change_nothing():
    X, y = clouds(60)
    padded = np.hstack([X, np.full((60, 1), 3.0), np.zeros((60, 1))])
    probe = LinearProbe().fit(padded[:40], y[:40], validation=(padded[40:], y[40:]))
    plain = LinearProbe().fit(X[:40], y[:40], validation=(X[40:], y[40:]))
    np.testing.assert_allclose(probe.logits(padded), plain.logits(X), atol=1e-6)


def test_more_features_than_rows():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 200)), np.arange(20) % 2
    X[:, 0] += 10 * y
    probe = LinearProbe().fit(X[:14], y[:14], validation=(X[14:], y[14:]))
    assert np.isfinite(probe.coef_).all() and probe.score(X, y) == 1.0


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("rows", [200, 900])
def test_wide_float32_features_are_solved_as_scikit_learn_does(rows, in_memory):
    """So many features that only leading eigenvectors are used, more and fewer rows, half precision products."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    X = (0.3 * rng.normal(size=(3, 600))[y] + rng.normal(size=(rows, 600)) * np.linspace(5, 0.01, 600)).astype(
        np.float32
    )
    probe = LinearProbe(l2_strengths=[0.1], in_memory=in_memory, tol=1e-9).fit(X, y)
    probabilities, _ = scikit_learn(X.astype(np.float64), y, 0.1)
    np.testing.assert_allclose(probe.predict_proba(X), probabilities(X), atol=2e-3)


def test_large_float32_features_are_solved_in_float32():
    X, y = clouds(60, spread=0.3)
    X32 = (X * 1e6).astype(np.float32)
    probe = LinearProbe().fit(X32[:40], y[:40], validation=(X32[40:], y[40:]))
    assert probe.coef_.dtype == np.float32 and probe.score(X32, y) > 0.9


def test_without_validation_rows_the_seed_picks_a_stratified_fifth():
    X, y = clouds(210, spread=3)
    first, again = LinearProbe(seed=1).fit(X, y), LinearProbe(seed=1).fit(X, y)
    assert first.path_ == again.path_ and np.array_equal(first.coef_, again.coef_)
    assert any(LinearProbe(seed=seed).fit(X, y).path_ != first.path_ for seed in (2, 3, 4))
    assert all(round(share * 42, 6).is_integer() for share in first.path_.values()), "42 of 210 rows are scored"
    assert first.selection_ == "one fifth of the training rows"


def test_a_class_of_the_validation_rows_only_is_learned():
    X, y = clouds(60)
    probe = LinearProbe().fit(X[y < 2], y[y < 2], validation=(X, y))
    assert probe.classes_.tolist() == [0, 1, 2] and probe.coef_.shape == (3, 6)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match=r"two classes.*'ant'"):
        LinearProbe().fit(np.ones((4, 2)), np.array(["ant"] * 4))


@pytest.mark.parametrize("where", ["train", "validation"])
def test_nan_features_are_refused(where):
    X, y = clouds(60)
    X[3 if where == "train" else 50, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        LinearProbe().fit(X[:40], y[:40], validation=(X[40:], y[40:]))


def test_clone_and_parameters():
    probe = LinearProbe(l2_strengths=(0.5,), standardize=False, max_iter=7, seed=3)
    assert clone(probe).get_params() == {
        "l2_strengths": (0.5,),
        "standardize": False,
        "max_iter": 7,
        "seed": 3,
        "tol": 1e-6,
        "cv": None,
        "in_memory": None,
        "metric": "top1",
        "class_weight": None,
    }
    assert not hasattr(clone(probe.fit(*clouds(30))), "coef_")


@pytest.mark.parametrize("probe", [LinearProbe, RidgeProbe, ReferenceProbe])
def test_the_old_name_of_the_strength_warns(probe):
    fitted = probe(l2_strengths=(0.1,)).fit(*clouds(30))
    with pytest.warns(FutureWarning, match="strength_.*use l2_strength_"):
        assert fitted.strength_ == 0.1
    assert not hasattr(probe(), "strength_")


@parametrize_with_checks(
    [LinearProbe(l2_strengths=(1.0, 0.01), cv=2), LinearProbe((0.1,), class_weight="balanced")],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": "it asks for more digits than tol gives; see test_weights.py"
    },
)
def test_keeps_scikit_learns_contract(estimator, check):
    check(estimator)
