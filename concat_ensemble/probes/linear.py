"""The linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on validation data."""

import numpy as np
import torch

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import ProbabilityProbe
from concat_ensemble.probes.logistic import logistic_path


class LinearProbe(ProbabilityProbe):
    """Minimises mean negative log-likelihood + l2_strength / 2 * ||coef||^2 for every l2_strength, and keeps the one with the
    best validation top-1. That is scikit-learn's `LogisticRegression` with C = 1 / (N * l2_strength).

    Args:
        l2_strengths: L2 strengths to choose among.
        standardize: Bring every feature to mean 0 and variance 1 first. Not for scores after PCA, where it would be
            whitening.
        cv: Number of folds to choose by, where `fit` is given no validation rows; a fifth of the rows when left out.
        tol: Stop when the objective is about this share of itself above its minimum.
        max_iter: Newton steps for each l2_strength.
        in_memory: Whether the standardised rows are kept there (1.5 times the size of a float32 table); decided by
            what is free when left out.
        seed: Of the validation part, where `fit` is given none.

    Attributes:
        coef_ (C, D), intercept_ (C,): of the standardised features. mean_, scale_ (D,): what standardises them.
        l2_strength_: the one chosen. path_: validation top-1 of each l2_strength
            (empty where there was one to choose from and no validation). n_iter_: most Newton steps of any l2_strength.
    """

    def __init__(
        self,
        l2_strengths=(10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4),
        standardize=True,
        cv=None,
        tol=1e-6,
        max_iter=100,
        in_memory=None,
        seed=0,
    ):
        self.l2_strengths = l2_strengths
        self.standardize = standardize
        self.cv = cv
        self.tol = tol
        self.max_iter = max_iter
        self.in_memory = in_memory
        self.seed = seed

    def _fit(self, train, held):
        whole = train if held is None else TableSplit.concatenate([train, held])
        if not self.l2_strengths or min(self.l2_strengths) <= 0:
            raise ValueError(f"l2_strengths={self.l2_strengths!r} must be numbers above zero.")
        if len(self.l2_strengths) == 1 and held is None:  # nothing to choose
            self.path_, (self.l2_strength_,) = {}, self.l2_strengths
            self.n_iter_ = next(self._solutions(whole, self.l2_strengths))[1].newton_steps
            return
        path, steps = {}, 0
        for fitted, validated in self._cuts(train, held, self.cv, self.seed):
            for l2_strength, solution in self._solutions(fitted, sorted(set(self.l2_strengths), reverse=True)):
                right = self.score(validated)
                path.setdefault(l2_strength, []).append((right, solution, self.classes_))
                steps = max(steps, solution.newton_steps)
        self.path_ = {
            l2_strength: float(np.mean([right for right, *_ in found])) for l2_strength, found in path.items()
        }
        self.l2_strength_ = max(self.path_, key=self.path_.get)  # the strongest of equals: the path begins with it
        self.n_iter_ = steps
        _, nearby, classes = path[self.l2_strength_][-1]
        alike = np.array_equal(classes, np.unique(whole.labels))
        for _ in self._solutions(whole, [self.l2_strength_], (nearby.weight, nearby.bias) if alike else None):
            return

    def _logits(self, rows):
        return (rows - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_

    def _solutions(self, split, l2_strengths, start=None):
        """Solve for each l2_strength in turn and take its coefficients on."""
        self.classes_, numbers = np.unique(split.labels, return_inverse=True)
        mean, scale = moments(split)
        scale = (
            scale if self.standardize else np.ones_like(scale)
        )  # centred in any case: that changes the intercept alone
        standardized = StandardizedFeatures(split, mean, scale, in_memory=self.in_memory)
        labels = torch.from_numpy(numbers).to(standardized.device)
        # With two classes scikit-learn penalises the one difference of the columns, which is half as much as both.
        l2_strengths = {
            l2_strength * (2 if len(self.classes_) == 2 else 1): l2_strength for l2_strength in l2_strengths
        }
        settings = {"classes": len(self.classes_), "start": start, "tol": self.tol, "max_iter": self.max_iter}
        for solution in logistic_path(standardized, labels, list(l2_strengths), **settings):
            self.coef_, self.intercept_ = solution.weight.T.cpu().numpy(), solution.bias.cpu().numpy()
            self.mean_, self.scale_ = mean, scale
            if not self.standardize:
                self.intercept_, self.mean_ = self.intercept_ - self.coef_ @ mean, np.zeros_like(mean)
            yield l2_strengths[solution.l2_strength], solution
