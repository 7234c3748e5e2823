"""Which members to keep: ridge probes of every subset from one table, what each member adds, and the best for its cost.

A subset's Gram matrix is a part of the whole table's, and its kernel X X' a sum of its members'. So after one pass over the rows every
subset costs one small factorisation for each strength; the images themselves are not touched again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concat_ensemble.feature_table import FeatureTable, TableSplit
from concat_ensemble.probes.design import Design, moments
from concat_ensemble.probes.ridge import Gram

STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3)
MOST_MEMBERS = 12  # of which all 4,095 subsets are probed; beyond, a greedy search
MOST_WORK = 5e13  # floating-point operations of an exhaustive search: some minutes on a desk
BOOTSTRAP = 2_000
QUICK_IMAGES, QUICK_FOLDS = 1_500, 5
NEGLIGIBLE = 0.005  # of top-1: less than half a point that may well be luck is not worth a member's cost


@dataclass
class Cost:
    """Of one image through a member: multiplications and additions count one each."""

    gflops: float
    million_parameters: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gflops + other.gflops, self.million_parameters + other.million_parameters)


@dataclass
class Subset:
    """A ridge probe of some members, on rows that it was not fitted on."""

    members: tuple[int, ...]
    top1: float
    strength: float
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
    widths: list[int]
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
        return text

    def save(self, path: Path) -> None:
        content = {"protocol": self.protocol, **dataclasses.asdict(self)}
        for subset in content["subsets"]:
            del subset["right"]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(path)


def select_members(
    table: FeatureTable,
    costs: Sequence[Cost],
    names: Sequence[str],
    *,
    max_members: int | None = None,
    max_gflops: float | None = None,
    max_parameters: float | None = None,
    folds: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
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
        strengths: Of L2, as in `RidgeProbe`; each subset has its best.
        seed: Of the folds and of the bootstrap.

    Raises:
        ValueError: when no subset is within the budget.
    """
    count = len(table.widths)
    cuts = _cuts(table, folds, seed)
    work = (
        sum(_work(table.widths, subset, len(cuts[0][0])) for subset in _all(count))
        if count <= MOST_MEMBERS
        else math.inf
    )
    scorers = [_Scorer(fitted, held, table, strengths) for fitted, held in cuts]
    labels = np.concatenate([held.labels for _, held in cuts])
    probed: dict[tuple[int, ...], Subset] = {}

    def probe(members) -> Subset:
        members = tuple(sorted(members))
        if members not in probed:
            rights = np.concatenate([scorer.right(members) for scorer in scorers], axis=1)  # (strengths, N)
            at = int(rights.mean(axis=1).argmax())
            cost = sum((costs[k] for k in members), Cost(0.0, 0.0))
            probed[members] = Subset(members, float(rights[at].mean()), strengths[at], cost, rights[at])
        return probed[members]

    everyone = tuple(range(count))
    exhaustive = work * len(strengths) * len(cuts) <= MOST_WORK
    for members in _all(count) if exhaustive else [(k,) for k in everyone]:
        probe(members)
    chain = [()]
    while len(chain[-1]) < count:  # greedy
        left = [k for k in everyone if k not in chain[-1]]
        chain.append((*chain[-1], max(left, key=lambda k: probe((*chain[-1], k)).top1)))
    for k in everyone:  # prefixes
        probe(everyone[: k + 1])

    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), BOOTSTRAP) / len(labels)

    def interval(right: np.ndarray) -> tuple[float, float]:
        """95%, of the mean of a difference (N,) over redrawn images."""
        low, high = np.percentile(weights @ right, [2.5, 97.5])
        return float(low), float(high)

    affordable = [s for s in probed.values() if _within(s, max_members, max_gflops, max_parameters)]
    if not affordable:
        raise ValueError(
            f"no subset is within the budget; the cheapest member has {min(c.gflops for c in costs):.2f} GFLOPs and "
            f"the smallest {min(c.million_parameters for c in costs):.1f} million parameters."
        )
    top = max(affordable, key=lambda s: s.top1)

    def as_good(subset: Subset) -> bool:
        lost = top.right.astype(float) - subset.right
        within_error = lost.mean() <= lost.std() / math.sqrt(len(lost))
        return within_error or (lost.mean() < NEGLIGIBLE and interval(lost)[0] <= 0)

    best = min(filter(as_good, affordable), key=lambda s: (s.cost.gflops, -s.top1)).members

    commonest = [np.unique(fitted.labels, return_counts=True) for fitted, _ in cuts]
    guess = [held.labels == kinds[counts.argmax()] for (kinds, counts), (_, held) in zip(commonest, cuts, strict=True)]
    nothing = np.concatenate(guess).astype(float)

    def right(members) -> np.ndarray:
        return probe(members).right.astype(float) if members else nothing

    contributions = []
    for k in everyone:
        without = [other for other in best if other != k]
        gain = right([*without, k]) - right(without)
        shapley = _shapley(right, count, k) if exhaustive else None
        contributions.append(
            Contribution(
                k,
                k in best,
                float(gain.mean()),
                interval(gain),
                None if shapley is None else float(shapley.mean()),
                None if shapley is None else interval(shapley),
            )
        )
    gains = [right(after) - right(before) for before, after in itertools.pairwise(chain)]
    order = [(chain[n + 1][-1], float(gain.mean()), interval(gain)) for n, gain in enumerate(gains)]
    return Selection(
        names=list(names),
        widths=table.widths,
        costs=list(costs),
        subsets=sorted(probed.values(), key=lambda s: (-s.top1, s.cost.gflops)),
        contributions=contributions,
        similarity=scorers[0].similarity(),
        best=best,
        order=order,
        n_train=len(cuts[0][0]),
        n_held=len(labels),
        probe={"kind": "ridge", "strengths": list(strengths), "folds": folds, "seed": seed},
    )


def quick_part(dataset: DatasetDict, seed: int) -> DatasetDict:
    """At most `QUICK_IMAGES` training images, and no test images, for a quick look: `train` and `validation`."""
    number = min(QUICK_IMAGES, len(dataset["train"]))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset["train"]))[:number])
    few = dataset["train"].select(drawn)
    return DatasetDict(train=few.select(range(0, number, 2)), validation=few.select(range(1, number, 2)))


def member_costs(model: nn.Module) -> list[Cost]:
    """Of each built member of an ensemble, counted in a forward pass of one image."""
    costs = []
    for name, member in model.members.items():
        pixels = torch.zeros(1, *model.config.members[int(name)]["preprocessing"]["input_size"])
        weight = next(member.parameters())
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            member(pixels.to(weight.device, weight.dtype))
        parameters = sum(parameter.numel() for parameter in member.parameters())
        costs.append(Cost(counter.get_total_flops() / 1e9, parameters / 1e6))
    return costs


class _Scorer:
    """Predictions for held-out rows by ridge on any subset of the members. Where rows are fewer than columns, by kernels."""

    def __init__(self, fitted: TableSplit, held: TableSplit, table: FeatureTable, strengths: Sequence[float]):
        self.strengths = strengths
        mean, scale = moments(fitted)
        X, self.held = Design(fitted, mean, scale), Design(held, mean, scale)
        classes, numbers = np.unique(fitted.labels, return_inverse=True)
        y = torch.from_numpy(numbers).to(X.device)
        # a class that was never fitted is never predicted
        self.truth = torch.from_numpy(
            np.array([np.flatnonzero(classes == label)[0] if label in classes else -1 for label in held.labels])
        )
        self.truth = self.truth.to(X.device)
        bounds = np.cumsum([0, *table.widths])
        self.columns = [torch.arange(low, high, device=X.device) for low, high in itertools.pairwise(bounds)]
        n, self.width = X.shape
        if n >= self.width:
            self.gram = Gram.of(X, y, len(classes))
            return
        self.gram = None
        rows, others = (torch.cat([chunk for _, chunk in design.chunks()]).double() for design in (X, self.held))
        self.kernels = [(rows[:, c] @ rows[:, c].T / n, others[:, c] @ rows[:, c].T / n) for c in self.columns]
        hot = torch.nn.functional.one_hot(y, len(classes)).double()
        self.shares = hot.mean(0)
        self.targets = hot - self.shares

    def right(self, members: Sequence[int]) -> np.ndarray:
        """(strengths, N) bool: which held-out rows are predicted right."""
        if self.gram is None:
            kernel, across = (sum(self.kernels[k][which] for k in members) for which in (0, 1))
            found = Gram(kernel, self.targets, self.shares).solutions(self.strengths)
            rights = [(across @ weight + self.shares).argmax(1) == self.truth for weight in found]
            return torch.stack(rights).cpu().numpy()
        columns = torch.cat([self.columns[k] for k in members])
        weight = torch.cat(list(self.gram.columns(columns).solutions(self.strengths)), 1).to(self.held.dtype)
        rights = torch.empty(len(self.strengths), len(self.held), dtype=torch.bool, device=weight.device)
        for rows, chunk in self.held.chunks():
            chosen = chunk if len(columns) == self.width else chunk[:, columns]
            scores = (chosen @ weight).view(len(chunk), len(self.strengths), -1) + self.gram.shares.to(weight.dtype)
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
    pooled = TableSplit.joined([train, validation])
    cuts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(pooled)), pooled.labels)
    return [(pooled.take(fitted), pooled.take(held)) for fitted, held in cuts]


def _all(count: int) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(1, count + 1))


def _work(widths: Sequence[int], members: Sequence[int], rows: int) -> float:
    """Operations of one factorisation."""
    return min(rows, sum(widths[k] for k in members)) ** 3 / 3


def _shapley(right: Callable[[Sequence[int]], np.ndarray], count: int, k: int) -> np.ndarray:
    """Member k's mean gain over all orders, image by image."""
    others = [other for other in range(count) if other != k]
    total = 0.0
    for size in range(count):
        share = 1 / (count * math.comb(count - 1, size))  # of the orders in which these are the members before k
        for before in itertools.combinations(others, size):
            total = total + share * (right([*before, k]) - right(before))
    return total


def _within(subset: Subset, max_members, max_gflops, max_parameters) -> bool:
    limits = (
        (len(subset.members), max_members),
        (subset.cost.gflops, max_gflops),
        (subset.cost.million_parameters, max_parameters),
    )
    return all(limit is None or value <= limit for value, limit in limits)
