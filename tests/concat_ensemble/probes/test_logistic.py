"""The solver against scikit-learn and the naive formula, on data of many shapes and with many faults."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

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
