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
from torch.nn.functional import one_hot

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import L2_STRENGTHS, FeatureProbe, LinearModel, LinearModelMixin, merge


@dataclass
class Gram:
    """What ridge, PCA and CKA need of a table, in float64; any subset of the features is a part of it."""

    products: torch.Tensor  # (D, D) X'X / n
    targets: torch.Tensor  # (D, C) X'T / n
    shares: torch.Tensor  # (C,) fraction of the rows in each class: the intercept, since features have mean 0

    @classmethod
    def from_rows(cls, X: StandardizedFeatures, y: torch.Tensor, num_classes: int) -> Gram:
        """From rows (n, D) and their class numbers (n,), in one pass."""
        products, targets = (
            torch.zeros(X.shape[1], size, dtype=torch.float64, device=X.device) for size in (X.shape[1], num_classes)
        )
        for rows, chunk in X.chunks():
            products += chunk.T @ chunk
            targets += chunk.T @ one_hot(y[rows], num_classes).to(chunk.dtype)
        shares = torch.bincount(y, minlength=num_classes).double() / len(X)
        return cls(products / len(X), targets / len(X), shares)

    def columns(self, numbers: torch.Tensor) -> Gram:
        """The Gram matrix of these features alone."""
        return Gram(self.products[numbers][:, numbers], self.targets[numbers], self.shares)

    def solutions(self, l2_strengths: Sequence[float]) -> Iterator[torch.Tensor]:
        """W (D, C) for each strength, by a Cholesky factorization each: up to about ten of them cost less than the
        eigendecomposition that would serve all strengths."""
        for l2_strength in l2_strengths:
            shifted = self.products.clone()
            shifted.diagonal().add_(l2_strength)
            yield torch.cholesky_solve(self.targets, torch.linalg.cholesky(shifted))


@dataclass(eq=False, repr=False)
class RidgeProbe(LinearModelMixin, FeatureProbe):
    """Least squares on one-hot targets, with the L2 strength of the best top-1 on validation rows.

    Minimizes mean squared error + l2_strength * ||coef||^2, as scikit-learn's `Ridge` does with alpha = N *
    l2_strength. Without validation rows, each row is predicted by the fit without it. Of equally good strengths the
    strongest is chosen, and then fitted on all rows.

    Args:
        l2_strengths: L2 strengths to choose from, per sample; more of them cost almost nothing.
        standardize: Scale every feature to mean 0 and variance 1 first.
        in_memory: Whether to keep the standardized rows in memory. Default: if they fit into half of the free memory.

    Attributes:
        coef_ (C, D), intercept_ (C,): Coefficients of the standardized features.
        mean_, scale_ (D,): The features are standardized as (x - mean_) / scale_.
        l2_strength_: The chosen strength.
        path_: Top-1 by strength, on validation rows or by leaving one out.
    """

    l2_strengths: Sequence[float] = L2_STRENGTHS
    standardize: bool = True
    in_memory: bool | None = None

    def _fit(self, train: TableSplit, validation: TableSplit | None) -> None:
        l2_strengths = sorted(self.l2_strengths, reverse=True)
        solver = RidgeSolver(train, standardize=self.standardize, in_memory=self.in_memory)
        if validation is None:
            self.path_ = dict(zip(l2_strengths, solver.leave_one_out(l2_strengths), strict=True))
        else:
            self.path_ = {s: solver.model(s).score(validation) for s in l2_strengths}
            rows = merge(train, validation)
            solver = RidgeSolver(rows, standardize=self.standardize, in_memory=self.in_memory)
        self.l2_strength_ = max(self.path_, key=self.path_.__getitem__)  # the first of equals, which is the strongest
        self._set_model(solver.model(self.l2_strength_))


class RidgeSolver:
    """The eigendecomposition of a split's standardized rows, which gives the solution for any strength."""

    def __init__(self, split: TableSplit, *, standardize: bool, in_memory: bool | None):
        self.classes, numbers = np.unique(split.labels, return_inverse=True)
        self.mean, self.scale = moments(split)
        if not standardize:
            self.scale = np.ones_like(self.scale)  # the mean is subtracted all the same
        self.X = StandardizedFeatures(split, self.mean, self.scale, in_memory=in_memory)
        self.y = torch.from_numpy(numbers).to(self.X.device)
        n, num_features = self.X.shape
        if n >= num_features:  # case (A) of the module's docstring
            gram = Gram.from_rows(self.X, self.y, len(self.classes))
            values, self.vectors = torch.linalg.eigh(gram.products)
            targets, self.shares = gram.targets, gram.shares
        else:  # case (B)
            X = torch.cat([chunk for _, chunk in self.X.chunks()]).double()
            values, left = torch.linalg.eigh(X @ X.T / n)
            nonzero = values > values[-1] * n * torch.finfo(self.X.dtype).eps
            values, left = values[nonzero], left[:, nonzero]
            self.vectors = X.T @ (left / (n * values).sqrt())
            one_hot_targets = one_hot(self.y, len(self.classes)).double()
            targets, self.shares = X.T @ one_hot_targets / n, one_hot_targets.mean(0)
        self.values, self.targets = values.clamp_min(0), self.vectors.T @ targets

    def model(self, l2_strength: float) -> LinearModel:
        weight = self.vectors @ (self.targets / (self.values[:, None] + l2_strength))
        return LinearModel(self.classes, weight.T.cpu().numpy(), self.shares.cpu().numpy(), self.mean, self.scale)

    def leave_one_out(self, l2_strengths: Sequence[float]) -> list[float]:
        """Top-1 for each strength, where each row is predicted by the fit without it."""
        n, correct = len(self.X), [0] * len(l2_strengths)
        for rows, chunk in self.X.chunks():
            rotated = chunk.double() @ self.vectors
            targets = one_hot(self.y[rows], len(self.classes)).double()
            for index, l2_strength in enumerate(l2_strengths):
                shifted = self.values + l2_strength
                predicted = rotated @ (self.targets / shifted[:, None]) + self.shares
                leverage = (1 / n + (rotated.square() / shifted).sum(1) / n)[:, None]
                predicted_without = (predicted - leverage * targets) / (1 - leverage).clamp_min(1e-9)
                correct[index] += int(predicted_without.argmax(1).eq(self.y[rows]).sum())
        return [count / n for count in correct]
