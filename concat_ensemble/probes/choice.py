"""Choosing a setting of a probe: the rows to hold out, the metric of each setting on them, grids of L2 strengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, check_cv, train_test_split

from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.metrics import metric_value, predicted_metric
from concat_ensemble.probes.scores import RANKING_METRICS

SMALL = 200  # labeled rows, below which a setting is chosen by cross-validation
FOLDS = 5
MAX_EXTENSION = 3  # strengths on each side of a grid
Pairs = list[tuple[np.ndarray, np.ndarray]]  # numbers of the rows to fit on and to score on


@dataclass(frozen=True, eq=False)
class LabeledRows:
    """Rows to fit or to score on, and how often each of them counts (N,); None: once."""

    split: TableSplit
    sample_weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def select(self, numbers: np.ndarray) -> LabeledRows:
        """The rows with these numbers."""
        weight = None if self.sample_weight is None else self.sample_weight[numbers]
        return LabeledRows(self.split.select(numbers), weight)

    def counted(self) -> LabeledRows:
        """The rows without those of weight 0."""
        return self if self.sample_weight is None else self.select(np.flatnonzero(self.sample_weight))

    def with_validation(self, validation: TableSplit | None) -> LabeledRows:
        """These rows and the validation rows, each of which counts once: all that a probe is fitted on in the end."""
        if validation is None:
            return self.counted()
        weight = self.sample_weight
        if weight is not None:
            weight = np.concatenate([weight, np.ones(len(validation))])
        return LabeledRows(TableSplit.concatenate([self.split, validation]), weight).counted()


class Selection(NamedTuple):
    """The (fit on, score on) pairs of rows on which a setting is chosen, none if nothing can be held out."""

    name: str  # in words
    pairs: list[tuple[LabeledRows, LabeledRows]]


def selection_pairs(train: LabeledRows, validation: TableSplit | None, cv: Any = None, seed: int = 0) -> Selection:
    """What a setting is chosen on.

    (A) From `SMALL` labeled rows on: the validation rows, or without them one fifth of the rows, or the folds of `cv`.
    (B) With fewer, half of the rows would decide by a few images: folds of the training and validation rows together.

    Folds and the fifth have the classes in equal parts and never separate rows of a group. A row that is the only one
    of its class is always fitted on, and so is a group that is the only one with a class.

    Args:
        train: The training rows. validation: The validation rows, if there are any.
        cv: Number of folds, or a scikit-learn splitter or pairs of row numbers of `train`; used unless (A) has
            validation rows.
        seed: Random seed for the folds or the fifth.

    Raises:
        ValueError: If `cv` is not possible, or if groups leave nothing to hold out.
    """
    rows = train.with_validation(validation)
    is_small = len(rows) < SMALL
    if validation is not None and not is_small:
        return Selection("validation rows", [(train.counted(), LabeledRows(validation))])
    by_group = " by group" if rows.split.groups is not None else ""
    if cv is not None and not isinstance(cv, int):
        pairs = splitter_pairs(train, cv)  # its row numbers include rows of weight 0
    elif cv is not None or is_small:
        pairs = select_pairs(rows, fold_pairs(rows.labels, rows.split.groups, cv, seed))
    else:
        pairs = select_pairs(rows, fifth_pairs(rows.labels, rows.split.groups, seed))
        if pairs:
            return Selection(f"one fifth of the training rows{by_group}", pairs)
    if pairs:
        return Selection(f"{len(pairs)}-fold cross-validation{by_group}", pairs)
    if validation is not None:
        return Selection("validation rows", [(train.counted(), LabeledRows(validation))])
    if by_group:
        raise ValueError(
            "the groups leave no rows to choose a setting on: no class can be fitted in one group and scored in "
            "another; pass validation rows of other groups, one setting instead of several, or rows without groups."
        )
    return Selection("nothing to choose on: each class has one row", [])


def select_pairs(rows: LabeledRows, pairs: Pairs) -> list[tuple[LabeledRows, LabeledRows]]:
    return [(rows.select(fit_on), rows.select(score_on)) for fit_on, score_on in pairs]


def splitter_pairs(rows: LabeledRows, cv: Any) -> list[tuple[LabeledRows, LabeledRows]]:
    """The pairs of a scikit-learn splitter, or of row numbers."""
    splitter: Any = check_cv(cv, rows.labels, classifier=True)
    pairs = select_pairs(rows, list(splitter.split(np.arange(len(rows)), rows.labels, rows.split.groups)))
    pairs = [(fit_on.counted(), score_on.counted()) for fit_on, score_on in pairs]
    for number, (fit_on, score_on) in enumerate(pairs):
        if len(np.unique(fit_on.labels)) < 2 or not len(score_on):
            raise ValueError(f"cv={cv!r} must leave two classes to fit on and rows to score; pair {number} does not.")
    return pairs


def fold_pairs(labels: np.ndarray, groups: np.ndarray | None, number: int | None, seed: int) -> Pairs:
    """Folds with the classes in equal parts: `number`, or at most `FOLDS`; none if nothing can be held out."""
    candidates = np.flatnonzero(~only_of_class(labels, groups))
    counts = np.unique(labels[candidates], return_counts=True)[1]
    most = counts.max(initial=0)
    if groups is not None:
        most = min(most, len(np.unique(groups[candidates])))
    if number is not None and not 2 <= number <= most:
        what = "images of a class" if groups is None else "groups"
        raise ValueError(f"cv={number} must be from 2 to the number of {what} ({most}).")
    number = number or min(FOLDS, int(most))
    if number < 2:
        return []
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(number, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # it is in fewer folds
        splits = splitter.split(candidates, labels[candidates], None if groups is None else groups[candidates])
        score_on = [np.sort(candidates[held_out]) for _, held_out in splits]
    pairs = [(np.setdiff1d(np.arange(len(labels)), held_out), held_out) for held_out in score_on if len(held_out)]
    return [(fit_on, held_out) for fit_on, held_out in pairs if len(np.unique(labels[fit_on])) > 1]


def fifth_pairs(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> Pairs:
    """One pair that holds out one fifth, with the classes in equal parts if they have enough rows."""
    if groups is not None:
        return fold_pairs(labels, groups, None, seed)[:1]
    candidates = np.flatnonzero(~only_of_class(labels, None))
    num_classes = len(np.unique(labels[candidates]))
    if len(candidates) < 5:
        return []
    stratify = labels[candidates] if len(candidates) >= 5 * num_classes else None
    _, held_out = train_test_split(candidates, test_size=0.2, random_state=seed, stratify=stratify)
    return [(np.setdiff1d(np.arange(len(labels)), held_out), np.sort(held_out))]


def only_of_class(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Whether each row (N,) is the only one of its class, or in a group that is the only one with a class."""
    units = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    class_numbers = np.unique(labels, return_inverse=True)[1]
    pairs = np.unique(np.stack([units, class_numbers]), axis=1)  # each (unit, class) once
    num_units = np.bincount(pairs[1])
    return np.isin(units, pairs[0][num_units[pairs[1]] == 1])


class HeldOut:
    """What the fits with one setting predict for held-out rows, and the metric of all these rows together.

    Folds are scored together, since a fold of a few images may have one class only.
    """

    def __init__(self, metric: str, classes: np.ndarray):
        self.metric, self.classes = metric, classes
        self._results: list[np.ndarray] = []  # scores (n, C) for a metric that ranks, else class numbers (n,)
        self._numbers: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(
        self, scores: np.ndarray | torch.Tensor, fitted: np.ndarray, labels: np.ndarray, weight: np.ndarray | None
    ) -> None:
        """Add rows with their scores (n, c) for the c classes that were `fitted`, which may lack some of `classes`."""
        columns = np.searchsorted(self.classes, fitted)
        if self.metric in RANKING_METRICS:
            scores = _to_array(scores)
            result = np.full((len(scores), len(self.classes)), -np.inf, scores.dtype)
            result[:, columns] = scores
        else:
            result = columns[_to_array(scores.argmax(1))]  # of scores on a GPU, one number a row is copied
        self._results.append(result)
        self._numbers.append(np.searchsorted(self.classes, labels))
        self._weights.append(np.ones(len(labels)) if weight is None else weight)

    def value(self) -> float:
        """The metric. The rows of a class that was not fitted count as wrong."""
        results, numbers, weights = (np.concatenate(parts) for parts in (self._results, self._numbers, self._weights))
        compute = metric_value if self.metric in RANKING_METRICS else predicted_metric
        return compute(self.metric, results, numbers, weights)


def _to_array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


class Search(NamedTuple):
    """What was found in a grid of L2 strengths."""

    path: dict[float, float]  # metric by strength, from strong to weak
    l2_strength: float
    at_edge: bool


def search_l2_strengths(grid: Sequence[float], evaluate: Callable[[Sequence[float]], list[float]]) -> Search:
    """The strength of the best metric, of equally good ones the strongest.

    While the best one is at an edge of the grid, up to `MAX_EXTENSION` strengths beyond that edge are tried too, in
    the same steps. The strongest one is not at an edge if it is only as good as the next: it was chosen because
    stronger is simpler, not because the metric rises.

    Args:
        grid: Strengths, from strong to weak.
        evaluate: Computes the metric of some strengths. It is called with the grid, then with one at a time: with
            `weaker` ones in falling order, or `stronger` ones in rising order.
    """
    path = dict(zip(grid, evaluate(grid), strict=True))
    for beyond in (weaker(grid), stronger(grid)):
        for l2_strength in beyond:
            if not is_at_edge(path, weak=l2_strength < grid[-1]):
                break
            [path[l2_strength]] = evaluate([l2_strength])
    path = {s: path[s] for s in sorted(path, reverse=True)}
    at_edge = is_at_edge(path, weak=True) or is_at_edge(path, weak=False)
    return Search(path, best_of(path), at_edge)


def best_of(path: dict[Any, float]) -> Any:
    """The setting of the highest metric, of equally good ones the largest: the strongest, the most neighbors."""
    return max(path, key=lambda setting: (path[setting], setting))


def is_at_edge(path: dict[float, float], *, weak: bool) -> bool:
    """Whether the metric is highest at the weakest or the strongest strength, and lower at the next one."""
    ordered = sorted(path, reverse=not weak)
    return len(ordered) > 1 and bool(max(path.values()) == path[ordered[0]] > path[ordered[1]])


def weaker(grid: Sequence[float]) -> list[float]:
    """Strengths beyond the weak end of a grid."""
    return beyond_end(grid[-2:])


def stronger(grid: Sequence[float]) -> list[float]:
    """Strengths beyond the strong end of a grid."""
    return beyond_end(grid[1::-1])


def beyond_end(last: Sequence[float]) -> list[float]:
    if len(last) < 2:
        return []
    step = last[1] / last[0]
    return [float(f"{last[1] * step**power:.10g}") for power in range(1, MAX_EXTENSION + 1)]
