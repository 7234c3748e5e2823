"""Weights of classes and rows against scikit-learn's estimators with the same weights, and against copies of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from concat_ensemble import KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe
from concat_ensemble.features.table import TableSplit
from tests.concat_ensemble.probes.test_linear import clouds

ALL = [KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe]


@st.composite
def weighted_problems(draw):
    """Rows of 2 to 4 unequal classes, weights of the rows (some of them 0) or None, and weights of the classes."""
    num_classes, num_rows = draw(st.integers(2, 4)), draw(st.integers(12, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    y = np.concatenate([np.arange(num_classes), np.minimum(rng.geometric(0.5, num_rows), num_classes) - 1])
    X = rng.normal(size=(len(y), draw(st.integers(2, 30)))) + rng.normal(size=(num_classes, 1))[y]
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], len(y)) if draw(st.booleans()) else None
    if weights is not None:
        weights[:num_classes] = 1
    balance = draw(st.sampled_from(["none", "balanced", "dict", "part"]))
    by_name = {c: float(w) for c, w in enumerate(rng.uniform(0.2, 5, num_classes))}
    options = {"none": None, "balanced": "balanced", "dict": by_name, "part": {0: 4.0}}
    return X, y, weights, options[balance]


def total_weight(y, weights, class_weight):
    """What scikit-learn multiplies the losses by; "balanced" counts the rows by their weights."""
    weights = np.ones(len(y)) if weights is None else weights
    if class_weight == "balanced":
        classes = np.unique(y)
        by_class = compute_class_weight("balanced", classes=classes, y=np.repeat(y, (2 * weights).astype(int)))
        class_weight = dict(zip(classes.tolist(), by_class, strict=True))
    return weights * compute_sample_weight(class_weight, y)


@settings(max_examples=50)
@given(weighted_problems(), st.sampled_from([1.0, 0.1, 0.01]))
def test_the_linear_probe_equals_logistic_regression(problem, l2_strength):
    X, y, weights, class_weight = problem
    probe = LinearProbe([l2_strength], standardize=False, tol=1e-14, class_weight=class_weight)
    probe.fit(X, y, sample_weight=weights)
    total = total_weight(y, weights, class_weight)
    model = LogisticRegression(C=1 / (total.sum() * l2_strength), max_iter=10_000, tol=1e-10)
    model.fit(X, y, sample_weight=total)
    np.testing.assert_allclose(probe.predict_proba(X), model.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 1.0, 1: 5.0, 2: 0.5}])
def test_the_linear_probe_equals_logistic_regression_with_its_own_class_weight(class_weight):
    X, y = clouds(120)
    X, y = X[y + np.arange(120) % 4 < 4] / 10.0 ** np.arange(-2, 4), y[y + np.arange(120) % 4 < 4]
    probe = LinearProbe([0.1], standardize=False, tol=1e-12, class_weight=class_weight).fit(X, y)
    total = compute_sample_weight(class_weight, y).sum()
    model = LogisticRegression(C=1 / (total * 0.1), class_weight=class_weight, max_iter=10_000, tol=1e-10).fit(X, y)
    np.testing.assert_allclose(probe.predict_proba(X), model.predict_proba(X), atol=1e-5)
    assert not np.allclose(probe.predict_proba(X), LinearProbe([0.1], standardize=False).fit(X, y).predict_proba(X))


@settings(max_examples=50)
@given(weighted_problems(), st.sampled_from([1.0, 0.1, 0.01]))
def test_the_ridge_probe_equals_ridge(problem, l2_strength):
    X, y, weights, class_weight = problem
    probe = RidgeProbe([l2_strength], standardize=False, class_weight=class_weight)
    probe.fit(X, y, sample_weight=weights)
    total = total_weight(y, weights, class_weight)
    model = Ridge(alpha=l2_strength * total.sum()).fit(X, np.eye(y.max() + 1)[y], sample_weight=total)
    np.testing.assert_allclose(probe.logits(X), model.predict(X), atol=1e-6)


def test_the_ridge_probe_predicts_as_ridge_classifier():
    """Its targets are -1 and 1 instead of 0 and 1, which changes no prediction."""
    X, y = clouds(120, spread=3)
    X, y = X[y + np.arange(120) % 4 < 4] / 10.0 ** np.arange(-2, 4), y[y + np.arange(120) % 4 < 4]
    probe = RidgeProbe([0.1], standardize=False, class_weight="balanced").fit(X, y)
    model = RidgeClassifier(alpha=0.1 * len(y), class_weight="balanced").fit(X, y)
    np.testing.assert_array_equal(probe.predict(X), model.predict(X))
    np.testing.assert_allclose(2 * probe.logits(X) - 1, model.decision_function(X), atol=1e-8)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([LinearProbe, RidgeProbe]), st.sampled_from([None, "balanced"]))
def test_a_weight_is_that_many_copies_of_a_row(seed, kind, class_weight):
    """Also in the mean and the deviation of the features, and 0 is no row at all."""
    rng = np.random.default_rng(seed)
    X, y = clouds(30, seed=seed)
    copies = rng.integers(0, 4, 30)
    copies[:3] = 1
    precise = {"tol": 1e-14} if kind is LinearProbe else {}
    probe = kind((0.1,), class_weight=class_weight, **precise)
    weighted = probe.fit(X, y, sample_weight=copies).logits(X)
    repeated = probe.fit(X.repeat(copies, axis=0), y.repeat(copies)).logits(X)
    np.testing.assert_allclose(weighted, repeated, atol=1e-5)


def test_weights_decide_where_a_strength_is_chosen_too():
    """The held-out rows of weight 0 could be anything."""
    X, y = clouds(400, spread=4)
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, 400).astype(float)
    garbage = np.where((weights == 0)[:, None], rng.normal(size=X.shape) * 1e6, X)
    pairs = [(np.arange(0, 400, 2), np.arange(1, 400, 2)), (np.arange(1, 400, 2), np.arange(0, 400, 2))]
    clean = LinearProbe(cv=pairs, metric="macro_f1").fit(X, y, sample_weight=weights)
    spoiled = LinearProbe(cv=pairs, metric="macro_f1").fit(garbage, y, sample_weight=weights)
    assert clean.path_ == spoiled.path_ and clean.selection_ == "2-fold cross-validation"


@settings(max_examples=20)
@given(weighted_problems(), st.integers(1, 12))
def test_class_weights_multiply_the_votes_of_neighbors(problem, k):
    X, y, _, class_weight = problem
    probe = KNNProbe((k,), temperature=0.5, class_weight=class_weight).fit(X, y)
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.5))
    votes = model.fit(X, y).predict_proba(X) * by_class(class_weight, y)
    np.testing.assert_allclose(probe.predict_proba(X), votes / votes.sum(1, keepdims=True), atol=1e-9)


def by_class(class_weight, y):
    weights = compute_sample_weight(class_weight, y)
    return np.array([weights[y == c][0] for c in np.unique(y)])


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0}])
def test_class_weights_multiply_the_probabilities_of_prototypes(class_weight):
    X, y = clouds(60)
    X, y = X[5:], y[5:]
    probabilities = PrototypeProbe().fit(X, y).predict_proba(X) * by_class(class_weight, y)
    weighted = PrototypeProbe(class_weight=class_weight).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(weighted, probabilities / probabilities.sum(1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 2: 0.5}])
def test_the_reference_probe_weights_the_loss_as_torch_does(class_weight):
    X, y = clouds(60)
    X, y = X[10:].astype(np.float32), y[10:]
    probe = ReferenceProbe((1e-3,), epochs=3, batch_size=16, class_weight=class_weight).fit(X, y)
    torch.manual_seed(0)
    norm, linear = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
    torch.manual_seed(0)
    torch.nn.init.normal_(linear.weight, std=0.01)
    torch.nn.init.zeros_(linear.bias)
    groups = [{"params": norm.parameters(), "weight_decay": 0}, {"params": linear.parameters(), "weight_decay": 1e-3}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    weight = torch.tensor(by_class(class_weight, y)).float()
    for _ in range(3):
        for rows in torch.randperm(50).split(16):
            logits = linear(norm(torch.from_numpy(X[rows])))
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[rows]), weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = linear(norm.eval()(torch.from_numpy(X))).detach().numpy()
    np.testing.assert_allclose(probe.logits(X), expected, atol=1e-4)


def test_the_reference_probe_weights_rows_in_its_loss():
    X, y = clouds(60)
    weighted = ReferenceProbe((1e-3,), epochs=3).fit(X, y, sample_weight=by_class({0: 3.0}, y)[y])
    by_class_weight = ReferenceProbe((1e-3,), epochs=3, class_weight={0: 3.0}).fit(X, y)
    np.testing.assert_allclose(weighted.coef_, by_class_weight.coef_, atol=1e-6)


@pytest.mark.parametrize("probe", ALL)
def test_balanced_weights_find_the_rare_class(probe):
    """3% positives that overlap with the others: balanced weights raise recall of the rare class."""
    rng = np.random.default_rng(0)
    y = (np.arange(600) < 18).astype(int)
    X = rng.normal(size=(600, 5)) + 1.5 * y[:, None]
    parameters = {"temperature": 1.0} if probe is PrototypeProbe else {}
    plain, balanced = (probe(class_weight=w, **parameters).fit(X, y) for w in (None, "balanced"))
    recalls = [np.mean(fitted.predict(X)[y == 1]) for fitted in (plain, balanced)]
    assert recalls[1] > recalls[0] or recalls[0] == 1


@pytest.mark.parametrize("probe", ALL)
def test_classes_may_have_names(probe):
    X, y = clouds(45)
    names = np.array(["ant", "bee", "cow"])[y]
    named = probe(class_weight={"ant": 2.0, "bee": 1.0, "cow": 0.5}).fit(X, names)
    numbered = probe(class_weight={0: 2.0, 1: 1.0, 2: 0.5}).fit(X, y)
    np.testing.assert_array_equal(named.predict_proba(X), numbered.predict_proba(X))


@pytest.mark.parametrize("probe", ALL)
@pytest.mark.parametrize(
    ("class_weight", "message"),
    [
        ("even", "class_weight='even' must be None, 'balanced' or a dict"),
        ({"0": 2.0}, r"class_weight names the classes \['0'\], but the rows have the classes \[0, 1, 2\]"),
        ({0: 0.0}, "must have weights above zero"),
        ({0: -1.0}, "must have weights above zero"),
    ],
)
def test_bad_class_weights_are_refused(probe, class_weight, message):
    with pytest.raises(ValueError, match=message):
        probe(class_weight=class_weight).fit(*clouds(30))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(29), r"shape \(29,\) but must be \(30,\)"),
        (np.ones((30, 1)), r"shape \(30, 1\) but must be \(30,\)"),
        (np.zeros(30), "at least one weight above zero"),
        (-np.ones(30), "no negative weight"),
        (np.full(30, np.nan), "sample_weight contains NaN"),
        (np.arange(30) % 3 == 1, r"two classes.*one class 1"),
    ],
)
@pytest.mark.parametrize("probe", [LinearProbe, RidgeProbe, ReferenceProbe])
def test_bad_sample_weights_are_refused(probe, weights, message):
    X, y = clouds(30)
    for rows in ((X, y), (TableSplit([X], y),)):
        with pytest.raises(ValueError, match=message):
            probe().fit(*rows, sample_weight=weights)


@pytest.mark.parametrize("probe", ALL)
def test_the_score_can_be_weighted(probe):
    X, y = clouds(60, spread=4)
    fitted, weights = probe().fit(X, y), np.arange(60)
    correct = fitted.predict(X) == y
    assert fitted.score(X, y, sample_weight=weights) == pytest.approx(np.average(correct, weights=weights))
    assert fitted.score(TableSplit([X], y)) == np.mean(correct)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("probe", ALL)
def test_probabilities_sum_to_1_and_agree_with_predictions(probe, num_classes):
    (X, y), (new, _) = clouds(60, num_classes, spread=3), clouds(50, num_classes, spread=3, seed=1)
    fitted = probe().fit(X, y)
    probabilities = fitted.predict_proba(new)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities >= 0).all()
    np.testing.assert_array_equal(fitted.classes_[probabilities.argmax(1)], fitted.predict(new))
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(new)), probabilities, atol=1e-12)
    if probe not in (RidgeProbe,):
        np.testing.assert_allclose(probabilities, softmax(fitted.logits(new), axis=1))


def test_probabilities_of_ridge_are_the_nearest_to_its_scores():
    """No other probabilities are nearer, also where scores leave [0, 1]."""
    X, y = clouds(60)
    probe = RidgeProbe().fit(X, y)
    rows = 3 * clouds(20, seed=1)[0]
    scores, probabilities = probe.logits(rows), probe.predict_proba(rows)
    assert (scores > 1).any() and (scores < 0).any()
    np.testing.assert_allclose(scores.sum(1), 1)
    others = np.random.default_rng(0).dirichlet([0.3] * 3, size=2000)
    for row, own in zip(scores, probabilities, strict=True):
        assert np.sum((row - own) ** 2) <= np.sum((row - others) ** 2, axis=1).min()
    inside = (scores >= 0).all(1) & (scores <= 1).all(1)
    np.testing.assert_allclose(probabilities[inside], scores[inside])
