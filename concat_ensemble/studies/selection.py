"""Which members to keep: ridge probes of every subset of members, what each member adds, and the best for its cost.

A subset's Gram matrix is a part of the whole table's, and its kernel X X' is the sum of its members' kernels. So after
one pass over the rows every subset costs one small factorization for each l2_strength, and no image is read again.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import StratifiedKFold

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.probes.intervals import bootstrap_mean
from concat_ensemble.probes.ridge import Gram
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection_results import NEGLIGIBLE, Contribution, Selection, Subset

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3)
MAX_MEMBERS = 12  # all 4,095 subsets of so many members are probed; more members are searched greedily
MAX_FLOPS = 5e13  # of an exhaustive search: some minutes on a desktop
QUICK_IMAGES, QUICK_FOLDS = 1_500, 5


def select_members(
    table: FeatureTable,
    costs: Sequence[Cost],
    names: Sequence[str],
    *,
    max_members: int | None = None,
    max_gflops: float | None = None,
    max_parameters: float | None = None,
    folds: int | None = None,
    l2_strengths: Sequence[float] = L2_STRENGTHS,
    seed: int = 0,
) -> Selection:
    """Probe all subsets of a table's members by ridge (a greedy search where there are too many), and choose one.

    The chosen subset is the cheapest one, by FLOPs, whose top-1 is within a standard error of the highest, or less
    than half a point below it and not beyond chance: the highest of many subsets is partly luck.

    Args:
        table: With the splits `train` and `validation`; `test` is not read.
        costs, names: One for each member.
        max_members, max_gflops, max_parameters: Budget of the chosen subset: members, GFLOPs for one image and
            millions of parameters. Without limits by default.
        folds: Pool both splits and predict each image from the other folds, which suits few images. By default probes
            are fitted on `train` and scored on `validation`.
        l2_strengths: As in `RidgeProbe`; each subset has its best one.
        seed: Random seed for the folds and the bootstraps.

    Raises:
        ValueError: when no subset is within the budget.
    """
    search = _Search(_split(table, folds, seed), costs, l2_strengths)
    count = len(table.feature_dims)
    exhaustive = count <= MAX_MEMBERS and search.exhaustive_flops() <= MAX_FLOPS
    for members in _subsets(count) if exhaustive else [(k,) for k in range(count)]:
        search.probe(members)
    path = search.greedy_path()
    for k in range(count):  # the first members
        search.probe(range(k + 1))
    budget = max_members, max_gflops, max_parameters
    affordable = [subset for subset in search.probed.values() if _is_affordable(subset, budget)]
    if not affordable:
        least = f"{min(c.gflops for c in costs):.2f} GFLOPs"
        fewest = f"{min(c.million_parameters for c in costs):.1f} million parameters"
        raise ValueError(f"no subset is within the budget; the cheapest member has {least} and the smallest {fewest}.")
    best = _choose(affordable, seed)
    # These may probe more subsets, so they come before the list of all.
    contributions = [_measure_contribution(search, k, best, shapley=exhaustive, seed=seed) for k in range(count)]
    order = []
    for smaller, larger in itertools.pairwise(path):
        gain = search.gain(larger, smaller)
        order.append((larger[-1], float(gain.mean()), bootstrap_mean(gain, seed)))
    return Selection(
        names=list(names),
        feature_dims=table.feature_dims,
        costs=list(costs),
        subsets=sorted(search.probed.values(), key=lambda subset: (-subset.top1, subset.cost.gflops)),
        contributions=contributions,
        similarity=search.scorers[0].similarity(),
        best=best,
        greedy_order=order,
        n_train=search.n_train,
        n_held_out=len(search.guess_correct),
        probe={"kind": "ridge", "l2_strengths": list(l2_strengths), "folds": folds, "seed": seed},
    )


def quick_part(dataset: DatasetDict, seed: int) -> DatasetDict:
    """Splits `train` and `validation` of at most `QUICK_IMAGES` training images in all, for a quick selection."""
    number = min(QUICK_IMAGES, len(dataset["train"]))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset["train"]))[:number])
    few = dataset["train"].select(chosen)
    return DatasetDict({"train": few.select(range(0, number, 2)), "validation": few.select(range(1, number, 2))})


class _Search:
    """The subsets that were probed so far, scored on the held-out images of all splits."""

    def __init__(
        self, splits: list[tuple[TableSplit, TableSplit]], costs: Sequence[Cost], l2_strengths: Sequence[float]
    ):
        self.costs, self.l2_strengths = costs, l2_strengths
        self.feature_dims = [block.shape[1] for block in splits[0][0].blocks]
        self.num_members, self.n_train = len(self.feature_dims), len(splits[0][0])
        self.scorers = [make_scorer(train, held_out, l2_strengths) for train, held_out in splits]
        self.probed: dict[tuple[int, ...], Subset] = {}
        # Without any member the most frequent class is the best guess.
        guesses = []
        for train, held_out in splits:
            classes, counts = np.unique(train.labels, return_counts=True)
            guesses.append(held_out.labels == classes[counts.argmax()])
        self.guess_correct = np.concatenate(guesses)

    def probe(self, members: Sequence[int]) -> Subset:
        members = tuple(sorted(members))
        if members not in self.probed:
            correct = np.concatenate([scorer.correct(members) for scorer in self.scorers], axis=1)
            chosen = int(correct.mean(axis=1).argmax())  # among the l2_strengths
            cost = sum((self.costs[k] for k in members), Cost(0.0, 0.0))
            top1 = float(correct[chosen].mean())
            self.probed[members] = Subset(members, top1, self.l2_strengths[chosen], cost, correct[chosen])
        return self.probed[members]

    def gain(self, members: Sequence[int], others: Sequence[int]) -> np.ndarray:
        """(N,) for each held-out image 1 where only `members` are correct, -1 where only `others` are, else 0."""
        first, second = (self.probe(m).correct if len(m) else self.guess_correct for m in (members, others))
        return first.astype(float) - second

    def greedy_path(self) -> list[tuple[int, ...]]:
        """No member, the best member, this one and the best beside it, and so on to all members."""
        path: list[tuple[int, ...]] = [()]
        for _ in range(self.num_members):
            members = path[-1]
            top1 = [-1.0 if k in members else self.probe((*members, k)).top1 for k in range(self.num_members)]
            path.append((*members, int(np.argmax(top1))))
        return path

    def exhaustive_flops(self) -> float:
        """Floating-point operations of the factorizations for all subsets."""
        dims = [sum(self.feature_dims[k] for k in members) for members in _subsets(self.num_members)]
        return sum(min(self.n_train, dim) ** 3 / 3 for dim in dims) * len(self.l2_strengths) * len(self.scorers)


class _Scorer(ABC):
    """Ridge on any subset of the members, fitted on some rows and scored on held-out ones."""

    def __init__(self, train: TableSplit, held_out: TableSplit, l2_strengths: Sequence[float]):
        self.l2_strengths = l2_strengths
        mean, scale = moments(train)
        rows, self.held_out = (StandardizedFeatures(split, mean, scale) for split in (train, held_out))
        classes, y = np.unique(train.labels, return_inverse=True)
        places = np.searchsorted(classes, held_out.labels).clip(max=len(classes) - 1)
        # A class without training rows is never predicted.
        truth = np.where(classes[places] == held_out.labels, places, -1)
        self.truth = torch.from_numpy(truth).to(rows.device)
        feature_dims = [block.shape[1] for block in train.blocks]
        self.columns = torch.arange(sum(feature_dims), device=rows.device).split(feature_dims)
        self._prepare(rows, torch.from_numpy(y).to(rows.device), len(classes))

    @abstractmethod
    def _prepare(self, rows: StandardizedFeatures, y: torch.Tensor, num_classes: int) -> None:
        """Make the one pass over the training rows (n, D) and their class numbers (n,)."""

    @abstractmethod
    def correct(self, members: Sequence[int]) -> np.ndarray:
        """(l2_strengths, N) bool: which held-out rows are predicted correctly."""

    @abstractmethod
    def _inner_products(self) -> list[list[float]]:
        """||X_a' X_b||^2 for all pairs of members."""

    def similarity(self) -> list[list[float]]:
        """Linear CKA between all pairs of members, on the training rows."""
        inner, members = self._inner_products(), range(len(self.columns))
        return [[inner[a][b] / math.sqrt(inner[a][a] * inner[b][b]) for b in members] for a in members]


class _GramScorer(_Scorer):
    """By Gram matrices (D, D), where there are at least as many rows as features."""

    def _prepare(self, rows, y, num_classes):
        self.gram = Gram.from_rows(rows, y, num_classes)

    def correct(self, members):
        columns = torch.cat([self.columns[k] for k in members])
        weight = torch.cat(list(self.gram.columns(columns).solutions(self.l2_strengths)), 1).to(self.held_out.dtype)
        shares = self.gram.shares.to(weight.dtype)
        correct = torch.empty(len(self.l2_strengths), len(self.held_out), dtype=torch.bool, device=weight.device)
        for rows, chunk in self.held_out.chunks():
            own = chunk if len(columns) == chunk.shape[1] else chunk[:, columns]
            scores = (own @ weight).view(len(chunk), len(self.l2_strengths), -1) + shares
            correct[:, rows] = self.truth[rows] == scores.argmax(2).T
        return correct.cpu().numpy()

    def _inner_products(self):
        products = self.gram.products
        return [[float(products[a][:, b].square().sum()) for b in self.columns] for a in self.columns]


class _KernelScorer(_Scorer):
    """By kernels (n, n), where there are fewer rows than features."""

    def _prepare(self, rows, y, num_classes):
        train, held_out = (torch.cat([chunk for _, chunk in X.chunks()]).double() for X in (rows, self.held_out))
        self.kernels = [train[:, c] @ train[:, c].T / len(rows) for c in self.columns]
        self.held_out_kernels = [held_out[:, c] @ train[:, c].T / len(rows) for c in self.columns]
        one_hot = torch.nn.functional.one_hot(y, num_classes).double()
        self.shares = one_hot.mean(0)
        self.targets = one_hot - self.shares

    def correct(self, members):
        kernel = reduce(torch.add, [self.kernels[k] for k in members])
        held_out = reduce(torch.add, [self.held_out_kernels[k] for k in members])
        weights = Gram(kernel, self.targets, self.shares).solutions(self.l2_strengths)
        correct = [(held_out @ weight + self.shares).argmax(1) == self.truth for weight in weights]
        return torch.stack(correct).cpu().numpy()

    def _inner_products(self):
        return [[float((a * b).sum()) for b in self.kernels] for a in self.kernels]


def make_scorer(train: TableSplit, held_out: TableSplit, l2_strengths: Sequence[float]) -> _Scorer:
    """Scores any subset of the blocks of `train` on the rows of `held_out`, in whichever way is smaller."""
    kind = _GramScorer if len(train) >= train.num_features else _KernelScorer
    return kind(train, held_out, l2_strengths)


def _split(table: FeatureTable, folds: int | None, seed: int) -> list[tuple[TableSplit, TableSplit]]:
    """Pairs of rows to fit on and held-out rows."""
    train, validation = table["train"], table["validation"]
    if folds is None:
        return [(train, validation)]
    pooled = TableSplit.concatenate([train, validation])
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(pooled)), pooled.labels)
    return [(pooled.select(train), pooled.select(held_out)) for train, held_out in splits]


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """All subsets of `count` members but the empty one, small ones first."""
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(1, count + 1))


def _is_affordable(subset: Subset, budget: Sequence[float | None]) -> bool:
    sizes = len(subset.members), subset.cost.gflops, subset.cost.million_parameters
    return all(limit is None or size <= limit for size, limit in zip(sizes, budget, strict=True))


def _choose(subsets: list[Subset], seed: int) -> tuple[int, ...]:
    """The members of the cheapest subset that is as good as the best one."""
    top = max(subsets, key=lambda subset: subset.top1)
    as_good = [subset for subset in subsets if _is_as_good(subset.correct, top.correct, seed)]
    return min(as_good, key=lambda subset: (subset.cost.gflops, -subset.top1)).members


def _is_as_good(correct: np.ndarray, best: np.ndarray, seed: int) -> bool:
    """Whether these predictions lose to the best ones at most a standard error, or little and not beyond chance."""
    loss = best.astype(float) - correct
    negligible = loss.mean() < NEGLIGIBLE and bootstrap_mean(loss, seed)[0] <= 0
    return negligible or loss.mean() <= loss.std() / math.sqrt(len(loss))


def _measure_contribution(search: _Search, k: int, best: tuple[int, ...], *, shapley: bool, seed: int) -> Contribution:
    """What member `k` adds to the chosen members and, where all subsets were probed, its Shapley value."""
    without = [other for other in best if other != k]
    gain = search.gain([*without, k], without)
    contribution = Contribution(k, k in best, float(gain.mean()), bootstrap_mean(gain, seed), None, None)
    if shapley:
        values = _shapley_values(search, k)
        contribution.shapley, contribution.shapley_interval = float(values.mean()), bootstrap_mean(values, seed)
    return contribution


def _shapley_values(search: _Search, k: int) -> np.ndarray:
    """(N,) member k's gain on each held-out image, averaged over all orders of adding members."""
    count = search.num_members
    others = [other for other in range(count) if other != k]
    total = np.zeros(len(search.guess_correct))
    for size in range(count):
        share = 1 / (count * math.comb(count - 1, size))  # of the orders in which these members come before k
        for before in itertools.combinations(others, size):
            total += share * search.gain([*before, k], before)
    return total
