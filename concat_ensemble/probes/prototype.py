"""The cosine classifier of the few-shot papers: one prototype per class, and N-way K-shot episodes.

A row x is scaled to length 1. The prototype w_c of a class is the mean of its rows, scaled to length 1 too, and the
logits are cos(x, w_c) / temperature. Nothing is trained, so one row per class is enough. (Gidaris and Komodakis 2018,
arXiv 1804.09458; Chen et al. 2019, arXiv 1904.04232; with features centered by the base classes it is SimpleShot, Wang
et al. 2019, arXiv 1911.04623.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import normalize

from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import LabeledRows
from concat_ensemble.probes.estimator import (
    FeatureProbe,
    chunk_slices,
    class_weights,
    renamed_attribute,
    standardization,
)
from concat_ensemble.probes.intervals import t_interval
from concat_ensemble.probes.neighbors import unit_rows


class Episodes(NamedTuple):
    """Top-1 of few-shot episodes, from 0 to 1."""

    accuracies: np.ndarray  # (number,)
    mean: float
    interval: tuple[float, float]  # 95% interval of the mean, by Student's t


@dataclass(eq=False, repr=False)
class PrototypeProbe(FeatureProbe):
    """Predicts the class with the nearest mean direction. Nothing is chosen, so validation rows are training rows.

    The probabilities are the softmax of cosines / `temperature`: they rank the classes, but how sure they look is up
    to the temperature, which is not fitted. There is no `sample_weight`, as in scikit-learn's `NearestCentroid`.

    Args:
        standardize: Scale every feature to mean 0 and variance 1 first. It helps if all members are good, and hurts if
            one is poor, as it amplifies its noise. Each member's part of a table's rows has the same length in either
            case, so that none dominates by its scale.
        temperature: Divides the cosines, which are too close together for a softmax. The default, 0.1, is where
            Gidaris and Komodakis begin. Without class weights, predictions do not depend on it.
        class_weight: Weights by class, which multiply the probabilities before these are scaled to the sum 1. A
            prototype does not depend on the number of its rows, so the classes count the same by default, and
            "balanced" prefers rare classes.

    Attributes:
        prototypes_ (C, D): Prototypes of length 1.
        feature_dims_ (list[int]): Number of features of each member.
        mean_ (D,): The features are standardized as (x - mean_) / scale_.
        scale_ (D,): See `mean_`; ones without `standardize`.
    """

    standardize: bool = False
    temperature: float = 0.1
    class_weight: dict | str | None = None

    widths_ = renamed_attribute("widths_", "feature_dims_")

    def episodes(
        self, X: TableSplit | ArrayLike, y: ArrayLike | None = None, *, ways=5, shots=5, queries=15, number=600, seed=0
    ) -> Episodes:
        """Accuracy on novel classes over random small tasks. Of the fitted probe only the standardization is used.

        Args:
            X, y: Rows of the novel classes: a table split, or arrays.
            ways: Classes of a task.
            shots: Rows of each class that the prototype is computed from.
            queries: Other rows of each class that are classified.
            number: Number of tasks; each reads its own rows only.
            seed: Random seed for the classes and rows of the tasks.

        Raises:
            ValueError: If there are fewer classes than `ways`, or a class has fewer than `shots + queries` rows.
        """
        check_is_fitted(self)
        split = self._validate(X, y)
        classes, class_numbers, counts = np.unique(split.labels, return_inverse=True, return_counts=True)
        bounds = {"ways": (ways, 2), "shots": (shots, 1), "queries": (queries, 1), "number": (number, 2)}
        for name, (value, least) in bounds.items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if ways > len(classes):
            raise ValueError(f"ways={ways} must be at most {len(classes)}, the number of classes.")
        if counts.min() < shots + queries:
            raise ValueError(
                f"class {classes[counts.argmin()].item()!r} has {counts.min()} images, but shots={shots} and "
                f"queries={queries} need {shots + queries}; lower them or leave the class out."
            )
        rows_by_class = np.split(np.argsort(class_numbers, kind="stable"), np.cumsum(counts)[:-1])
        rng = np.random.default_rng(seed)
        accuracies = np.empty(number)
        for episode in range(number):
            chosen = rng.choice(len(classes), ways, replace=False)
            rows = [rng.choice(rows_by_class[c], shots + queries, replace=False) for c in chosen]
            accuracies[episode] = self._episode_accuracy(split.rows(np.concatenate(rows)), ways, shots)
        return Episodes(accuracies, float(accuracies.mean()), t_interval(accuracies))

    def _episode_accuracy(self, rows: np.ndarray, ways: int, shots: int) -> float:
        """Top-1 on one task, from the rows of its first class, then of its second, and so on."""
        rows = self._standardized_unit_rows(rows).reshape(ways, -1, rows.shape[1])
        prototypes = rows[:, :shots].mean(1)
        prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True).clip(1e-12)
        return np.mean((rows[:, shots:] @ prototypes.T).argmax(-1) == np.arange(ways)[:, None])

    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        rows = train.with_validation(validation)
        split, self._log_class_weights = rows.split, np.log(class_weights(self.class_weight, rows))
        self.classes_, class_numbers = np.unique(split.labels, return_inverse=True)
        self.feature_dims_ = [block.shape[1] for block in split.blocks]
        self.mean_, self.scale_ = standardization(split, self.standardize)
        X = StandardizedFeatures(split, self.mean_, self.scale_, in_memory=False)
        y = torch.from_numpy(class_numbers).to(X.device)
        sums = torch.zeros(len(self.classes_), split.num_features, dtype=torch.float64, device=X.device)
        for part, chunk in X.chunks():
            sums.index_add_(0, y[part], unit_rows(chunk, self.feature_dims_).double())
        self.prototypes_ = normalize(sums).to(X.dtype).cpu().numpy()

    def _logits(self, split: TableSplit) -> np.ndarray:
        parts = [self._standardized_unit_rows(split.rows(part)) for part in chunk_slices(split)]
        logits = np.concatenate([part @ self.prototypes_.T for part in parts]) / self.temperature
        return logits + self._log_class_weights.astype(logits.dtype)

    def _standardized_unit_rows(self, rows: np.ndarray) -> np.ndarray:
        return unit_rows(torch.from_numpy((rows - self.mean_) / self.scale_), self.feature_dims_).numpy()
