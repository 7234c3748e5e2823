"""The ridge probe: least squares on one-hot targets, in closed form for all L2 strengths at once.

For standardized rows x_i (n, D) and one-hot targets t_i (n, C), minimize mean ||t_i - x_i W - b||^2 + s ||W||^2. With
the eigendecomposition X'X / n = V diag(l) V', each strength s costs one product:

    W(s) = V diag(1 / (l + s)) V' X'T / n

(A) If n >= D, V and l are computed from X'X / n (D, D), which needs one pass over the rows.
(B) If n < D, they are computed from the smaller XX' / n = U diag(l) U' (n, n), as V = X' U diag(1 / sqrt(n l)).

Leaving row i out needs no fit either. It changes the row's prediction p_i to (p_i - h_i t_i) / (1 - h_i), with the
leverage h_i = 1/n + sum_j (XV)_ij^2 / (l_j + s) / n (Allen's PRESS; the scales are not estimated again).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn.functional import one_hot

from concat_ensemble.features.standardized import DOUBLE_ROWS, StandardizedFeatures, kernel, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import (
    SMALL,
    HeldOut,
    LabeledRows,
    Selection,
    search_l2_strengths,
    selection_pairs,
)
from concat_ensemble.probes.estimator import (
    L2_STRENGTHS,
    LinearModel,
    LinearModelMixin,
    WeightedProbe,
    add_predictions,
    row_weights,
    unchosen,
)


@dataclass
class Gram:
    """What ridge, PCA and CKA need of a table, in float64; any subset of the features is a part of it."""

    products: torch.Tensor  # (D, D) X'X / n
    targets: torch.Tensor  # (D, C) X'T / n
    shares: torch.Tensor  # (C,) fraction of the rows in each class: the intercept, since features have mean 0

    @classmethod
    def from_rows(
        cls, X: StandardizedFeatures, y: torch.Tensor, num_classes: int, sample_weight: torch.Tensor | None = None
    ) -> Gram:
        """From rows (n, D), their class numbers (n,), and how often they count (n,), 1 on average; in one pass."""
        if sample_weight is None:
            sample_weight = torch.ones(len(X), dtype=torch.float64, device=X.device)
        products, targets = (
            torch.zeros(X.shape[1], size, dtype=torch.float64, device=X.device) for size in (X.shape[1], num_classes)
        )
        for rows, chunk in X.chunks():
            parts = (tensor.split(DOUBLE_ROWS) for tensor in (chunk, y[rows], sample_weight[rows]))
            for part, labels, weight in zip(*parts, strict=True):
                part = part.double()  # `StandardizedFeatures.gram` says why
                weighted = part * weight[:, None]
                products.addmm_(weighted.T, part)
                targets.addmm_(weighted.T, one_hot(labels, num_classes).double())
        shares = torch.bincount(y, sample_weight, minlength=num_classes) / len(X)
        return cls(products / len(X), targets / len(X), shares)

    def columns(self, numbers: torch.Tensor) -> Gram:
        """The Gram matrix of these features alone."""
        return Gram(self.products[numbers][:, numbers], self.targets[numbers], self.shares)

    def solutions(self, l2_strengths: Sequence[float]) -> Iterator[torch.Tensor]:
        """W (D, C) for each strength, by a Cholesky factorization each: up to about ten of them cost less than the
        eigendecomposition that would serve all strengths.

        The smallest strength that a factorization in float64 withstands is the rounding error of the products' largest
        eigenvalue, which the trace bounds. So much is added as a jitter: 1e-9 for 2,000 standardized features, which
        is nothing beside any strength in use, but more where some rows lie far from those that the features were
        standardized by."""
        size = len(self.products)
        jitter = size * torch.finfo(self.products.dtype).eps * float(self.products.trace())
        for l2_strength in l2_strengths:
            shifted = self.products.clone()
            shifted.diagonal().add_(l2_strength + jitter)
            yield torch.cholesky_solve(self.targets, torch.linalg.cholesky(shifted))


@dataclass(eq=False, repr=False)
class RidgeProbe(LinearModelMixin, WeightedProbe):
    """Least squares on one-hot targets, with the L2 strength of the best metric on held-out rows.

    Minimizes mean squared error + l2_strength * ||coef||^2, as scikit-learn's `Ridge` does with alpha = N *
    l2_strength; with weights, the mean is weighted and N is their sum. Of equally good strengths the strongest is
    chosen, and then fitted on all rows.

    Without validation rows, each row is predicted by the fit without it. But rows with groups are held out by whole
    groups. And fewer than 200 rows are held out in five folds: leaving one of few rows out makes its class rarer than
    the others, which at strong strengths is enough to predict another class.

    The scores estimate the probabilities of the classes and sum to 1, but can leave [0, 1] (the linear probability
    model). `predict_proba` gives the nearest probabilities; they are often exactly 0 or 1 and not calibrated.

    Args:
        l2_strengths: L2 strengths to choose from, per sample; more of them cost almost nothing. If the best of several
            is at an edge, up to three beyond it are tried too.
        standardize: Scale every feature to mean 0 and variance 1 first.
        in_memory: Whether to keep the standardized rows in memory. Default: if they fit into half of the free memory.
        seed: Random seed for the folds or groups to hold out.
        metric: What the strength is chosen by, as for `LinearProbe`. The ranking ones rank by the scores.
        class_weight: "balanced", so that each class counts the same, or weights by class.

    Attributes:
        coef_ (C, D): Coefficients of the standardized features.
        intercept_ (C,): Intercepts of the same.
        mean_ (D,): The features are standardized as (x - mean_) / scale_.
        scale_ (D,): See `mean_`; ones without `standardize`.
        l2_strength_ (float): The chosen strength.
        l2_strengths_ (tuple[float, ...]): The strengths that were tried, from strong to weak.
        at_edge_ (bool): Whether the metric still rose at an edge of these.
        path_ (dict[float, float]): Metric on the held-out rows by strength; empty if there was nothing to choose.
        selection_ (str): Which rows were held out, in words, such as "validation rows" or "leave-one-out".
    """

    l2_strengths: Sequence[float] = L2_STRENGTHS
    standardize: bool = True
    in_memory: bool | None = None
    seed: int = 0
    metric: str = "top1"
    class_weight: dict | str | None = None

    def predict_proba(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Probabilities (N, C): those nearest to the scores, see the docstring of the class."""
        return nearest_probabilities(self.logits(X))

    def predict_log_proba(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Logarithms of the probabilities (N, C), -inf where these are 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None:
        if not self.l2_strengths or min(self.l2_strengths) <= 0:
            raise ValueError(f"l2_strengths={self.l2_strengths!r} must be numbers above zero.")
        grid, rows = sorted(set(self.l2_strengths), reverse=True), train.with_validation(validation)
        solver = self._solver(rows)
        if validation is None and rows.split.groups is None and len(rows) >= SMALL:
            search = search_l2_strengths(grid, lambda strengths: solver.leave_one_out(strengths, self.metric))
            self._set_search(search, "leave-one-out")
        elif len(grid) == 1:
            self._set_search(unchosen(grid[0]), "nothing to choose")
        else:
            self._choose(selection_pairs(train, validation, seed=self.seed), grid, solver.classes)
        self._set_model(solver.model(self.l2_strength_))

    def _choose(self, selection: Selection, grid: Sequence[float], classes: np.ndarray) -> None:
        if not selection.pairs:
            self._set_search(unchosen(grid[0]), selection.name)
            return
        solvers = [(self._solver(fit_on), score_on) for fit_on, score_on in selection.pairs]

        def evaluate(l2_strengths: Sequence[float]) -> list[float]:
            held_out = [HeldOut(self.metric, classes) for _ in l2_strengths]
            for predictions, l2_strength in zip(held_out, l2_strengths, strict=True):
                for solver, score_on in solvers:
                    add_predictions(predictions, solver.model(l2_strength), score_on, as_probabilities=False)
            return [predictions.value() for predictions in held_out]

        self._set_search(search_l2_strengths(grid, evaluate), selection.name)

    def _solver(self, rows: LabeledRows) -> RidgeSolver:
        weights = row_weights(self.class_weight, rows)
        return RidgeSolver(rows, weights, standardize=self.standardize, in_memory=self.in_memory)


def nearest_probabilities(scores: np.ndarray) -> np.ndarray:
    """The probabilities (N, C) with the least squared distance to scores (N, C): max(score - t, 0), with the t of each
    row for which they sum to 1 (Held, Wolfe and Crowder 1974). The class with the highest score stays the first."""
    ordered = -np.sort(-scores, axis=1)
    thresholds = (ordered.cumsum(axis=1) - 1) / np.arange(1, scores.shape[1] + 1)
    num_positive = (ordered > thresholds).sum(axis=1)
    threshold = np.take_along_axis(thresholds, num_positive[:, None] - 1, axis=1)
    probabilities = np.maximum(scores - threshold, 0)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


class RidgeSolver:
    """The eigendecomposition of the standardized rows of a split, which gives the solution for any strength. Rows
    count as often as `weights` (n,) says, by default all the same."""

    def __init__(self, rows: LabeledRows, weights: np.ndarray | None, *, standardize: bool, in_memory: bool | None):
        self.classes, numbers = np.unique(rows.labels, return_inverse=True)
        self.mean, self.scale = moments(rows.split, rows.sample_weight)
        if weights is not None:  # the features must have a weighted mean of 0
            self.mean, _ = moments(rows.split, weights)
        if not standardize:
            self.scale = np.ones_like(self.scale)  # the mean is subtracted all the same
        self.X = StandardizedFeatures(rows.split, self.mean, self.scale, in_memory=in_memory)
        self.y = torch.from_numpy(numbers).to(self.X.device)
        n, num_features = self.X.shape
        weight = torch.ones(n, dtype=torch.float64) if weights is None else torch.from_numpy(weights / weights.mean())
        self.weight, self.sample_weight = weight.to(self.X.device), rows.sample_weight
        if n >= num_features:  # case (A) of the module's docstring
            gram = Gram.from_rows(self.X, self.y, len(self.classes), self.weight)
            values, self.vectors = torch.linalg.eigh(gram.products)
            targets, self.shares = gram.targets, gram.shares
        else:  # case (B)
            root = self.weight.sqrt()[:, None]
            X = self.X.stacked() * root.to(self.X.dtype)
            values, left = torch.linalg.eigh(kernel(X) / n)
            X, nonzero = X.double(), values > values[-1] * n * torch.finfo(torch.float64).eps
            values, left = values[nonzero], left[:, nonzero]
            self.vectors = X.T @ (left / (n * values).sqrt())
            one_hot_targets = one_hot(self.y, len(self.classes)).double() * root
            targets, self.shares = X.T @ one_hot_targets / n, (one_hot_targets * root).mean(0)
        self.values, self.targets = values.clamp_min(0), self.vectors.T @ targets

    def model(self, l2_strength: float) -> LinearModel:
        weight = self.vectors @ (self.targets / (self.values[:, None] + l2_strength))
        return LinearModel(self.classes, weight.T.cpu().numpy(), self.shares.cpu().numpy(), self.mean, self.scale)

    def leave_one_out(self, l2_strengths: Sequence[float], metric: str = "top1") -> list[float]:
        """The metric for each strength, where each row is predicted by the fit without it."""
        n, held_out = len(self.X), [HeldOut(metric, self.classes) for _ in l2_strengths]
        labels = self.classes[self.y.cpu().numpy()]
        for rows, chunk in self.X.chunks():
            rotated, weight = chunk.double() @ self.vectors, self.weight[rows, None] / n
            targets = one_hot(self.y[rows], len(self.classes)).double()
            counts = None if self.sample_weight is None else self.sample_weight[rows]
            for predictions, l2_strength in zip(held_out, l2_strengths, strict=True):
                shifted = self.values + l2_strength
                predicted = rotated @ (self.targets / shifted[:, None]) + self.shares
                leverage = weight * (1 + (rotated.square() / shifted).sum(1, keepdim=True))
                scores = (predicted - leverage * targets) / (1 - leverage).clamp_min(1e-9)
                scores = scores if scores.is_cuda else scores.numpy()
                predictions.add(scores, self.classes, labels[rows], counts)
        return [predictions.value() for predictions in held_out]
