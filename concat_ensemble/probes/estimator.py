"""What the probes share: validation of rows and labels, splits for choosing a setting, and class scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from concat_ensemble.features.standardized import CHUNK, moments
from concat_ensemble.features.table import TableSplit

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # that the linear and the ridge probe choose from by default


class FeatureProbe(ClassifierMixin, BaseEstimator):
    """Base class of the probes: a scikit-learn classifier on frozen features, given as arrays or as splits of a table.

    A probe defines `_fit(train, validation)`, which learns from a split and sets `classes_` (`validation` is None if
    there are no validation rows), and `_logits(rows)`, which returns scores (n, C) for a chunk of rows (n, D).
    """

    classes_: np.ndarray  # (C,)

    def fit(
        self, X: TableSplit | ArrayLike, y: ArrayLike | None = None, *, validation: TableSplit | tuple | None = None
    ) -> Self:
        """Choose the settings on validation rows, then fit on all rows.

        Args:
            X: Array (N, D), or a split of a feature table, which has its own labels and may be larger than memory.
                float16 and float32 are computed in float32, everything else in float64.
            y: Class numbers or names (N,).
            validation: A table split or a pair (X, y). Default: a part of the training rows.

        Raises:
            ValueError: If features are NaN or infinite, if there is only one class, if the labels are not classes
                (one-hot rows, fractions), or if the validation rows have other features or members.
        """
        train = self._validate(X, y, reset=True)
        if len(np.unique(train.labels)) < 2:
            raise ValueError(f"a probe needs two classes; the training rows have the one class {train.labels[0]!r}.")
        if validation is not None:
            validation = self._validate(*((validation,) if isinstance(validation, TableSplit) else validation))
        self._fit(train, validation)
        return self

    def logits(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Scores (N, C), one column for each of `classes_`."""
        check_is_fitted(self)
        split = self._validate(X)
        return np.concatenate([self._logits(split.rows(part)) for part in _chunks(split)])

    def decision_function(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Scores (N, C); for two classes (N,), the second score minus the first, as scikit-learn defines it."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """The class (N,) with the highest score."""
        indices = self.logits(X).argmax(axis=1)
        return self.classes_[indices]

    def score(self, X: TableSplit | ArrayLike, y: ArrayLike | None = None) -> float:
        """Top-1 accuracy, from 0 to 1. Rows of a class that is not in the training rows count as wrong."""
        return float(np.mean(self.predict(X) == (X.labels if isinstance(X, TableSplit) else np.asarray(y))))

    def _fit(self, train: TableSplit, validation: TableSplit | None) -> None:
        raise NotImplementedError

    def _logits(self, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _validate(self, X: Any, y: Any = None, *, reset: bool = False) -> TableSplit:
        """X and y as a split. `reset` stores the number of features and the members, which later rows must match."""
        if isinstance(X, TableSplit):
            return self._validate_split(X, reset)
        shape = getattr(y, "shape", ())
        if len(shape) == 2 and shape[1] > 1:
            raise ValueError(f"labels have shape {tuple(shape)} but must be (N,); for one-hot rows: y.argmax(axis=1).")
        if reset:
            self.table_keys_ = None
            X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
            check_classification_targets(y)
        else:
            X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
            check_consistent_length(X, y)
        return TableSplit([np.asarray(X)], np.asarray(y))

    def _validate_split(self, split: TableSplit, reset: bool) -> TableSplit:
        keys, num_features = split.keys, split.num_features
        if reset:
            self.n_features_in_, self.table_keys_ = num_features, keys
        same_members = not self.table_keys_ or not keys or self.table_keys_ == keys
        if num_features != self.n_features_in_ or not same_members:
            raise ValueError(
                f"the table has {num_features} features of members {_short_names(keys)}, but this probe was fitted on "
                f"{self.n_features_in_} of {_short_names(self.table_keys_)}; pass a table of these or fit again."
            )
        for part in _chunks(split):
            bad_rows = np.flatnonzero(~np.isfinite(split.rows(part)).all(axis=1))
            if len(bad_rows):
                row = part.start + bad_rows[0]
                raise ValueError(f"the features of row {row} hold NaN or infinity; drop it or extract in float32.")
        return split

    def _selection_splits(
        self, train: TableSplit, validation: TableSplit | None, folds: int | None = None, seed: int = 0
    ) -> list[tuple[TableSplit, TableSplit]]:
        """The (fit on, score on) pairs on which a setting is chosen: the validation rows if there are any, else
        `folds` folds of the training rows, else one fifth of them, stratified if the classes have enough rows."""
        if validation is not None:
            return [(train, validation)]
        labels, numbers = train.labels, np.arange(len(train))
        counts = np.unique(labels, return_counts=True)[1]
        if folds is not None:
            if not 2 <= folds <= counts.max():
                raise ValueError(f"cv={folds} must be from 2 to the number of images of a class ({counts.max()}).")
            splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(numbers, labels)
        else:
            stratify = labels if counts.min() > 1 and len(labels) >= 5 * len(counts) else None
            splits = [train_test_split(numbers, test_size=0.2, random_state=seed, stratify=stratify)]
        return [(train.select(np.sort(fit_on)), train.select(np.sort(score_on))) for fit_on, score_on in splits]


class ProbabilityProbe(FeatureProbe):
    """A probe whose scores are logits, so that their softmax is a probability."""

    def predict_proba(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Probabilities (N, C)."""
        return softmax(self.logits(X), axis=1)


class LinearModel(NamedTuple):
    """A fitted linear classifier of standardized features."""

    classes: np.ndarray  # (C,)
    coef: np.ndarray  # (C, D)
    intercept: np.ndarray  # (C,)
    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Scores (n, C) of rows (n, D)."""
        return (rows - self.mean) / self.scale @ self.coef.T + self.intercept

    def score(self, split: TableSplit) -> float:
        """Top-1 accuracy on a split, from 0 to 1."""
        indices = np.concatenate([self.logits(split.rows(part)).argmax(axis=1) for part in _chunks(split)])
        return float(np.mean(self.classes[indices] == split.labels))


def renamed_attribute(old: str, new: str) -> property:
    """A read-only property for the name that a fitted attribute had in version 0.1.0; it warns."""

    def read(self):
        value = getattr(self, new)
        warnings.warn(f"{old} is deprecated; use {new}.", FutureWarning, stacklevel=2)
        return value

    return property(read)


class LinearModelMixin:
    """The fitted attributes of a probe that chooses an L2 strength and predicts with a `LinearModel`."""

    strength_ = renamed_attribute("strength_", "l2_strength_")

    def _set_model(self, model: LinearModel) -> None:
        self.classes_, self.coef_, self.intercept_, self.mean_, self.scale_ = model

    def _logits(self, rows: np.ndarray) -> np.ndarray:
        return LinearModel(self.classes_, self.coef_, self.intercept_, self.mean_, self.scale_).logits(rows)


def standardization(split: TableSplit, standardize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale (D,) of a split's features, or 0 and 1 to use the features as they are."""
    if standardize:
        return moments(split)
    dtype = np.float64 if split.dtype == np.float64 else np.float32
    return np.zeros(split.num_features, dtype), np.ones(split.num_features, dtype)


def merge(train: TableSplit, validation: TableSplit | None) -> TableSplit:
    """All rows that a probe is fitted on in the end."""
    return train if validation is None else TableSplit.concatenate([train, validation])


def _chunks(split: TableSplit) -> Iterator[slice]:
    num_rows = split.blocks[0].shape[0]  # where rows come without labels, `labels` is an array of no dimension
    return (slice(start, start + CHUNK) for start in range(0, num_rows, CHUNK))


def _short_names(keys: tuple[str, ...] | None) -> str:
    return "unnamed" if keys is None else ", ".join(key[:8] for key in keys)
