"""The ridge probe: least squares on one-hot targets, in closed form for every l2_strength at once.

For standardised rows x_i (n, D) and one-hot targets t_i (n, C), minimise mean ||t_i - x_i W - b||^2 + s ||W||^2. With the
eigendecomposition X'X / n = V diag(l) V', all l2_strengths cost one product:

    W(s) = V diag(1 / (l + s)) V' X'T / n

With fewer rows than columns V and l come from XX' / n = U diag(l) U', since V = X' U diag(1 / sqrt(n l)). Leaving row i out
changes its own prediction to (p_i - h_i t_i) / (1 - h_i), with the leverage h_i = 1/n + sum_j (XV)_ij^2 / (l_j + s) / n
(Allen's PRESS; scales are not estimated again).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import FeatureProbe


@dataclass
class Gram:
    """What ridge, PCA and CKA need of a table, in float64 from one pass over it: any subset of columns is a part of it."""

    products: torch.Tensor  # (D, D) X'X / n
    targets: torch.Tensor  # (D, C) X'T / n
    shares: torch.Tensor  # (C,) of the rows that each class has: the intercept, since columns have mean 0

    @classmethod
    def from_rows(cls, X: StandardizedFeatures, y: torch.Tensor, classes: int) -> Gram:
        """From rows (n, D) and their class numbers (n,), in one pass."""
        products, targets = (
            torch.zeros(X.shape[1], width, dtype=torch.float64, device=X.device) for width in (X.shape[1], classes)
        )
        for rows, chunk in X.chunks():
            products += chunk.T @ chunk
            targets += chunk.T @ torch.nn.functional.one_hot(y[rows], classes).to(chunk.dtype)
        shares = torch.bincount(y, minlength=classes).double() / len(X)
        return cls(products / len(X), targets / len(X), shares)

    def columns(self, numbers: torch.Tensor) -> Gram:
        return Gram(self.products[numbers][:, numbers], self.targets[numbers], self.shares)

    def solutions(self, l2_strengths: Sequence[float]) -> Iterator[torch.Tensor]:
        """W (D, C) for each l2_strength. A Cholesky factorisation each: up to about ten l2_strengths these are cheaper than the
        eigendecomposition that would serve all."""
        for l2_strength in l2_strengths:
            shifted = self.products.clone()
            shifted.diagonal().add_(l2_strength)
            yield torch.cholesky_solve(self.targets, torch.linalg.cholesky(shifted))


class RidgeProbe(FeatureProbe):
    """Minimises mean squared error to one-hot targets + l2_strength * ||coef||^2, and keeps the l2_strength with the best top-1
    on the validation rows or, without these, by leaving each row out. That is scikit-learn's `Ridge` with alpha =
    N * l2_strength.

    Args:
        l2_strengths: L2 strengths to choose among; more of them cost next to nothing.
        standardize: Bring every feature to mean 0 and variance 1 first.
        in_memory: Whether the standardised rows are kept there; decided by what is free when left out.

    Attributes:
        coef_ (C, D), intercept_ (C,): of the standardised features. mean_, scale_ (D,): what standardises them.
        l2_strength_: the one chosen. path_: top-1 of each l2_strength, on validation rows or by leaving one out.
    """

    def __init__(self, l2_strengths=(10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4), standardize=True, in_memory=None):
        self.l2_strengths = l2_strengths
        self.standardize = standardize
        self.in_memory = in_memory

    def _fit(self, train, held):
        l2_strengths, self.path_ = sorted(self.l2_strengths, reverse=True), {}
        if held is not None:
            eigen = self._prepared(train)
            for l2_strength in l2_strengths:
                self.coef_ = eigen.weight(l2_strength).T.cpu().numpy()
                self.path_[l2_strength] = self.score(held)
        eigen = self._prepared(train if held is None else TableSplit.concatenate([train, held]))
        if held is None:
            self.path_ = dict(zip(l2_strengths, eigen.left_out(l2_strengths), strict=True))
        self.l2_strength_ = max(self.path_, key=self.path_.get)  # the strongest of equals
        self.coef_ = eigen.weight(self.l2_strength_).T.cpu().numpy()

    def _prepared(self, split):
        self.classes_, numbers = np.unique(split.labels, return_inverse=True)
        self.mean_, self.scale_ = moments(split)
        if not self.standardize:
            self.scale_ = np.ones_like(self.scale_)
        eigen = _Eigen(
            StandardizedFeatures(split, self.mean_, self.scale_, in_memory=self.in_memory), numbers, len(self.classes_)
        )
        self.intercept_ = eigen.shares.cpu().numpy()
        return eigen

    def _logits(self, rows):
        return (rows - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_


class _Eigen:
    """The rows' eigendecomposition X'X / n = V diag(l) V', by columns or by rows, whichever are fewer."""

    def __init__(self, rows: StandardizedFeatures, numbers: np.ndarray, classes: int):
        self.rows, self.y = rows, torch.from_numpy(numbers).to(rows.device)
        n, width = rows.shape
        if n >= width:
            gram = Gram.from_rows(rows, self.y, classes)
            self.values, self.vectors = torch.linalg.eigh(gram.products)
            targets, self.shares = gram.targets, gram.shares
        else:
            X = torch.cat([chunk for _, chunk in rows.chunks()]).double()
            values, left = torch.linalg.eigh(X @ X.T / n)
            kept = values > values[-1] * n * torch.finfo(rows.dtype).eps
            self.values, left = values[kept], left[:, kept]
            self.vectors = X.T @ (left / (n * self.values).sqrt())  # X = U diag(sqrt(n l)) V'
            hot = torch.nn.functional.one_hot(self.y, classes).double()
            targets, self.shares = X.T @ hot / n, hot.mean(0)
        self.values, self.targets = self.values.clamp_min(0), self.vectors.T @ targets

    def weight(self, l2_strength: float) -> torch.Tensor:
        """W (D, C)."""
        return self.vectors @ (self.targets / (self.values[:, None] + l2_strength))

    def left_out(self, l2_strengths: Sequence[float]) -> list[float]:
        """Top-1 of each row's prediction by the fit without it."""
        n, right = len(self.rows), [0] * len(l2_strengths)
        for rows, chunk in self.rows.chunks():
            turned = chunk.double() @ self.vectors
            hot = torch.nn.functional.one_hot(self.y[rows], len(self.shares)).double()
            for number, l2_strength in enumerate(l2_strengths):
                shrunk = self.values + l2_strength
                predicted = turned @ (self.targets / shrunk[:, None]) + self.shares
                leverage = (1 / n + (turned.square() / shrunk).sum(1) / n)[:, None]
                right[number] += int(
                    ((predicted - leverage * hot) / (1 - leverage).clamp_min(1e-9)).argmax(1).eq(self.y[rows]).sum()
                )
        return [count / n for count in right]
