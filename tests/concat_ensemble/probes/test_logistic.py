"""The solver against scikit-learn and the naive formula, on data of many shapes and with many faults."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_sample_weight

from concat_ensemble import LinearProbe
from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes import logistic
from concat_ensemble.probes.logistic import logistic_path, objective


@st.composite
def problems(draw):
    """Fewer or more rows than features, unequal classes, duplicate and constant features, different scales."""
    rows, num_features, classes = draw(st.integers(12, 60)), draw(st.integers(1, 80)), draw(st.integers(3, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    X = rng.standard_normal((rows, num_features)) * 10.0 ** rng.uniform(-1, 1, num_features)
    if draw(st.booleans()) and num_features > 1:
        X[:, 0] = X[:, -1]
    if draw(st.booleans()):
        X[:, num_features // 2] = 0.0
    weights = rng.dirichlet(np.full(classes, draw(st.sampled_from([0.5, 5.0]))))
    y = np.concatenate([np.arange(classes), rng.choice(classes, rows - classes, p=weights)])
    return X - X.mean(axis=0), y, classes, draw(st.sampled_from([1.0, 0.1, 0.01]))


@settings(max_examples=60)
@given(problems())
def test_equals_scikit_learn(problem):
    X, y, classes, l2_strength = problem
    solution = next(
        logistic_path(torch.from_numpy(X), torch.from_numpy(y), [l2_strength], num_classes=classes, tol=1e-13)
    )
    naive = LogisticRegression(C=1 / (len(X) * l2_strength), tol=1e-10, max_iter=10_000).fit(X, y)
    size = np.linalg.norm(naive.coef_)
    assert np.linalg.norm(solution.weight.numpy().T - naive.coef_) <= 1e-3 * size + 1e-6
    ours, theirs = X @ solution.weight.numpy() + solution.bias.numpy(), naive.decision_function(X)
    sure = np.diff(np.sort(theirs, axis=1)[:, -2:])[:, 0] > 1e-3
    assert np.array_equal(ours.argmax(1)[sure], theirs.argmax(1)[sure])


def test_the_objective_is_the_formula():
    logits, y, weight = (
        torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]).double(),
        torch.tensor([2, 1]),
        torch.ones(2, 3),
    )
    expected = np.mean([np.log(1 + np.e + np.e**2) - 2, np.log(np.e**3 + 2)]) + 0.5 / 2 * 6
    assert float(objective(logits, y, weight, 0.5)) == pytest.approx(expected, rel=1e-12)


def test_the_gradient_vanishes_at_each_strength_of_a_path():
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.standard_normal((200, 30))), torch.from_numpy(rng.integers(0, 4, 200))
    for solution in logistic_path(X - X.mean(0), y, [1.0, 0.1, 0.01, 1e-3], num_classes=4, tol=1e-12):
        weight = solution.weight.clone().requires_grad_()
        objective((X - X.mean(0)) @ weight + solution.bias, y, weight, solution.l2_strength).backward()
        assert weight.grad.abs().max() < 1e-5
        assert solution.objective == pytest.approx(
            float(
                objective((X - X.mean(0)) @ solution.weight + solution.bias, y, solution.weight, solution.l2_strength)
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loose_tolerance_is_met(dtype):
    """In float32 the products run in bfloat16 if the processor has it, and the minimum is the same."""
    torch.manual_seed(0)
    X = torch.randn(1_000, 100, dtype=dtype) * torch.arange(1, 101, dtype=dtype) ** -0.5
    y = (X @ torch.randn(100, 10, dtype=dtype) + torch.randn(1_000, 10)).argmax(1)
    X = (X - X.mean(0)) / X.std(0)
    l2_strengths = [1.0, 0.1, 0.01, 1e-3, 1e-4]
    exact = list(logistic_path(X.double(), y, l2_strengths, num_classes=10, tol=1e-12))
    for loose, best in zip(logistic_path(X, y, l2_strengths, num_classes=10, tol=1e-4), exact, strict=True):
        assert 0 <= loose.objective / best.objective - 1 + 1e-6 <= 1e-4


def test_separable_rows_at_a_weak_strength_converge():
    X = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]).double()
    path = list(logistic_path(X, torch.tensor([0, 0, 1, 1]), [1.0, 1e-6], num_classes=2))
    assert all(torch.isfinite(solution.weight).all() for solution in path) and path[-1].objective < 1e-3


def test_a_start_leads_to_the_same_solution():
    rng = np.random.default_rng(1)
    for rows in (20, 200):  # fewer rows than features, and more
        X, y = torch.from_numpy(rng.standard_normal((rows, 50))), torch.from_numpy(rng.integers(0, 3, rows))
        X = X - X.mean(0)
        (cold,) = logistic_path(X, y, [0.01], num_classes=3, tol=1e-12)
        (warm,) = logistic_path(X, y, [0.01], num_classes=3, tol=1e-12, start=cold)
        torch.testing.assert_close(warm.weight, cold.weight, atol=1e-6, rtol=1e-4)
        assert warm.newton_steps <= 2 < cold.newton_steps


@pytest.mark.parametrize("in_memory", [True, False])
def test_many_features_use_the_leading_eigenvectors(monkeypatch, in_memory):
    """On a small scale: 8 eigenvectors of 40 features, and a sample of 100 rows."""
    for name, value in (("LEADING", 8), ("SAMPLE", 100)):
        monkeypatch.setattr(logistic, name, value)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 40)) * 10.0 ** np.linspace(1, -1, 40)
    y = np.argmax(X @ rng.standard_normal((40, 3)) + rng.gumbel(size=(400, 3)), axis=1)
    standardized = StandardizedFeatures(TableSplit([X - X.mean(0)], y), in_memory=in_memory)
    solution = next(logistic_path(standardized, torch.from_numpy(y), [0.01], num_classes=3, tol=1e-12))
    naive = LogisticRegression(C=1 / (400 * 0.01), tol=1e-10, max_iter=10_000).fit(X - X.mean(0), y)
    np.testing.assert_allclose(solution.weight.numpy().T, naive.coef_, atol=1e-3 * np.abs(naive.coef_).max())


def weighted_objective(X, y, weight, bias, sample_weight, l2_strength):
    """f of the module's docstring, by numpy alone."""
    logits = X @ weight + bias
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return np.average(losses, weights=sample_weight) + l2_strength / 2 * np.sum(weight**2)


@st.composite
def weighted_problems(draw):
    """As `problems`, with two classes or more, rows of weight 0, integer or fractional weights, and duplicates."""
    classes, rows = draw(st.sampled_from([2, 3, 7])), draw(st.integers(14, 60))
    num_features = draw(st.sampled_from([1, 5, rows - 2, rows, 90]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    X = rng.standard_normal((rows, num_features)) * 10.0 ** rng.uniform(-1, 1, num_features)
    if draw(st.booleans()):
        X[rows // 2 :] = X[: rows - rows // 2]  # a kernel without full rank
    if draw(st.booleans()):
        X[:, 0] = 0.0
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, rows - classes)])
    sample_weight = rng.integers(0, 4, rows) if draw(st.booleans()) else rng.uniform(0, 2, rows)
    sample_weight[:classes] = 1  # every class keeps a row
    return X, y, classes, sample_weight.astype(float), draw(st.sampled_from([1.0, 0.1, 0.01, 1e-3]))


@settings(max_examples=60, deadline=None)
@given(weighted_problems(), st.booleans(), st.sampled_from([np.float32, np.float64]))
def test_the_objective_equals_scikit_learns_with_sample_and_class_weights(problem, balanced, dtype):
    """To 1e-6 of it, in float32 to 1e-7 where the objective itself is below 0.1. Class weights are sample weights by
    class, as in scikit-learn."""
    X, y, classes, sample_weight, l2_strength = problem
    if balanced:
        sample_weight = sample_weight * compute_sample_weight("balanced", y)
    X = (X - np.average(X, axis=0, weights=sample_weight)).astype(dtype)
    penalty = 2 * l2_strength if classes == 2 else l2_strength
    tensors = torch.from_numpy(X), torch.from_numpy(y)
    settings = {"num_classes": classes, "sample_weight": torch.from_numpy(sample_weight), "tol": 1e-8}
    (solution,) = logistic_path(*tensors, [penalty], **settings)
    assert solution.converged
    naive = LogisticRegression(C=1 / (sample_weight.sum() * l2_strength), tol=1e-10, max_iter=10_000)
    naive.fit(X.astype(np.float64), y, sample_weight=sample_weight)
    coef, intercept = naive.coef_, naive.intercept_
    if classes == 2:  # one column stands for the difference of two
        coef, intercept = np.vstack([-coef / 2, coef / 2]), np.concatenate([-intercept / 2, intercept / 2])
    best = weighted_objective(X, y, coef.T, intercept, sample_weight, penalty)
    ours = weighted_objective(X, y, solution.weight.numpy(), solution.bias.numpy(), sample_weight, penalty)
    rounding = 1e-7 if dtype == np.float32 else 0.0
    assert ours == pytest.approx(best, rel=1e-6, abs=rounding)
    assert solution.objective == pytest.approx(ours, rel=1e-6, abs=rounding)


@pytest.mark.parametrize(("num_features", "classes"), [(8, 3), (200, 2), (200, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_weights_equal_repeated_rows(num_features, classes, dtype):
    """A bootstrap resample is a weight on its distinct rows; a third of the rows has none."""
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.standard_normal((120, num_features))).to(dtype), torch.arange(120) % classes
    numbers = torch.from_numpy(np.concatenate([np.arange(classes), rng.integers(0, 120, 120 - classes)]))
    counts = torch.bincount(numbers, minlength=120)
    X = X - X[numbers].mean(0)
    settings = {"num_classes": classes, "tol": 1e-9}
    weighted = list(logistic_path(X, y, [0.1, 0.01], sample_weight=counts, **settings))
    repeated = list(logistic_path(X[numbers], y[numbers], [0.1, 0.01], **settings))
    assert (counts == 0).sum() > 30
    for a, b in zip(weighted, repeated, strict=True):
        assert a.objective == pytest.approx(b.objective, rel=1e-6)
        torch.testing.assert_close(a.weight, b.weight, atol=2e-3 * float(b.weight.abs().max()), rtol=0)


def test_one_row_per_class_and_rows_without_any_information_are_solved():
    X = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    (solution,) = logistic_path(X - X.mean(0), torch.arange(9), [1e-3], num_classes=9)
    assert ((X - X.mean(0)) @ solution.weight + solution.bias).argmax(1).tolist() == list(range(9))
    for rows, num_features in ((20, 4), (4, 20)):  # constant features: every class has its frequency
        y = torch.arange(rows) % 2
        (solution,) = logistic_path(torch.zeros(rows, num_features), y, [0.1], num_classes=2)
        assert solution.objective == pytest.approx(np.log(2), rel=1e-6) and not solution.weight.any()


def path_of(X, y, classes, **settings):
    return list(logistic_path(X, y, [1.0, 0.01, 1e-4], num_classes=classes, tol=1e-9, **settings))


@pytest.mark.parametrize("in_memory", [True, False])
def test_logits_that_are_not_stored_give_the_same_solutions(monkeypatch, in_memory):
    """With many rows and classes they are computed again in each pass, in pieces of a few rows."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((300, 20)), np.arange(300) % 30
    X += rng.standard_normal((30, 20))[y]
    split, labels = TableSplit([X - X.mean(0)], y), torch.from_numpy(y)
    weights = torch.from_numpy(rng.integers(1, 3, 300).astype(float))
    stored = path_of(StandardizedFeatures(split, in_memory=True), labels, 30, sample_weight=weights)
    for name, value in (("STORED_LOGITS", 0), ("PIECE", 1_000), ("SAMPLE", 100)):
        monkeypatch.setattr(logistic, name, value)
    computed = path_of(StandardizedFeatures(split, in_memory=in_memory), labels, 30, sample_weight=weights)
    for a, b in zip(stored, computed, strict=True):
        assert a.converged and b.converged and a.objective == pytest.approx(b.objective, rel=1e-7)


def test_a_line_search_of_one_pass_finds_where_the_slope_is_zero():
    lengths = logistic.LENGTHS
    for zero in (0.2, 0.3, 1.0, 1.7, 3.9):  # of a slope that is linear
        found = logistic._interpolated_length(-1.0, [length / zero - 1 for length in lengths])
        assert found == pytest.approx(zero, rel=0.1)
    assert logistic._interpolated_length(-1.0, [-0.5] * len(lengths)) == lengths[-1]
    assert 0 < logistic._interpolated_length(-1.0, [50.0] * len(lengths)) < lengths[0]


@pytest.mark.parametrize("stored", [logistic.STORED_LOGITS, 0])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("num_features", [20, 400])
def test_any_start_ends_at_the_minimum(num_features, size, stored, monkeypatch):
    """Also one that is sure of wrong classes, whose rows have no curvature: Newton's step is then far too long."""
    monkeypatch.setattr(logistic, "STORED_LOGITS", stored)
    rng = np.random.default_rng(num_features)
    X, y = rng.standard_normal((200, num_features)).astype(np.float32), torch.from_numpy(rng.integers(0, 5, 200))
    X = torch.from_numpy(X - X.mean(0))
    weight = torch.from_numpy(size * rng.standard_normal((num_features, 5))).float()
    starts = (None, logistic.Coefficients(weight, torch.zeros(5)))
    [cold], [warm] = (list(logistic_path(X, y, [1e-4], num_classes=5, start=start)) for start in starts)
    assert cold.converged and warm.converged
    assert warm.objective == pytest.approx(cold.objective, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_more_rows_than_the_choice_had_do_not_end_the_solver(seed):
    """The strength is chosen on the training rows, where the solution is sure of itself; then validation rows join."""
    rng = np.random.default_rng(seed)
    means, y = rng.standard_normal((5, 1_000)), rng.integers(0, 5, 448)
    X = (0.05 * means[y] + rng.standard_normal((448, 1_000))).astype(np.float32)
    rows = [TableSplit([X[part]], y[part]) for part in (slice(358), slice(358, 448))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = LinearProbe(l2_strengths=[1e-4, 1e-5]).fit(rows[0], validation=rows[1])
        alone = LinearProbe(l2_strengths=[chosen.l2_strength_]).fit(TableSplit([X], y))
    np.testing.assert_allclose(chosen.coef_, alone.coef_, atol=0.02 * np.abs(alone.coef_).max())


def test_a_solution_says_whether_it_converged():
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.standard_normal((100, 20))), torch.from_numpy(rng.integers(0, 3, 100))
    short, long = (path_of(X, y, 3, max_iter=number) for number in (1, 100))
    assert [s.converged for s in short] == [False] * 3 and [s.converged for s in long] == [True] * 3
    assert [s.newton_steps for s in short] == [1] * 3


def test_the_linear_probe_warns_of_a_strength_that_did_not_converge():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((100, 20)), rng.integers(0, 3, 100)
    with pytest.warns(ConvergenceWarning, match=r"max_iter=1 .*l2_strength=0\.001; raise max_iter"):
        LinearProbe([0.001], max_iter=1).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearProbe([0.001]).fit(X, y)


@pytest.mark.parametrize("num_features", [10, 300])
def test_a_weighted_probe_equals_the_probe_of_the_repeated_rows(num_features):
    """Also the standardization is that of the repeated rows."""
    rng = np.random.default_rng(0)
    X, y = (rng.standard_normal((90, num_features)) * 3 + 5).astype(np.float32), np.arange(90) % 3
    rows = np.sort(rng.integers(0, 90, 90))
    counts, probe = np.bincount(rows, minlength=90), LinearProbe(tol=1e-9)
    [(weighted, _)] = probe._solve(TableSplit([X], y), [0.01], sample_weight=counts)
    [(repeated, _)] = probe._solve(TableSplit([X[rows]], y[rows]), [0.01])
    for name in ("mean", "scale"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-6)
    np.testing.assert_allclose(weighted.logits(X), repeated.logits(X), atol=5e-3)


@pytest.mark.parametrize(
    ("num_features", "num_classes", "l2_strength"), [(600, 10, 1e-6), (60, 3, 1e-7), (600, 2, 1e-7)]
)
def test_losses_of_millionths_reach_their_minimum_in_float32(num_features, num_classes, l2_strength):
    """Separable classes and weak strengths: a line search on rounded slopes ended 19% above the minimum, unnoticed."""
    rng, y = np.random.default_rng(1), np.arange(300) % num_classes
    X = rng.normal(size=(300, num_features)) + rng.normal(size=(num_classes, num_features))[y]
    X = torch.from_numpy(X - X.mean(0))
    options = {"num_classes": num_classes, "max_iter": 500}
    [rounded] = logistic_path(X.float(), torch.from_numpy(y), [l2_strength], **options)
    [exact] = logistic_path(X, torch.from_numpy(y), [l2_strength], **options)
    logits = X @ rounded.weight.double() + rounded.bias.double()
    at_rounded = objective(logits, torch.from_numpy(y), rounded.weight, l2_strength)
    assert float(at_rounded) == pytest.approx(exact.objective, rel=1e-3)
