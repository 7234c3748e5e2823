"""What the probes share: validation of rows and labels, weights of rows and classes, and class scores."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, validate_data

from concat_ensemble.features.standardized import CHUNK, moments
from concat_ensemble.features.table import TableSplit, shorten_key
from concat_ensemble.probes.choice import HeldOut, LabeledRows, Search
from concat_ensemble.probes.scores import RANKING_METRICS, check_metric
from concat_ensemble.probes.threads import pass_threads

L2_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # that the linear and the ridge probe choose from by default


class FeatureProbe(ClassifierMixin, BaseEstimator, ABC):
    """Base class of the probes: a scikit-learn classifier on frozen features, given as arrays or as splits of a table.

    A probe defines `_fit(train, validation)`, which learns from rows and sets `classes_` (`validation` is None if
    there are no validation rows), and `_logits(split)`, which returns scores (N, C).

    Attributes:
        classes_ (C,): The classes of the training and validation rows.
        n_features_in_ (int): Number of features.
    """

    classes_: np.ndarray
    metric: str = "top1"  # parameters of the probes, except that a probe without settings has no metric
    class_weight: dict | str | None = None

    def fit(
        self, X: TableSplit | ArrayLike, y: ArrayLike | None = None, *, validation: TableSplit | tuple | None = None
    ) -> Self:
        """Choose the settings on validation rows, then fit on all rows.

        With fewer than 200 training and validation rows together, the settings are chosen by cross-validation over
        all of them. Rows of one group of a table split are never separated.

        Args:
            X: Array (N, D), or a split of a feature table, which has its own labels and may be larger than memory.
                float16 and float32 are computed in float32, everything else in float64.
            y: Class numbers or names (N,).
            validation: A table split or a pair (X, y). Default: a part of the training rows.

        Raises:
            ValueError: If features are NaN or infinite, if there is only one class, if the labels are not classes
                (one-hot rows, fractions), if the validation rows have other features or members, if the metric or
                the class weights are unknown, or if the groups leave no rows to choose on.
        """
        return self._fit_validated(X, y, validation, None)

    def logits(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Scores (N, C), one column for each of `classes_`."""
        check_is_fitted(self)
        split = self._validate(X)
        with pass_threads(split.blocks[0].shape[0], split.num_features, len(self.classes_)):
            return self._logits(split)

    def decision_function(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Scores (N, C); for two classes (N,), the second score minus the first, as scikit-learn defines it."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """The class (N,) with the highest score."""
        indices = self.logits(X).argmax(axis=1)
        return self.classes_[indices]

    def predict_proba(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Probabilities (N, C): the softmax of the scores."""
        return softmax(self.logits(X), axis=1)

    def predict_log_proba(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Logarithms of the probabilities (N, C), which unlike the scores can be compared between rows."""
        return log_softmax(self.logits(X), axis=1)

    def score(
        self, X: TableSplit | ArrayLike, y: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> float:
        """Top-1 accuracy, from 0 to 1. Rows of a class that is not in the training rows count as wrong."""
        labels = X.labels if isinstance(X, TableSplit) else np.asarray(y)
        return float(accuracy_score(labels, self.predict(X), sample_weight=sample_weight))

    @abstractmethod
    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None: ...

    @abstractmethod
    def _logits(self, split: TableSplit) -> np.ndarray: ...

    def _fit_validated(self, X: Any, y: Any, validation: Any, sample_weight: Any) -> Self:
        check_metric(self.metric)
        train = LabeledRows(self._validate(X, y, reset=True))
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, train.split.blocks[0].shape[0])
            train = LabeledRows(train.split, weight)
        labels = train.counted().labels
        num_classes = len(np.unique(labels))
        if num_classes < 2:
            raise ValueError(
                f"a probe needs two classes; the training rows have the one class {labels.tolist()[0]!r}."
            )
        if validation is not None:
            validation = self._validate(*((validation,) if isinstance(validation, TableSplit) else validation))
        class_weights(self.class_weight, train.with_validation(validation))  # raises
        with pass_threads(len(labels), train.split.num_features, num_classes):
            self._fit(train, validation)
        return self

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
        for part in chunk_slices(split):
            bad_rows = np.flatnonzero(~np.isfinite(split.rows(part)).all(axis=1))
            if len(bad_rows):
                row = part.start + bad_rows[0]
                raise ValueError(f"the features of row {row} hold NaN or infinity; drop it or extract in float32.")
        return split


class WeightedProbe(FeatureProbe):
    """A probe whose rows can count more or less."""

    def fit(
        self,
        X: TableSplit | ArrayLike,
        y: ArrayLike | None = None,
        *,
        validation: TableSplit | tuple | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Choose the settings on validation rows, then fit on all rows; see `FeatureProbe.fit`.

        Args:
            X, y, validation: As for every probe.
            sample_weight: (N,) how often each training row counts, also in the mean and the deviation of the features
                and where a setting is chosen. Rows with weight 0 are left out. Validation rows count once.

        Raises:
            ValueError: As every probe, or if weights are negative, all zero or of another number than the rows.
        """
        return self._fit_validated(X, y, validation, sample_weight)


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

    def _set_search(self, search: Search, selection: str) -> None:
        self.path_, self.l2_strength_, self.at_edge_ = search
        self.l2_strengths_, self.selection_ = tuple(self.path_) or (self.l2_strength_,), selection

    def _logits(self, split: TableSplit) -> np.ndarray:
        model = LinearModel(self.classes_, self.coef_, self.intercept_, self.mean_, self.scale_)
        return np.concatenate([model.logits(split.rows(part)) for part in chunk_slices(split)])


def unchosen(setting: float) -> Search:
    """The search that has nothing to choose from, or no rows to choose on."""
    return Search({}, setting, False)


def add_predictions(held_out: HeldOut, model: LinearModel, rows: LabeledRows, *, as_probabilities: bool) -> None:
    """Add what a linear model predicts for rows: its scores, or the log-probabilities where these are compared between
    rows."""
    normalize = as_probabilities and held_out.metric in RANKING_METRICS
    for part in chunk_slices(rows.split):
        scores = model.logits(rows.split.rows(part))
        weight = None if rows.sample_weight is None else rows.sample_weight[part]
        held_out.add(log_softmax(scores, 1) if normalize else scores, model.classes, rows.labels[part], weight)


def class_weights(class_weight: dict | str | None, rows: LabeledRows) -> np.ndarray:
    """The weight (C,) of each class of some rows, as scikit-learn's `compute_class_weight` computes it: "balanced" is
    N / (C * rows of the class)."""
    classes = np.unique(rows.labels)
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, dict):
        if not class_weight or not all(weight > 0 for weight in class_weight.values()):
            raise ValueError(
                f"class_weight={class_weight} must have weights above zero; to drop a class, drop its rows."
            )
        names = classes.tolist()
        unknown = [name for name in class_weight if name not in names]
        if unknown and any(name not in class_weight for name in names):
            raise ValueError(f"class_weight names the classes {unknown}, but the rows have the classes {names}.")
        return np.array([class_weight.get(name, 1.0) for name in names])
    if class_weight != "balanced":
        raise ValueError(f"class_weight={class_weight!r} must be None, 'balanced' or a dict of weights by class.")
    # scikit-learn 1.6 has no argument for sample weights here; the result is the same as by these counts.
    if rows.sample_weight is None:
        return compute_class_weight("balanced", classes=classes, y=rows.labels)
    counts = np.bincount(np.unique(rows.labels, return_inverse=True)[1], rows.sample_weight)
    return counts.sum() / (len(classes) * counts)


def row_weights(class_weight: dict | str | None, rows: LabeledRows) -> np.ndarray | None:
    """How much each row (N,) counts in a loss: its sample weight times the weight of its class. None: all the same."""
    if class_weight is None:
        return rows.sample_weight
    by_class = class_weights(class_weight, rows)[np.unique(rows.labels, return_inverse=True)[1]]
    return by_class if rows.sample_weight is None else by_class * rows.sample_weight


def check_sample_weight(sample_weight: ArrayLike, number: int) -> np.ndarray:
    """The weights (N,) in float64, checked."""
    weight = check_array(sample_weight, ensure_2d=False, dtype="float64", input_name="sample_weight")
    if weight.shape != (number,):
        raise ValueError(f"sample_weight has shape {weight.shape} but must be ({number},), one weight for each row.")
    if weight.min() < 0 or not weight.any():
        raise ValueError("sample_weight must have no negative weight, and at least one weight above zero.")
    return weight


def standardization(
    split: TableSplit, standardize: bool, sample_weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale (D,) of a split's features, or 0 and 1 to use the features as they are."""
    if standardize:
        return moments(split, sample_weight)
    dtype = np.float64 if split.dtype == np.float64 else np.float32
    return np.zeros(split.num_features, dtype), np.ones(split.num_features, dtype)


def chunk_slices(split: TableSplit) -> Iterator[slice]:
    """All rows in order, in parts that fit into memory."""
    num_rows = split.blocks[0].shape[0]  # where rows come without labels, `labels` is an array of no dimension
    return (slice(start, start + CHUNK) for start in range(0, num_rows, CHUNK))


def _short_names(keys: tuple[str, ...] | None) -> str:
    return "unnamed" if keys is None else ", ".join(map(shorten_key, keys))
