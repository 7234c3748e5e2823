"""Which members to keep: ridge probes of every subset of members, and the cheapest that loses less than a margin.

Every subset is probed by cross-validation (`subset_scores`), and its loss against all members has an interval that
holds for all subsets at once (`paired_losses`). The cheapest subset whose interval ends below the margin is chosen; if
there is none, all members stay.

In what follows a sample is what a score is the mean of: which images are classified correctly, for top-1; for another
metric, its values on bootstrap resamples of the images, the same ones for every subset.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from datasets import DatasetDict

from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.probes.intervals import central_interval, resampled_metrics
from concat_ensemble.probes.metrics import check_metric, metric_value
from concat_ensemble.studies.paired_losses import Losses, mean_interval, paired_losses, resampled_losses
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection_results import MARGIN, Contribution, Selection, Subset
from concat_ensemble.studies.subset_scores import SubsetScorer, join_copies, make_folds, make_scorer

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3)
MAX_MEMBERS = 12  # all 4,095 subsets of so many members are probed; more members are searched greedily
MAX_FLOPS = 5e13  # of an exhaustive search: some minutes on a desktop
FOLDS = 5
QUICK_IMAGES = 1_500

Members = tuple[int, ...]


def select_members(
    table: FeatureTable,
    costs: Sequence[Cost],
    names: Sequence[str],
    *,
    margin: float = MARGIN,
    metric: str = "top1",
    max_members: int | None = None,
    max_gflops: float | None = None,
    max_parameters: float | None = None,
    folds: int = FOLDS,
    l2_strengths: Sequence[float] = L2_STRENGTHS,
    seed: int = 0,
) -> Selection:
    """Probe all subsets of a table's members by ridge (a greedy search where there are too many), and choose one.

    The chosen subset is the cheapest one, by FLOPs, that loses less than the margin against all members, with 95%
    confidence. Where no smaller subset is shown to do so, all members are chosen; where the budget excludes them,
    the best subset within it.

    Args:
        table: With the splits `train` and `validation`, which are pooled; `test` is not read. Images of one group
            (`table.groups`) are never in two folds, and are one draw for the intervals.
        costs, names: One for each member.
        margin: The largest loss that is acceptable, as a share: 0.01 is one point.
        metric: One of `data.naming.METRICS`: what subsets are compared in, and what chooses their L2 strengths.
        max_members, max_gflops, max_parameters: Budget of the chosen subset: members, GFLOPs for one image and
            millions of parameters. Without limits by default.
        folds: Each image is predicted from the other folds.
        l2_strengths: As in `RidgeProbe`. The strength that a fold is scored with is the best one on the other folds.
        seed: Random seed for the folds and the bootstrap.

    Raises:
        ValueError: for a margin that is not between 0 and 1, an unknown metric, a table that cannot be
            cross-validated, or when no subset is within the budget.
    """
    check_metric(metric)
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin} must be between 0 and 1, such as 0.01 for one point.")
    pooled = TableSplit.concatenate([table["train"], table["validation"]])
    rows = join_copies(pooled)
    scorer = make_scorer(rows, make_folds(rows, folds, seed), l2_strengths)
    score_type = _Top1 if metric == "top1" else partial(_Metric, metric)
    search = _Search(score_type(scorer, rows, seed), costs)
    exhaustive = search.num_members <= MAX_MEMBERS and search.exhaustive_flops() <= MAX_FLOPS
    path = search.probe_all() if exhaustive else search.probe_greedily()
    choice = _Choice(search, (max_members, max_gflops, max_parameters), margin)
    probe = {"kind": "ridge", "l2_strengths": list(l2_strengths), "folds": len(scorer.folds), "seed": seed}
    selection = Selection(
        names=list(names),
        feature_dims=table.feature_dims,
        costs=list(costs),
        subsets=sorted(choice.subsets(), key=lambda subset: (-subset.score, subset.cost.gflops)),
        contributions=[choice.contribution(k, shapley=exhaustive) for k in range(search.num_members)],
        similarity=scorer.similarity(),
        best=choice.best,
        greedy_order=[_step(search, smaller, larger) for smaller, larger in itertools.pairwise(path)],
        n_train=len(scorer.folds[0].train),
        n_held_out=len(rows),
        probe=probe if metric == "top1" else probe | {"metric": metric},
        margin=margin,
        over_budget=choice.over_budget,
        n_groups=None if pooled.groups is None else len(np.unique(pooled.groups)),
    )
    if not choice.over_budget:
        selection.undecided, selection.images_needed = choice.what_could_be_settled()
    return selection


def quick_part(dataset: DatasetDict, seed: int) -> DatasetDict:
    """Splits `train` and `validation` of at most `QUICK_IMAGES` training images in all, for a quick selection."""
    number = min(QUICK_IMAGES, len(dataset["train"]))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset["train"]))[:number])
    few = dataset["train"].select(chosen)
    return DatasetDict({"train": few.select(range(0, number, 2)), "validation": few.select(range(1, number, 2))})


class _Score(ABC):
    """How a subset is scored by the out-of-fold scores of its ridge probes."""

    metric: str

    def __init__(self, scorer: SubsetScorer, rows: TableSplit, seed: int):
        self.scorer, self.groups, self.seed = scorer, rows.groups, seed
        self.y = np.unique(rows.labels, return_inverse=True)[1]

    @abstractmethod
    def probe(self, members: Members, cost: Cost) -> Subset:
        """A subset with its score, its sample, and the L2 strength that is best over all folds."""

    @abstractmethod
    def guess(self) -> Subset:
        """The most frequent class of the training rows, which is the best guess without any member."""

    @abstractmethod
    def losses(self, reference: Subset, others: Sequence[Subset]) -> Losses: ...

    @abstractmethod
    def interval(self, sample: np.ndarray) -> tuple[float, float]:
        """95% interval of a score, or of a sum or difference of scores, from its sample."""

    def _guessed(self) -> np.ndarray:
        """(N,) the class number that is guessed for each row."""
        guessed = np.empty(len(self.y), np.int64)
        for train, held_out in self.scorer.folds:
            guessed[held_out] = np.bincount(self.y[train]).argmax()
        return guessed


class _Top1(_Score):
    metric = "top1"

    def probe(self, members, cost):
        correct = self.scorer.correct(members)
        strength = self.scorer.l2_strengths[int(correct.mean(axis=1).argmax())]
        # Each fold has the strength that is best on the others, so that none is chosen by the images it is scored on.
        chosen, total = np.empty(correct.shape[1], bool), correct.sum(axis=1)
        for _, held_out in self.scorer.folds:
            own = correct[:, held_out]
            chosen[held_out] = own[int((total - own.sum(axis=1)).argmax())]
        return Subset(members, float(chosen.mean()), strength, cost, sample=chosen)

    def guess(self):
        correct = self._guessed() == self.y
        return Subset((), float(correct.mean()), 0.0, Cost(0.0, 0.0), sample=correct)

    def losses(self, reference, others):
        return paired_losses(reference.sample, [other.sample for other in others], self.groups, self.seed)

    def interval(self, sample):
        return mean_interval(sample, self.groups)


class _Metric(_Score):
    """Another metric than top-1, of the scores of all rows together."""

    def __init__(self, metric: str, *arguments):
        self.metric = metric
        super().__init__(*arguments)

    def probe(self, members, cost):
        scores = self.scorer.scores(members)
        overall = [metric_value(self.metric, each, self.y) for each in scores]
        chosen = np.empty_like(scores[0])
        for train, held_out in self.scorer.folds:  # as for top-1
            values = [metric_value(self.metric, each[train], self.y[train]) for each in scores]
            chosen[held_out] = scores[int(np.argmax(values)), held_out]
        return self._subset(members, chosen, self.scorer.l2_strengths[int(np.argmax(overall))], cost)

    def guess(self):
        return self._subset((), np.eye(len(np.unique(self.y)))[self._guessed()], 0.0, Cost(0.0, 0.0))

    def _subset(self, members: Members, scores: np.ndarray, strength: float, cost: Cost) -> Subset:
        top1 = float(np.mean(scores.argmax(axis=1) == self.y))
        settings = {"metrics": [self.metric], "groups": self.groups, "seed": self.seed}
        sample = resampled_metrics(scores, self.y, **settings)[self.metric]
        return Subset(members, top1, strength, cost, metric_value(self.metric, scores, self.y), sample=sample)

    def losses(self, reference, others):
        values = np.array([reference.score - other.score for other in others])
        samples = np.stack([reference.sample - other.sample for other in others])
        return resampled_losses(values, samples, self.y, self.groups, self.seed)

    def interval(self, sample):
        return central_interval(sample)


class _Search:
    """The subsets that were probed so far, scored on all images by cross-validation."""

    def __init__(self, score: _Score, costs: Sequence[Cost]):
        self.score, self.costs = score, costs
        self.num_members = len(score.scorer.feature_dims)
        self.everyone: Members = tuple(range(self.num_members))
        self.guess = score.guess()
        self.probed: dict[Members, Subset] = {}

    def probe(self, members: Sequence[int]) -> Subset:
        members = tuple(sorted(members))
        if not members:
            return self.guess
        if members not in self.probed:
            cost = sum((self.costs[k] for k in members), Cost(0.0, 0.0))
            self.probed[members] = self.score.probe(members, cost)
        return self.probed[members]

    def gain(self, members: Sequence[int], others: Sequence[int]) -> tuple[float, np.ndarray]:
        """How much better `members` are than `others`, and its sample."""
        first, second = self.probe(members), self.probe(others)
        return first.score - second.score, first.sample.astype(float) - second.sample

    def probe_all(self) -> list[Members]:
        """Probe all subsets, and return the greedy path."""
        for members in _subsets(self.num_members):
            self.probe(members)
        return self.greedy_path()

    def probe_greedily(self) -> list[Members]:
        """Probe the subsets on the way from no member to all, adding the best one each time, and back, dropping the
        one that is missed least; and the first members. Return the way up."""
        path = self.greedy_path()
        left = self.everyone
        while len(left) > 1:
            rest = [tuple(k for k in left if k != dropped) for dropped in left]
            left = max(rest, key=lambda members: self.probe(members).score)
        for k in range(self.num_members):
            self.probe(range(k + 1))
        return path

    def greedy_path(self) -> list[Members]:
        """No member, the best member, this one and the best beside it, and so on to all members."""
        path: list[Members] = [()]
        for _ in range(self.num_members):
            members = path[-1]
            scores = [-1.0 if k in members else self.probe((*members, k)).score for k in range(self.num_members)]
            path.append((*members, int(np.argmax(scores))))
        return path

    def exhaustive_flops(self) -> float:
        """Floating-point operations of the factorizations for all subsets."""
        scorer = self.score.scorer
        n_train = len(scorer.folds[0].train)
        dims = [sum(scorer.feature_dims[k] for k in members) for members in _subsets(self.num_members)]
        number = len(scorer.l2_strengths) * len(scorer.folds)
        return sum(min(n_train, dim) ** 3 / 3 for dim in dims) * number


class _Choice:
    """The subset that is chosen among those of a search, and what follows for each member."""

    def __init__(self, search: _Search, budget: Sequence[float | None], margin: float):
        self.search, self.budget, self.margin = search, budget, margin
        self.choose()
        # In a greedy search, the chosen subset without one of its members may not have been probed.
        while new := [rest for k in self.best if (rest := self.without(k)) and rest not in search.probed]:
            for members in new:
                search.probe(members)
            self.choose()

    def choose(self) -> None:
        search = self.search
        self.members = [(), *(members for members in search.probed if members != search.everyone)]
        self.losses = self._losses(search.everyone, self.members)
        affordable = [subset for subset in search.probed.values() if _is_affordable(subset, self.budget)]
        if not affordable:
            least = f"{min(c.gflops for c in search.costs):.2f} GFLOPs"
            fewest = f"{min(c.million_parameters for c in search.costs):.1f} million parameters"
            raise ValueError(
                f"no subset is within the budget; the cheapest member has {least} and the smallest {fewest}."
            )
        everyone = search.probe(search.everyone)
        within = [s for s in affordable if s is everyone or self.interval(s.members)[1] < self.margin]
        self.over_budget = not within  # the budget excludes all that is within the margin
        if within:
            best = min(within, key=lambda subset: (subset.cost.gflops, -subset.score))
        else:
            best = max(affordable, key=lambda subset: (subset.score, -subset.cost.gflops))
        self.best: Members = best.members

    def _losses(self, reference: Members, others: Sequence[Members]) -> Losses:
        search = self.search
        return search.score.losses(search.probe(reference), [search.probe(members) for members in others])

    def loss(self, members: Members) -> float:
        """Against all members, which lose nothing themselves."""
        return 0.0 if members == self.search.everyone else float(self.losses.values[self.members.index(members)])

    def interval(self, members: Members) -> tuple[float, float]:
        return (0.0, 0.0) if members == self.search.everyone else self.losses.interval(self.members.index(members))

    def without(self, k: int) -> Members:
        return tuple(other for other in self.best if other != k)

    def subsets(self) -> Iterator[Subset]:
        """All that were probed, with their losses."""
        for members in (*self.members[1:], self.search.everyone):
            yield replace(self.search.probed[members], loss=self.loss(members), loss_interval=self.interval(members))

    def contribution(self, k: int, *, shapley: bool) -> Contribution:
        """What is lost without member `k` and, where all subsets were probed, its Shapley value.

        That is the loss of the chosen members without it against all members; so it is the same for all members that
        are dropped, the loss of dropping them together. Where the budget leaves too few, it is what the member adds
        to the others of the chosen ones.
        """
        if self.over_budget:
            larger = tuple(sorted({*self.best, k}))
            losses = self._losses(larger, [self.without(k)])
            loss, interval = float(losses.values[0]), losses.interval(0)
        else:
            loss, interval = self.loss(self.without(k)), self.interval(self.without(k))
        contribution = Contribution(k, k in self.best, loss, interval, None, None, margin=self.margin)
        if shapley:
            contribution.shapley, sample = _shapley_value(self.search, k)
            contribution.shapley_interval = self.search.score.interval(sample)
        return contribution

    def what_could_be_settled(self) -> tuple[Members | None, int | None]:
        """The subset, cheaper than the chosen one, that the fewest more images could show to be within the margin, and
        about how many. None where all of them lose more than the margin on these images."""
        needed = {}
        for index, members in enumerate(self.members[1:], start=1):
            subset = self.search.probed[members]
            cheaper = subset.cost.gflops < self.search.probed[self.best].cost.gflops
            if cheaper and _is_affordable(subset, self.budget):
                needed[members] = self.losses.images_needed(index, self.margin) - self.losses.num_images
        members = min(needed, key=needed.__getitem__, default=None)
        if members is None or math.isinf(needed[members]):
            return None, None
        return members, max(1, math.ceil(needed[members]))


def _step(search: _Search, smaller: Members, larger: Members) -> tuple[int, float, tuple[float, float]]:
    """The member that was added, and its gain."""
    gain, sample = search.gain(larger, smaller)
    return larger[-1], gain, search.score.interval(sample)


def _subsets(count: int) -> Iterator[Members]:
    """All subsets of `count` members but the empty one, small ones first."""
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(1, count + 1))


def _is_affordable(subset: Subset, budget: Sequence[float | None]) -> bool:
    sizes = len(subset.members), subset.cost.gflops, subset.cost.million_parameters
    return all(limit is None or size <= limit for size, limit in zip(sizes, budget, strict=True))


def _shapley_value(search: _Search, k: int) -> tuple[float, np.ndarray]:
    """Member k's gain, averaged over all orders of adding members, and its sample."""
    count = search.num_members
    others = [other for other in range(count) if other != k]
    value, total = 0.0, np.zeros(len(search.guess.sample))
    for size in range(count):
        share = 1 / (count * math.comb(count - 1, size))  # of the orders in which these members come before k
        for before in itertools.combinations(others, size):
            gain, sample = search.gain([*before, k], before)
            value, total = value + share * gain, total + share * sample
    return value, total
