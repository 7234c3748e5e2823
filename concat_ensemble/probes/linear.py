"""The linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on validation data."""

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from concat_ensemble.features import TableSplit
from concat_ensemble.probes.logistic import logistic_path

CHUNK = 8_192  # rows that are held in float64 at a time


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Minimises mean negative log-likelihood + strength / 2 * ||coef||^2 for every strength, and keeps the one with the
    best validation top-1. That is scikit-learn's `LogisticRegression` with C = 1 / (N * strength).

    Args:
        strengths: L2 strengths to choose among.
        standardize: Bring every feature to mean 0 and variance 1 first. Not for scores after PCA, where it would be
            whitening.
        tol: Stop when the objective is about this share of itself above its minimum.
        max_iter: Newton steps for each strength.
        seed: Of the validation part, where `fit` is given none.

    Attributes:
        coef_ (C, D), intercept_ (C,): of the standardised features. mean_, scale_ (D,): what standardises them.
        strength_: the one chosen. path_: validation top-1 of each strength. n_iter_: most Newton steps of any strength.
    """

    def __init__(self, strengths=(10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4), standardize=True, tol=1e-6, max_iter=100, seed=0):
        self.strengths = strengths
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed

    def fit(self, X, y=None, *, validation=None):
        """
        Args:
            X: (N, D) array, or a split of a feature table, which brings its labels. float32 is computed with in
                float32, all else in float64.
            y: (N,) labels.
            validation: A table split or an (X, y) pair on which the strength is chosen; a fifth of the rows when left
                out. The final coefficients are fitted on training and validation rows together.
        """
        X, y = _unpacked(X, y)
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"a probe needs two classes; the training rows have the one class {self.classes_[0]!r}.")
        if validation is None:
            counts = np.unique(y, return_counts=True)[1]
            stratify = y if counts.min() > 1 and len(y) >= 5 * len(counts) else None
            X, X_held, y, y_held = train_test_split(X, y, test_size=0.2, random_state=self.seed, stratify=stratify)
        else:
            X_held, y_held = _unpacked(*validation)
            X_held = validate_data(self, X_held, dtype=[np.float32, np.float64], reset=False)
        self.path_, found = {}, {}
        for solution in self._solutions(X, y, sorted(self.strengths, reverse=True)):
            right = self.classes_[self._scores(X_held).argmax(axis=1)] == y_held
            self.path_[solution.strength] = float(np.mean(right))
            found[solution.strength] = (solution, self.classes_)
        self.strength_ = max(self.path_, key=self.path_.get)  # the strongest of equals: the path begins with it
        self.n_iter_ = max(solution.newton_steps for solution, _ in found.values())
        nearby, classes = found[self.strength_]
        X, y = np.concatenate([X, X_held]), np.concatenate([y, y_held])
        start = (nearby.weight, nearby.bias) if np.array_equal(classes, np.unique(y)) else None
        for _ in self._solutions(X, y, [self.strength_], start):
            return self

    def decision_function(self, X):
        """(N, C) scores, one column for each of `classes_`."""
        check_is_fitted(self)
        return self._scores(validate_data(self, X, dtype=[np.float32, np.float64], reset=False))

    def predict(self, X):
        check_is_fitted(self)
        return self.classes_[self.decision_function(X).argmax(axis=1)]

    def score(self, X, y=None):
        """Top-1 accuracy, as a share."""
        X, y = _unpacked(X, y)
        return float(np.mean(self.predict(X) == y))

    def _scores(self, X):
        return (X - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_

    def _solutions(self, X, y, strengths, start=None):
        """Solve for each strength in turn and take its coefficients on."""
        self.classes_, numbers = np.unique(y, return_inverse=True)
        mean, scale = _moments(X) if self.standardize else (X.mean(axis=0), np.ones(X.shape[1], X.dtype))
        rows = torch.from_numpy((X - mean) / scale)  # centred in any case: that changes the intercept alone
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows, labels = rows.to(device), torch.from_numpy(numbers).to(device)
        # With two classes scikit-learn penalises the one difference of the columns, which is half as much as both.
        strengths = {strength * (2 if len(self.classes_) == 2 else 1): strength for strength in strengths}
        settings = {"classes": len(self.classes_), "start": start, "tol": self.tol, "max_iter": self.max_iter}
        for solution in logistic_path(rows, labels, list(strengths), **settings):
            solution.strength = strengths[solution.strength]
            self.coef_, self.intercept_ = solution.weight.T.cpu().numpy(), solution.bias.cpu().numpy()
            self.mean_, self.scale_ = mean, scale
            if not self.standardize:
                self.intercept_, self.mean_ = self.intercept_ - self.coef_ @ mean, np.zeros_like(mean)
            yield solution


def _moments(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, 1 where it is constant, with sums in float64."""
    mean = X.mean(axis=0, dtype=np.float64)
    squares = sum(((X[n : n + CHUNK] - mean) ** 2).sum(axis=0) for n in range(0, len(X), CHUNK))
    scale = np.sqrt(squares / len(X))
    # A constant column differs from its rounded mean by rounding alone.
    scale[scale <= 1e-6 * np.abs(mean) if X.dtype == np.float32 else scale <= 1e-14 * np.abs(mean)] = 1.0
    scale[scale == 0] = 1.0
    return mean.astype(X.dtype), scale.astype(X.dtype)


def _unpacked(X, y=None):
    return tuple(X) if isinstance(X, TableSplit) else (X, y)
