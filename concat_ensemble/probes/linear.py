"""The linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on held-out rows."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import (
    HeldOut,
    LabeledRows,
    search_l2_strengths,
    selection_pairs,
    stronger,
    weaker,
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
from concat_ensemble.probes.logistic import Coefficients, Solution, logistic_path


@dataclass(eq=False, repr=False)
class LinearProbe(LinearModelMixin, WeightedProbe):
    """Logistic regression with the L2 strength of the best metric on held-out rows.

    Minimizes mean negative log-likelihood + l2_strength / 2 * ||coef||^2, as scikit-learn's `LogisticRegression` does
    with C = 1 / (N * l2_strength); with weights, the mean is weighted and N is their sum. Of equally good strengths
    the strongest is chosen, and then fitted on all rows.

    Args:
        l2_strengths: L2 strengths to choose from, per sample. If the best of several is at an edge, up to three
            beyond it are tried too.
        standardize: Scale every feature to mean 0 and variance 1 first. Turn it off for PCA scores, which it would
            whiten.
        cv: Folds to choose on if `fit` gets no validation rows: their number, a scikit-learn splitter, or pairs of
            row numbers. Default: one fifth of the rows, or five folds if there are fewer than 200 rows.
        tol: Stop if the objective is above its minimum by about this fraction of itself.
        max_iter: Largest number of Newton steps per strength.
        in_memory: Whether to keep the standardized rows in memory, 1.5 times the size of a float32 table. Default: if
            they fit into half of the free memory.
        seed: Random seed for the folds or the fifth.
        metric: What the strength is chosen by: top1, mean_per_class, macro_f1, auroc or average_precision, as
            `metric_value` computes it. The ranking ones rank by probabilities.
        class_weight: "balanced", so that each class counts the same, or weights by class. Default: each row counts
            once.

    Attributes:
        coef_ (C, D): Coefficients of the standardized features.
        intercept_ (C,): Intercepts of the same.
        mean_ (D,): The features are standardized as (x - mean_) / scale_.
        scale_ (D,): See `mean_`; ones without `standardize`.
        l2_strength_ (float): The chosen strength.
        l2_strengths_ (tuple[float, ...]): The strengths that were tried, from strong to weak.
        at_edge_ (bool): Whether the metric still rose at an edge of these.
        path_ (dict[float, float]): Metric on the held-out rows by strength; empty if there was nothing to choose.
        selection_ (str): Which rows were held out, in words, such as "validation rows" or "5-fold cross-validation".
        n_iter_ (int): Largest number of Newton steps for a strength.
    """

    l2_strengths: Sequence[float] = L2_STRENGTHS
    standardize: bool = True
    cv: Any = None
    tol: float = 1e-6
    max_iter: int = 100
    in_memory: bool | None = None
    seed: int = 0
    metric: str = "top1"
    class_weight: dict | str | None = None

    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None:
        if not self.l2_strengths or min(self.l2_strengths) <= 0:
            raise ValueError(f"l2_strengths={self.l2_strengths!r} must be numbers above zero.")
        rows, start, self.n_iter_ = train.with_validation(validation), None, 0
        grid = sorted(set(self.l2_strengths), reverse=True)
        if len(grid) == 1:
            self._set_search(unchosen(grid[0]), "nothing to choose")
        else:
            start = self._choose(train, validation, grid)
        [(model, solution)] = self._solve(rows.split, [self.l2_strength_], start, rows.sample_weight)
        self.n_iter_ = self.n_iter_ or solution.newton_steps
        self._set_model(model)

    def _choose(self, train: LabeledRows, validation: TableSplit | None, grid: Sequence[float]) -> Coefficients | None:
        """Choose the strength; return its solution if it has all classes."""
        selection = selection_pairs(train, validation, self.cv, self.seed)
        if not selection.pairs:
            self._set_search(unchosen(grid[0]), selection.name)
            return None
        classes = np.unique(train.with_validation(validation).labels)
        paths = [SolutionPath(self, fit_on, grid) for fit_on, _ in selection.pairs]
        best: tuple[float, float, Coefficients | None] = (-np.inf, 0.0, None)  # metric, strength and a start

        def evaluate(l2_strengths: Sequence[float]) -> list[float]:
            nonlocal best
            values = []
            for l2_strength in l2_strengths:
                held_out = HeldOut(self.metric, classes)
                for path, (_, score_on) in zip(paths, selection.pairs, strict=True):
                    model, solution = path.solve(l2_strength)
                    add_predictions(held_out, model, score_on, as_probabilities=True)
                    self.n_iter_ = max(self.n_iter_, solution.newton_steps)
                values.append(held_out.value())
                if (values[-1], l2_strength) > best[:2]:
                    best = values[-1], l2_strength, solution if np.array_equal(model.classes, classes) else None
            return values

        self._set_search(search_l2_strengths(grid, evaluate), selection.name)
        return best[2]

    def _solve(
        self,
        split: TableSplit,
        l2_strengths: Sequence[float],
        start: Coefficients | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> Iterator[tuple[LinearModel, Solution]]:
        """The model for each strength, with the solution that it comes from. sample_weight: (N,)."""
        rows = LabeledRows(split, sample_weight).counted()  # a bootstrap resample lacks a third of the rows
        classes, numbers = np.unique(rows.labels, return_inverse=True)
        mean, scale = moments(rows.split, rows.sample_weight)
        if not self.standardize:
            scale = np.ones_like(scale)  # the mean is still subtracted; that changes nothing but the intercept
        X = StandardizedFeatures(rows.split, mean, scale, in_memory=self.in_memory)
        y, weights = torch.from_numpy(numbers).to(X.device), row_weights(self.class_weight, rows)
        weights = None if weights is None else torch.from_numpy(np.asarray(weights, np.float64))
        # With two classes scikit-learn penalizes one difference of columns, which is half as much as the two columns.
        penalties = [s * 2 for s in l2_strengths] if len(classes) == 2 else l2_strengths
        settings = {"start": start, "tol": self.tol, "max_iter": self.max_iter}
        path = logistic_path(X, y, penalties, num_classes=len(classes), sample_weight=weights, **settings)
        for l2_strength, solution in zip(l2_strengths, path, strict=True):
            if not solution.converged:
                message = f"max_iter={self.max_iter} Newton steps were not enough at l2_strength={l2_strength:g}"
                if solution.newton_steps < self.max_iter:
                    message = f"rounding ended the solver before tol={self.tol} at l2_strength={l2_strength:g}"
                remedy = "raise max_iter or tol, or leave out strengths as weak as this one"
                warnings.warn(f"{message}; {remedy}.", ConvergenceWarning, stacklevel=2)
            coef, intercept = solution.weight.T.cpu().numpy(), solution.bias.cpu().numpy()
            if self.standardize:
                yield LinearModel(classes, coef, intercept, mean, scale), solution
            else:
                yield LinearModel(classes, coef, intercept - coef @ mean, np.zeros_like(mean), scale), solution


class SolutionPath:
    """The solutions on some rows for the strengths of a grid and beyond it, each computed when it is asked for.

    The grid and weaker strengths are one path, which goes on where it stopped. Stronger ones, in rising order, are
    another that starts from the first solution of the grid.
    """

    def __init__(self, probe: LinearProbe, rows: LabeledRows, grid: Sequence[float]):
        self._probe, self._rows, self._grid = probe, rows, grid
        self._weaker = probe._solve(rows.split, [*grid, *weaker(grid)], sample_weight=rows.sample_weight)
        self._stronger: Iterator[tuple[LinearModel, Solution]] | None = None
        self._first: Solution | None = None

    def solve(self, l2_strength: float) -> tuple[LinearModel, Solution]:
        """The next solution of the path that the strength is on."""
        if l2_strength <= self._grid[0]:
            model, solution = next(self._weaker)
            self._first = self._first or solution
            return model, solution
        if self._stronger is None:
            strengths, rows = stronger(self._grid), self._rows
            self._stronger = self._probe._solve(rows.split, strengths, self._first, rows.sample_weight)
        return next(self._stronger)
