"""Ridge probes of any subset of an ensemble's members by cross-validation, from one pass over the rows.

A subset's Gram matrix is a part of the whole table's, and its kernel X X' is the sum of its members' kernels. The Gram
matrix of a fold's training rows is the sum over the other folds, moved to their own mean. So after one pass over the
rows every subset costs one small factorization for each fold and L2 strength, and no row is read again to fit it.

Every row is predicted by the fit without its fold. Scales are those of all rows, which needs no label; means and
intercepts are those of each fold's training rows. So a fold's fit is scikit-learn's `Ridge(alpha=n * l2_strength)` on
features that were scaled by a `StandardScaler` of all rows, with n training rows.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch.nn.functional import one_hot

from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.ridge import Gram


class Fold(NamedTuple):
    """Numbers of the rows to fit on, and of the held-out ones."""

    train: np.ndarray
    held_out: np.ndarray


def make_folds(rows: TableSplit, number: int, seed: int = 0) -> list[Fold]:
    """Stratified folds by class; rows of one group (`rows.groups`) are in one fold.

    There are fewer folds where no class has `number` rows, or where there are fewer groups. Raises ValueError for a
    table of one class or of one group, which cannot be cross-validated.
    """
    if number < 2:
        raise ValueError(f"folds={number} must be at least 2.")
    if len(np.unique(rows.labels)) < 2:
        raise ValueError("all rows are of one class; there is nothing to choose members by.")
    most, unit = int(np.unique(rows.labels, return_counts=True)[1].max()), "images of one class"
    groups = rows.groups
    if groups is not None:
        most, unit = min(most, len(np.unique(groups))), "groups of images"
    if most < 2:
        raise ValueError(f"cross-validation must have at least 2 {unit} in training and validation; there is 1.")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(min(number, most), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than folds is in some folds only, which is as well as it can be done.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        folds = [Fold(*parts) for parts in splitter.split(np.zeros(len(rows)), rows.labels, groups)]
    return [fold for fold in folds if len(fold.train) and len(fold.held_out)]  # of few groups, one may get none


def join_copies(rows: TableSplit) -> TableSplit:
    """Rows without groups as they are, or where some are copies of others, which a fold would recognize, with a group
    for each different row, named by the first of its copies."""
    if rows.groups is not None:
        return rows
    first: dict[int, int] = {}
    numbers = []
    for start in range(0, len(rows), CHUNK):
        for row in rows.rows(slice(start, start + CHUNK)):
            numbers.append(first.setdefault(hash(row.tobytes()), len(numbers)))
    groups = np.array(numbers) if len(first) < len(rows) else None
    return TableSplit(rows.blocks, rows.labels, rows.keys, groups)


def make_scorer(rows: TableSplit, folds: Sequence[Fold], l2_strengths: Sequence[float]) -> SubsetScorer:
    """Scores any subset of the blocks of `rows`, in whichever way is smaller."""
    kind = GramScorer if len(folds[0].train) >= rows.num_features else KernelScorer
    return kind(rows, folds, l2_strengths)


class SubsetScorer(ABC):
    """Out-of-fold predictions of ridge probes on any subset of the members.

    Args:
        rows: Features and labels of N images. folds: Which of them are held out together.
        l2_strengths: L strengths, as in `RidgeProbe`.
    """

    def __init__(self, rows: TableSplit, folds: Sequence[Fold], l2_strengths: Sequence[float]):
        self.folds, self.l2_strengths = list(folds), list(l2_strengths)
        self.classes, labels = np.unique(rows.labels, return_inverse=True)
        self.feature_dims = [block.shape[1] for block in rows.blocks]
        mean, scale = moments(rows)
        self._held_out = [StandardizedFeatures(rows.select(fold.held_out), mean, scale) for fold in folds]
        self.device, self.dtype = self._held_out[0].device, self._held_out[0].dtype
        self.labels = torch.from_numpy(labels).to(self.device)  # (N,) class numbers
        self._columns = torch.arange(sum(self.feature_dims), device=self.device).split(self.feature_dims)
        self._prepare()

    def correct(self, members: Sequence[int]) -> np.ndarray:
        """(L, N) bool: which rows are predicted correctly with each L2 strength."""
        correct = torch.empty(len(self.l2_strengths), len(self.labels), dtype=torch.bool, device=self.device)
        for numbers, scores in self._scores(members):
            correct[:, numbers] = (scores.argmax(2) == self.labels[numbers, None]).T
        return correct.cpu().numpy()

    def scores(self, members: Sequence[int]) -> np.ndarray:
        """(L, N, C) scores of the classes with each L2 strength. The score of a class that a fold's training rows do
        not have is 0 there, which is never the highest: the scores of a row add up to 1."""
        shape = len(self.l2_strengths), len(self.labels), len(self.classes)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for numbers, scores in self._scores(members):
            out[:, numbers] = scores.transpose(0, 1).to(self.dtype)
        return out.cpu().numpy()

    def similarity(self) -> list[list[float]]:
        """Linear CKA between all pairs of members, on all rows."""
        inner, members = self._inner_products(), range(len(self._columns))
        # A member without any variance has nothing in common with another.
        norms = [[math.sqrt(inner[a][a] * inner[b][b]) for b in members] for a in members]
        return [[inner[a][b] / norms[a][b] if norms[a][b] else float(a == b) for b in members] for a in members]

    def _one_hot(self, numbers: np.ndarray) -> torch.Tensor:
        return one_hot(self.labels[numbers], len(self.classes)).double()

    @abstractmethod
    def _prepare(self) -> None:
        """Make the one pass over the rows."""

    @abstractmethod
    def _scores(self, members: Sequence[int]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The numbers (n,) of some rows and their scores (n, L, C), until all rows had their turn."""

    @abstractmethod
    def _inner_products(self) -> list[list[float]]:
        """||X_a' X_b||^2 for all pairs of members, up to a factor."""


class GramScorer(SubsetScorer):
    """By Gram matrices (D, D), where there are at least as many rows as features."""

    def _prepare(self):
        parts = []
        for fold, rows in zip(self.folds, self._held_out, strict=True):
            gram, number = Gram.from_rows(rows, self.labels[fold.held_out], len(self.classes)), len(rows)
            parts.append((number, gram.products * number, gram.targets * number, gram.shares * number))
        numbers, products, targets, counts = zip(*parts, strict=True)
        self._products = reduce(torch.add, products)
        # Sums over the other folds, not all minus one: nothing is lost by cancellation.
        self._fits = []
        for held_out in range(len(self.folds)):
            others = [fold for fold in range(len(self.folds)) if fold != held_out]
            total = (reduce(torch.add, [part[fold] for fold in others]) for part in (products, targets, counts))
            self._fits.append(_centred(sum(numbers[fold] for fold in others), *total))

    def _scores(self, members):
        columns = torch.cat([self._columns[k] for k in members])
        for fold, rows, (gram, mean) in zip(self.folds, self._held_out, self._fits, strict=True):
            weight = torch.stack(list(gram.columns(columns).solutions(self.l2_strengths)), 1)  # (D, L, C)
            intercept = (gram.shares - torch.einsum("d,dlc->lc", mean[columns], weight)).to(self.dtype)
            weight = weight.flatten(1).to(self.dtype)
            for part, chunk in rows.chunks():
                own = chunk if len(columns) == chunk.shape[1] else chunk[:, columns]
                yield fold.held_out[part], (own @ weight).view(len(own), *intercept.shape) + intercept

    def _inner_products(self):
        return [[float(self._products[a][:, b].square().sum()) for b in self._columns] for a in self._columns]


def _centred(
    number: int, products: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor
) -> tuple[Gram, torch.Tensor]:
    """The Gram matrix of `number` rows about their mean (D,), and this mean, from sums over the rows: X'X (D, D),
    X'T (D, C) and the images of each class (C,). One-hot rows add up to 1, so X'T adds up to the sum of the rows."""
    mean, shares = targets.sum(1) / number, counts / number
    return Gram(
        products / number - torch.outer(mean, mean), targets / number - torch.outer(mean, shares), shares
    ), mean


class KernelScorer(SubsetScorer):
    """By kernels (N, N), where there are fewer rows than features."""

    def _prepare(self):
        numbers = np.concatenate([fold.held_out for fold in self.folds])
        X = torch.empty(len(numbers), sum(self.feature_dims), dtype=torch.float64, device=self.device)
        X[numbers] = torch.cat([chunk.double() for rows in self._held_out for _, chunk in rows.chunks()])
        self._kernels = [X[:, c] @ X[:, c].T for c in self._columns]

    def _scores(self, members):
        kernel = reduce(torch.add, [self._kernels[k] for k in members])
        for train, held_out in self.folds:
            own, across = kernel[train][:, train], kernel[held_out][:, train]
            # Products about the mean of the training rows.
            means, mean = own.mean(0), own.mean()
            own = (own - means - means[:, None] + mean) / len(train)
            across = (across - means - across.mean(1, keepdim=True) + mean) / len(train)
            targets = self._one_hot(train)
            shares = targets.mean(0)
            weights = Gram(own, targets - shares, shares).solutions(self.l2_strengths)
            yield held_out, torch.stack([across @ weight + shares for weight in weights], 1)

    def _inner_products(self):
        return [[float((a * b).sum()) for b in self._kernels] for a in self._kernels]
