"""The ridge probe against scikit-learn's Ridge on one-hot targets, and its leave-one-out against leaving one out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from concat_ensemble import RidgeProbe
from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import LabeledRows
from concat_ensemble.probes.ridge import Gram, RidgeSolver
from tests.concat_ensemble.probes.test_logistic import problems


def naive(X, y, l2_strength, standardize=True):
    mean, scale = X.mean(0), np.where(X.std(0) > 1e-12, X.std(0), 1) if standardize else 1.0
    model = Ridge(alpha=l2_strength * len(X), solver="svd").fit((X - mean) / scale, np.eye(y.max() + 1)[y])
    return lambda new: model.predict((new - mean) / scale)


@settings(max_examples=60)
@given(problems(), st.booleans())
def test_equals_scikit_learn(problem, standardize):
    X, y, _, l2_strength = problem
    probe = RidgeProbe(l2_strengths=[l2_strength], standardize=standardize).fit(X, y)
    expected = naive(X, y, l2_strength, standardize)(X)
    np.testing.assert_allclose(probe.logits(X), expected, atol=1e-5)
    assert probe.l2_strength_ == l2_strength and probe.coef_.shape == (y.max() + 1, X.shape[1])


@settings(max_examples=20)
@given(problems())
def test_leave_one_out_in_closed_form_equals_refitting(problem):
    """The scales are those of all rows, as the docstring says, so they are computed first."""
    X, y, classes, l2_strength = problem
    X = (X - X.mean(0)) / np.where(X.std(0) > 1e-12, X.std(0), 1)
    correct = 0.0
    for n in range(len(X)):
        others = np.arange(len(X)) != n
        # alpha stays N * l2_strength: leaving a row out removes its loss, not a share of the penalty
        model = Ridge(alpha=l2_strength * len(X), solver="svd").fit(X[others], np.eye(classes)[y[others]])
        scores = np.sort(model.predict(X[n : n + 1])[0])
        if scores[-1] - scores[-2] < 1e-9:
            return  # a tie is decided by rounding
        correct += model.predict(X[n : n + 1])[0].argmax() == y[n]
    solver = RidgeSolver(LabeledRows(TableSplit([X], y)), None, standardize=False, in_memory=None)
    assert solver.leave_one_out([l2_strength]) == pytest.approx([correct / len(X)], abs=1e-9)


def test_from_200_rows_on_one_row_is_left_out_at_a_time():
    X, y = clouds(210)
    probe = RidgeProbe().fit(X, y)
    solver = RidgeSolver(LabeledRows(TableSplit([X], y)), None, standardize=True, in_memory=None)
    assert probe.selection_ == "leave-one-out"
    assert list(probe.path_.values()) == solver.leave_one_out(list(probe.path_))


def clouds(number, seed=0, classes=3, columns=8):
    rng = np.random.default_rng(seed)
    y = np.arange(number) % classes
    return (np.random.default_rng(9).normal(size=(classes, columns))[y] + rng.normal(size=(number, columns))), y


def test_strength_is_chosen_on_validation_rows_and_fitted_on_all():
    (X, y), (X_held, y_held) = clouds(120), clouds(80, seed=1)
    probe = RidgeProbe(l2_strengths=[0.01, 1.0, 100.0]).fit(X, y, validation=(X_held, y_held))
    expected = {s: np.mean(naive(X, y, s)(X_held).argmax(1) == y_held) for s in (100.0, 1.0, 0.01)}
    assert {s: probe.path_[s] for s in expected} == pytest.approx(expected)
    assert probe.selection_ == "validation rows"
    together = naive(np.vstack([X, X_held]), np.concatenate([y, y_held]), probe.l2_strength_)
    np.testing.assert_allclose(probe.logits(X), together(X), atol=1e-8)


def test_a_part_of_a_gram_matrix_is_that_of_the_features_alone():
    X, y = clouds(50)
    X = torch.from_numpy(X - X.mean(0))
    columns = torch.tensor([1, 4, 5])
    part = Gram.from_rows(StandardizedFeatures.from_tensor(X), torch.from_numpy(y), 3).columns(columns)
    own = Gram.from_rows(StandardizedFeatures.from_tensor(X[:, columns].contiguous()), torch.from_numpy(y), 3)
    for a, b in zip(part.solutions([1.0, 0.01]), own.solutions([1.0, 0.01]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [8, 300])
def test_a_streamed_table_in_half_precision_gives_the_same(columns):
    X, y = clouds(200, columns=columns)
    half = X.astype(np.float16)
    table = TableSplit([half[:, :3], half[:, 3:]], y)
    streamed, in_memory = (RidgeProbe(in_memory=way).fit(table) for way in (False, True))
    np.testing.assert_allclose(streamed.coef_, in_memory.coef_, atol=1e-6)
    plain = RidgeProbe().fit(half.astype(np.float32), y)
    np.testing.assert_allclose(streamed.logits(table), plain.logits(half.astype(np.float32)), atol=1e-5)


@parametrize_with_checks(
    [RidgeProbe(), RidgeProbe((0.1,), class_weight="balanced")],
    expected_failed_checks=lambda probe: (
        {"check_sample_weight_equivalence_on_dense_data": "leaving a row out is not leaving out one of its copies"}
        if len(probe.l2_strengths) > 1
        else {}
    ),
)
def test_keeps_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("outlier", [1.0, 4e3, 1e6])
def test_a_gram_matrix_of_ill_conditioned_features_is_solved(outlier):
    """Repeated features beside one with a large |z| on these rows; the weights are those of least squares."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 20)).astype(np.float32), np.arange(400) % 3
    X[:, 10:] = X[:, :10]
    X[::7, 0] = outlier
    gram = Gram.from_rows(StandardizedFeatures.from_tensor(torch.from_numpy(X)), torch.from_numpy(y), 3)
    (weight,) = gram.solutions([1e-4])
    rows = np.vstack([X.astype(np.float64), np.sqrt(400 * 1e-4) * np.eye(20)])
    expected = np.linalg.lstsq(rows, np.vstack([np.eye(3)[y], np.zeros((20, 3))]), rcond=None)[0]
    np.testing.assert_allclose(weight[1:10].numpy(), expected[1:10], rtol=2e-2, atol=1e-5)


def test_fewer_float32_rows_than_features_keep_small_eigenvalues():
    """They were cut at the rounding of float32, although the kernel is computed in float64."""
    X, y = clouds(30, columns=80)
    X[:, 1:] *= 1e-3
    X = X.astype(np.float32)
    probe = RidgeProbe(l2_strengths=[1e-6], standardize=False).fit(X, y)
    np.testing.assert_allclose(probe.logits(X), naive(X.astype(float), y, 1e-6, standardize=False)(X), atol=1e-5)
