"""The cosine classifier of the few-shot papers: one prototype per class, and N-way K-shot episodes.

A row x is brought to length 1; the prototype w_c of a class is the mean of its rows, brought to length 1 too; the logits are
cos(x, w_c) / temperature. Nothing is trained, so a single row per class is enough. (Gidaris and Komodakis 2018, arXiv 1804.09458;
Chen et al. 2019, arXiv 1904.04232; with features centred by base-class statistics SimpleShot, Wang et al. 2019, arXiv 1911.04623.)
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import normalize

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import ProbabilityProbe
from concat_ensemble.probes.neighbors import unit_rows


class Episodes(NamedTuple):
    """Top-1 of few-shot episodes, as shares."""

    accuracies: np.ndarray  # (number,)
    mean: float
    interval: tuple[float, float]  # of the mean, 95%, by Student's t


class PrototypeProbe(ProbabilityProbe):
    """Assigns rows to the class whose mean direction is nearest. Nothing is chosen: validation rows are learnt from too.

    Args:
        standardize: Bring every feature to mean 0 and variance 1 first, by what `fit` saw. It helps where all members
            are good and hurts where one is poor, whose noise it raises. In a table's rows each member's part has length
            1 in any case, so that none counts by its scale.
        temperature: Divides the cosines, which are too close together for a softmax; 0.1 is where Gidaris and Komodakis
            begin. Predictions do not depend on it.

    Attributes:
        prototypes_ (C, D): of length 1. widths_: of the members. mean_, scale_ (D,): what standardises the features.
    """

    def __init__(self, standardize=False, temperature=0.1):
        self.standardize = standardize
        self.temperature = temperature

    def episodes(self, X, y=None, *, ways=5, shots=5, queries=15, number=600, seed=0) -> Episodes:
        """Accuracy on novel classes, over small tasks drawn at random: in each, `ways` classes with `shots` rows to make
        prototypes of and `queries` others to classify. Of the probe, which is fitted on base classes, only the
        standardisation is used.

        Args:
            X, y: Rows of the novel classes: a split of a table, or arrays.
            number: Episodes; each reads its own rows only.

        Raises:
            ValueError: for more ways than classes, or a class with fewer than `shots + queries` rows.
        """
        check_is_fitted(self)
        split = self._checked(X, y)
        names, numbers, counts = np.unique(split.labels, return_inverse=True, return_counts=True)
        least = {"ways": (ways, 2), "shots": (shots, 1), "queries": (queries, 1), "number": (number, 2)}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name}={value} must be {low} at least.")
        if ways > len(names):
            raise ValueError(f"ways={ways} is more than the {len(names)} classes that there are.")
        if counts.min() < shots + queries:
            raise ValueError(
                f"class {names[counts.argmin()].item()!r} has {counts.min()} images; shots={shots} and queries={queries} "
                f"need {shots + queries}."
            )
        members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
        rng = np.random.default_rng(seed)
        accuracies = np.empty(number)
        for n in range(number):
            chosen = rng.choice(len(names), ways, replace=False)
            drawn = np.concatenate([rng.choice(members[c], shots + queries, replace=False) for c in chosen])
            rows = self._unit(split.rows(drawn)).reshape(ways, shots + queries, -1)
            prototypes = rows[:, :shots].mean(1)
            prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True).clip(1e-12)
            accuracies[n] = np.mean((rows[:, shots:] @ prototypes.T).argmax(-1) == np.arange(ways)[:, None])
        mean = float(accuracies.mean())
        half = float(stats.t.ppf(0.975, number - 1) * accuracies.std(ddof=1) / number**0.5)
        return Episodes(accuracies, mean, (mean - half, mean + half))

    def _fit(self, train, held):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        split = train if held is None else TableSplit.concatenate([train, held])
        self.classes_, numbers = np.unique(split.labels, return_inverse=True)
        self.widths_ = [block.shape[1] for block in split.blocks]
        self.mean_, self.scale_ = moments(split)
        if not self.standardize:
            self.mean_, self.scale_ = np.zeros_like(self.mean_), np.ones_like(self.scale_)
        standardized = StandardizedFeatures(split, self.mean_, self.scale_, in_memory=False)
        classes = torch.from_numpy(numbers).to(standardized.device)
        sums = torch.zeros(len(self.classes_), split.num_features, dtype=torch.float64, device=standardized.device)
        for rows, chunk in standardized.chunks():
            sums.index_add_(0, classes[rows], unit_rows(chunk, self.widths_).double())
        self.prototypes_ = normalize(sums).to(standardized.dtype).cpu().numpy()

    def _logits(self, rows):
        return self._unit(rows) @ self.prototypes_.T / self.temperature

    def _unit(self, rows):
        return unit_rows(torch.from_numpy((rows - self.mean_) / self.scale_), self.widths_).numpy()
