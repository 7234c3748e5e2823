"""Which members to keep: ridge probes of every subset from one table, what each member adds, and the best for its cost.

A subset's Gram matrix is a part of the whole table's, and its kernel X X' a sum of its members'. So after one pass over the rows every
subset costs one small factorisation for each l2_strength; the images themselves are not touched again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import StratifiedKFold

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import bootstrap_mean
from concat_ensemble.probes.ridge import Gram
from concat_ensemble.studies.results import Cost

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3)
MOST_MEMBERS = 12  # of which all 4,095 subsets are probed; beyond, a greedy search
MOST_WORK = 5e13  # floating-point operations of an exhaustive search: some minutes on a desk
QUICK_IMAGES, QUICK_FOLDS = 1_500, 5
# tests/benchmarks/quick_selection.py on three members and MNIST: of 95% intervals 84% held the truth at 250 images, 93% at 500 and at 1,000.
FEW_IMAGES = 500
NEGLIGIBLE = 0.005  # of top-1: less than half a point that may well be luck is not worth a member's cost


@dataclass
class Subset:
    """A ridge probe of some members, on rows that it was not fitted on."""

    members: tuple[int, ...]
    top1: float
    l2_strength: float
    cost: Cost
    right: np.ndarray = field(repr=False, compare=False)  # (N,) bool, per held-out image

    def __post_init__(self):
        self.members = tuple(self.members)


@dataclass
class Contribution:
    """What a member adds, in shares of top-1, each with its 95% bootstrap interval over the held-out images."""

    member: int
    chosen: bool
    gain: float  # of the chosen members with it over those without it
    gain_interval: tuple[float, float]
    shapley: (
        float | None
    )  # mean gain over all orders of adding members (Shapley 1953); None where not all subsets were probed
    shapley_interval: tuple[float, float] | None

    @property
    def advice(self) -> str:
        sure = self.gain_interval[0] > 0
        return ("keep" if sure else "not sure") if self.chosen else ("beyond the budget" if sure else "drop")


@dataclass
class Selection:
    """Subsets of an ensemble's members on a dataset, best first, and what follows from them. Accuracies are ridge
    probes' on held-out training images; the test split was never read."""

    names: list[str]
    feature_dims: list[int]
    costs: list[Cost]
    subsets: list[Subset]
    contributions: list[Contribution]
    similarity: list[list[float]]  # linear CKA between members (Kornblith et al. 2019), 1 for the same features
    best: tuple[int, ...]
    order: list[tuple[int, float, tuple[float, float]]]  # greedy: member, its gain over those before, the 95% interval
    n_train: int
    n_held: int
    probe: dict[str, Any]  # how it was probed

    @property
    def protocol(self) -> str:
        """The same eight characters only where it was probed and held out alike."""
        settings = {"probe": self.probe, "images": [self.n_train, self.n_held]}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def __getitem__(self, members: Sequence[int]) -> Subset:
        return next(subset for subset in self.subsets if subset.members == tuple(sorted(members)))

    @property
    def verdict(self) -> str:
        """What to do, in words."""
        whole, best = self[range(len(self.names))], self[self.best]
        sentences = []
        for found in self.contributions if len(self.names) > 1 else []:
            low, high = (100 * bound for bound in found.gain_interval)
            what = {"beyond the budget": "No budget for", "not sure": "Not sure about"}.get(
                found.advice, found.advice.title()
            )
            others = "+".join(str(k) for k in self.best if k != found.member)
            to = f"to {others} it adds" if others else "alone it does better than guessing by"
            sentences.append(
                f"{what} member {found.member} ({self.names[found.member]}): {to} {100 * found.gain:.1f} points [{low:.1f}, {high:.1f}]."
            )
        alike = [(self.similarity[a][b], a, b) for a in range(len(self.names)) for b in range(a)]
        if alike:
            cka, a, b = max(alike)
            sentences.append(f"Most alike are members {b} and {a} (CKA {cka:.2f}).")
        if best is not whole:
            sentences.append(
                f"Members {'+'.join(map(str, best.members))} do {100 * best.top1:.1f} where all {len(self.names)} do {100 * whole.top1:.1f}, "
                f"at {best.cost.gflops:.2f} of {whole.cost.gflops:.2f} GFLOPs."
            )
        return " ".join(sentences)

    @property
    def outlook(self) -> str:
        """For a quick look: where to stop, and how far to believe it."""
        text = f"Stop at K = {len(self.best)}: {'+'.join(map(str, self.best))}."
        unsure = [c for c in self.contributions if c.gain_interval[0] <= 0 and c.gain_interval[1] > NEGLIGIBLE]
        for found in unsure:
            low, high = (100 * bound for bound in found.gain_interval)
            text += f" {self.n_held:,} images cannot tell whether member {found.member} adds {max(low, 0):.1f} or {high:.1f} points."
        if self.n_held < FEW_IMAGES:
            text += f" With fewer than {FEW_IMAGES} images the intervals come out too narrow: believe them less."
        return text

    def save(self, path: Path) -> None:
        content = {"protocol": self.protocol, **dataclasses.asdict(self)}
        for subset in content["subsets"]:
            del subset["right"]
        write_json(path, content)


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
    """Ridge probes of all subsets of a table's members (a greedy search where these are too many), and what to keep.

    The best subset is the cheapest one (by FLOPs) whose top-1 is within a standard error of the best found, or less than half
    a point below it and not surely: of many subsets the best is partly luck.

    Args:
        table: With the splits `train` and `validation`; `test` is not looked at.
        costs, names: One for each member.
        max_members, max_gflops, max_parameters: A budget for what is chosen; parameters in millions.
        folds: Pool both splits and predict each image from the other folds, which is what few images want; else fit on
            `train` and predict `validation`.
        l2_strengths: Of L2, as in `RidgeProbe`; each subset has its best.
        seed: Of the folds and of the bootstraps.

    Raises:
        ValueError: when no subset is within the budget.
    """
    search = _Search(_cuts(table, folds, seed), table, costs, l2_strengths)
    everyone = range(len(table.feature_dims))
    exhaustive = len(everyone) <= MOST_MEMBERS and search.work() <= MOST_WORK
    for members in _all(len(everyone)) if exhaustive else [(k,) for k in everyone]:
        search.probe(members)
    chain = [()]
    while len(chain[-1]) < len(everyone):  # greedy
        left = [k for k in everyone if k not in chain[-1]]
        chain.append((*chain[-1], max(left, key=lambda k: search.probe((*chain[-1], k)).top1)))
    for k in everyone:  # prefixes
        search.probe(everyone[: k + 1])

    affordable = [s for s in search.probed.values() if _within(s, max_members, max_gflops, max_parameters)]
    if not affordable:
        raise ValueError(
            f"no subset is within the budget; the cheapest member has {min(c.gflops for c in costs):.2f} GFLOPs and "
            f"the smallest {min(c.million_parameters for c in costs):.1f} million parameters."
        )
    top = max(affordable, key=lambda s: s.top1)
    as_good = (s for s in affordable if _as_good(s.right, top.right, seed))
    best = min(as_good, key=lambda s: (s.cost.gflops, -s.top1)).members

    contributions = []
    for k in everyone:
        without = [other for other in best if other != k]
        gain = search.gain([*without, k], without)
        shapley = _shapley(search, k) if exhaustive else None
        found = (None, None) if shapley is None else (float(shapley.mean()), bootstrap_mean(shapley, seed))
        contributions.append(Contribution(k, k in best, float(gain.mean()), bootstrap_mean(gain, seed), *found))
    gains = [search.gain(after, before) for before, after in itertools.pairwise(chain)]
    return Selection(
        names=list(names),
        feature_dims=table.feature_dims,
        costs=list(costs),
        subsets=sorted(search.probed.values(), key=lambda s: (-s.top1, s.cost.gflops)),
        contributions=contributions,
        similarity=search.scorers[0].similarity(),
        best=best,
        order=[(chain[n + 1][-1], float(gain.mean()), bootstrap_mean(gain, seed)) for n, gain in enumerate(gains)],
        n_train=search.n_train,
        n_held=len(search.nothing),
        probe={"kind": "ridge", "l2_strengths": list(l2_strengths), "folds": folds, "seed": seed},
    )


def quick_part(dataset: DatasetDict, seed: int) -> DatasetDict:
    """At most `QUICK_IMAGES` training images, and no test images, for a quick look: `train` and `validation`."""
    number = min(QUICK_IMAGES, len(dataset["train"]))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset["train"]))[:number])
    few = dataset["train"].select(drawn)
    return DatasetDict(train=few.select(range(0, number, 2)), validation=few.select(range(1, number, 2)))


class _Search:
    """The subsets that were probed, on the held-out images of all cuts."""

    def __init__(self, cuts, table: FeatureTable, costs: Sequence[Cost], l2_strengths: Sequence[float]):
        self.feature_dims, self.costs, self.l2_strengths = table.feature_dims, costs, l2_strengths
        self.n_train = len(cuts[0][0])
        self.scorers = [_Scorer(fitted, held, table, l2_strengths) for fitted, held in cuts]
        self.probed: dict[tuple[int, ...], Subset] = {}
        # What no member at all gets right: the commonest class.
        guesses = []
        for fitted, held in cuts:
            classes, counts = np.unique(fitted.labels, return_counts=True)
            guesses.append(held.labels == classes[counts.argmax()])
        self.nothing = np.concatenate(guesses)

    def probe(self, members: Sequence[int]) -> Subset:
        members = tuple(sorted(members))
        if members not in self.probed:
            rights = np.concatenate([scorer.right(members) for scorer in self.scorers], axis=1)  # (l2_strengths, N)
            at = int(rights.mean(axis=1).argmax())
            cost = sum((self.costs[k] for k in members), Cost(0.0, 0.0))
            self.probed[members] = Subset(members, float(rights[at].mean()), self.l2_strengths[at], cost, rights[at])
        return self.probed[members]

    def gain(self, members: Sequence[int], others: Sequence[int]) -> np.ndarray:
        """(N,) 1 where only `members` are right, -1 where only `others` are."""
        first, second = (self.probe(m).right if len(m) else self.nothing for m in (members, others))
        return first.astype(float) - second

    def work(self) -> float:
        """Operations of all subsets' factorisations."""
        sizes = (
            min(self.n_train, sum(self.feature_dims[k] for k in members)) for members in _all(len(self.feature_dims))
        )
        return sum(size**3 / 3 for size in sizes) * len(self.l2_strengths) * len(self.scorers)


class _Scorer:
    """Predictions for held-out rows by ridge on any subset of the members. Where rows are fewer than columns, by kernels."""

    def __init__(self, fitted: TableSplit, held: TableSplit, table: FeatureTable, l2_strengths: Sequence[float]):
        self.l2_strengths = l2_strengths
        mean, scale = moments(fitted)
        X, self.held = StandardizedFeatures(fitted, mean, scale), StandardizedFeatures(held, mean, scale)
        classes, numbers = np.unique(fitted.labels, return_inverse=True)
        y = torch.from_numpy(numbers).to(X.device)
        # a class that was never fitted is never predicted
        self.truth = torch.from_numpy(
            np.array([np.flatnonzero(classes == label)[0] if label in classes else -1 for label in held.labels])
        )
        self.truth = self.truth.to(X.device)
        bounds = np.cumsum([0, *table.feature_dims])
        self.columns = [torch.arange(low, high, device=X.device) for low, high in itertools.pairwise(bounds)]
        n, self.num_features = X.shape
        if n >= self.num_features:
            self.gram = Gram.from_rows(X, y, len(classes))
            return
        self.gram = None
        rows, others = (torch.cat([chunk for _, chunk in split.chunks()]).double() for split in (X, self.held))
        self.kernels = [(rows[:, c] @ rows[:, c].T / n, others[:, c] @ rows[:, c].T / n) for c in self.columns]
        hot = torch.nn.functional.one_hot(y, len(classes)).double()
        self.shares = hot.mean(0)
        self.targets = hot - self.shares

    def right(self, members: Sequence[int]) -> np.ndarray:
        """(l2_strengths, N) bool: which held-out rows are predicted right."""
        if self.gram is None:
            kernel, across = (sum(self.kernels[k][which] for k in members) for which in (0, 1))
            found = Gram(kernel, self.targets, self.shares).solutions(self.l2_strengths)
            rights = [(across @ weight + self.shares).argmax(1) == self.truth for weight in found]
            return torch.stack(rights).cpu().numpy()
        columns = torch.cat([self.columns[k] for k in members])
        weight = torch.cat(list(self.gram.columns(columns).solutions(self.l2_strengths)), 1).to(self.held.dtype)
        rights = torch.empty(len(self.l2_strengths), len(self.held), dtype=torch.bool, device=weight.device)
        for rows, chunk in self.held.chunks():
            chosen = chunk if len(columns) == self.num_features else chunk[:, columns]
            scores = (chosen @ weight).view(len(chunk), len(self.l2_strengths), -1) + self.gram.shares.to(weight.dtype)
            rights[:, rows] = self.truth[rows] == scores.argmax(2).T
        return rights.cpu().numpy()

    def similarity(self) -> list[list[float]]:
        if self.gram is None:
            kernels = [kernel for kernel, _ in self.kernels]
            inner = [[float((a * b).sum()) for b in kernels] for a in kernels]
        else:  # ||X_a' X_b||^2, the same number
            inner = [[float(self.gram.products[a][:, b].square().sum()) for b in self.columns] for a in self.columns]
        return [
            [inner[a][b] / math.sqrt(inner[a][a] * inner[b][b]) for b in range(len(inner))] for a in range(len(inner))
        ]


def _cuts(table: FeatureTable, folds: int | None, seed: int) -> list[tuple[TableSplit, TableSplit]]:
    train, validation = table["train"], table["validation"]
    if folds is None:
        return [(train, validation)]
    pooled = TableSplit.concatenate([train, validation])
    cuts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(pooled)), pooled.labels)
    return [(pooled.select(fitted), pooled.select(held)) for fitted, held in cuts]


def _all(count: int) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(1, count + 1))


def _as_good(right: np.ndarray, best: np.ndarray, seed: int) -> bool:
    """Whether what these predictions lose to the best ones is within a standard error, or small and not sure."""
    lost = best.astype(float) - right
    negligible = lost.mean() < NEGLIGIBLE and bootstrap_mean(lost, seed)[0] <= 0
    return negligible or lost.mean() <= lost.std() / math.sqrt(len(lost))


def _shapley(search: _Search, k: int) -> np.ndarray:
    """Member k's mean gain over all orders, image by image."""
    count = len(search.feature_dims)
    others = [other for other in range(count) if other != k]
    total = np.zeros(len(search.nothing))
    for size in range(count):
        share = 1 / (count * math.comb(count - 1, size))  # of the orders in which these are the members before k
        for before in itertools.combinations(others, size):
            total += share * search.gain([*before, k], before)
    return total


def _within(subset: Subset, max_members, max_gflops, max_parameters) -> bool:
    limits = (
        (len(subset.members), max_members),
        (subset.cost.gflops, max_gflops),
        (subset.cost.million_parameters, max_parameters),
    )
    return all(limit is None or value <= limit for value, limit in limits)
