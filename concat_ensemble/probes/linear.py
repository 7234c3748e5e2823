"""The linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on validation rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import L2_STRENGTHS, LinearModel, LinearModelMixin, ProbabilityProbe, merge
from concat_ensemble.probes.logistic import Coefficients, Solution, logistic_path


@dataclass(eq=False, repr=False)
class LinearProbe(LinearModelMixin, ProbabilityProbe):
    """Logistic regression with the L2 strength of the best top-1 on validation rows.

    Minimizes mean negative log-likelihood + l2_strength / 2 * ||coef||^2, as scikit-learn's `LogisticRegression` does
    with C = 1 / (N * l2_strength). Of equally good strengths the strongest is chosen, and then fitted on all rows.

    Args:
        l2_strengths: L2 strengths to choose from, per sample.
        standardize: Scale every feature to mean 0 and variance 1 first. Turn it off for PCA scores, which it would
            whiten.
        cv: Number of folds to choose on if `fit` gets no validation rows. Default: one fifth of the rows instead.
        tol: Stop if the objective is above its minimum by about this fraction of itself.
        max_iter: Largest number of Newton steps per strength.
        in_memory: Whether to keep the standardized rows in memory, 1.5 times the size of a float32 table. Default: if
            they fit into half of the free memory.
        seed: Random seed for the folds or the fifth, if `fit` gets no validation rows.

    Attributes:
        coef_ (C, D), intercept_ (C,): Coefficients of the standardized features.
        mean_, scale_ (D,): The features are standardized as (x - mean_) / scale_.
        l2_strength_: The chosen strength.
        path_: Top-1 on validation rows by strength; empty if there was nothing to choose.
        n_iter_: Largest number of Newton steps for a strength.
    """

    l2_strengths: Sequence[float] = L2_STRENGTHS
    standardize: bool = True
    cv: int | None = None
    tol: float = 1e-6
    max_iter: int = 100
    in_memory: bool | None = None
    seed: int = 0

    def _fit(self, train: TableSplit, validation: TableSplit | None) -> None:
        if not self.l2_strengths or min(self.l2_strengths) <= 0:
            raise ValueError(f"l2_strengths={self.l2_strengths!r} must be numbers above zero.")
        rows = merge(train, validation)
        if len(self.l2_strengths) == 1 and validation is None:  # nothing to choose
            self.path_, self.l2_strength_ = {}, self.l2_strengths[0]
            [(model, solution)] = self._solve(rows, self.l2_strengths)
            self.n_iter_ = solution.newton_steps
        else:
            start = self._choose(train, validation, np.unique(rows.labels))
            [(model, _)] = self._solve(rows, [self.l2_strength_], start)
        self._set_model(model)

    def _choose(self, train: TableSplit, validation: TableSplit | None, classes: np.ndarray) -> Coefficients | None:
        """Set `path_`, `l2_strength_` and `n_iter_`; return the chosen solution if it has the given classes."""
        l2_strengths = sorted(set(self.l2_strengths), reverse=True)
        scores, self.n_iter_ = [], 0
        for fit_on, score_on in self._selection_splits(train, validation, self.cv, self.seed):
            path = list(self._solve(fit_on, l2_strengths))
            scores.append([model.score(score_on) for model, _ in path])
            self.n_iter_ = max(self.n_iter_, *(solution.newton_steps for _, solution in path))
        self.path_ = {s: float(np.mean(top1)) for s, top1 in zip(l2_strengths, zip(*scores, strict=True), strict=True)}
        self.l2_strength_ = max(self.path_, key=self.path_.__getitem__)  # the first of equals, which is the strongest
        model, solution = path[l2_strengths.index(self.l2_strength_)]
        return solution if np.array_equal(model.classes, classes) else None

    def _solve(
        self, split: TableSplit, l2_strengths: Sequence[float], start: Coefficients | None = None
    ) -> Iterator[tuple[LinearModel, Solution]]:
        """The model for each strength, with the solution that it comes from."""
        classes, numbers = np.unique(split.labels, return_inverse=True)
        mean, scale = moments(split)
        if not self.standardize:
            scale = np.ones_like(scale)  # the mean is still subtracted; that changes nothing but the intercept
        X = StandardizedFeatures(split, mean, scale, in_memory=self.in_memory)
        y = torch.from_numpy(numbers).to(X.device)
        # With two classes scikit-learn penalizes one difference of columns, which is half as much as the two columns.
        penalties = [s * 2 for s in l2_strengths] if len(classes) == 2 else l2_strengths
        settings = {"num_classes": len(classes), "start": start, "tol": self.tol, "max_iter": self.max_iter}
        for solution in logistic_path(X, y, penalties, **settings):
            coef, intercept = solution.weight.T.cpu().numpy(), solution.bias.cpu().numpy()
            if self.standardize:
                yield LinearModel(classes, coef, intercept, mean, scale), solution
            else:
                yield LinearModel(classes, coef, intercept - coef @ mean, np.zeros_like(mean), scale), solution
