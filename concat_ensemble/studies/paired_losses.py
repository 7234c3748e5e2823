"""What smaller models lose against a larger one on the same images, with intervals that hold for all at once.

The loss of model m is the mean of d_i = 1 where only the larger one is correct on image i, -1 where only m is, else 0.

*Many models.* The one that is chosen among many has been lucky as well as good, so an interval for it alone is too
low. We take the intervals loss_m +- c * error_m with one c for all of them, the 95% quantile of max_m |T_m|, where T
has the multivariate t distribution with the correlations of the d of all models (max-t, Hothorn, Bretz and Westfall
2008; its quantile by a multiplier bootstrap, Chernozhukov, Chetverikov and Kato 2013). With 95% confidence all of
them are right at once, so the chosen one is too, however it was chosen. Bonferroni would say the same of independent
models; subsets of the same members are correlated, which makes c smaller (about 2.5 rather than 2.9 for the 15
subsets of four members). A confirmation on images that the choice has not seen needs no c, but halves the images.

*Few differences.* Where two models differ on no image, the plain error is 0, which 50 images do not prove. Errors and
centres are those of Bonett and Price (2012): one win and one loss are added to those that were counted.

*Groups.* Images of one patient are one draw. Errors are then those of whole groups (never below those of as many
separate images), with as many degrees of freedom as there are groups, less one.

*Out-of-fold predictions.* The fits of two of five folds share three quarters of their training images, so the d of one
fold depend on those of another, and no estimate of the variance takes all of it into account (Bengio and Grandvalet
2004). What is left of the 95% is measured by `tests/benchmarks/select_margin.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Interval = tuple[float, float]
LEVEL = 0.95  # of intervals with two ends
NUM_DRAWS = 4_000  # of the maximum; its 95% quantile is then known to about 0.03
CHUNK = 8_192  # units whose normal draws are in memory at once


@dataclass
class Losses:
    """Losses (M,) as shares, and their intervals centre +- critical * error, which hold for all at once."""

    values: np.ndarray
    centres: np.ndarray
    errors: np.ndarray
    critical: float
    num_images: int
    least_error: float  # where nothing differs

    def interval(self, index: int) -> Interval:
        half = self.critical * self.errors[index]
        return float(self.centres[index] - half), float(self.centres[index] + half)

    def images_needed(self, index: int, margin: float) -> float:
        """About how many images would bring the upper end of an interval below the margin, were the loss what it is
        now; infinite where it is not below the margin.

        With r times fewer images now than then, error^2 = (error^2 - least^2) r + least^2 r^2 then: the variance of a
        mean shrinks with their number, and the one win and one loss that are added shrink with its square.
        """
        room = (margin - float(self.centres[index])) / self.critical
        if room <= 0:
            return math.inf
        least = self.least_error**2
        spread = max(float(self.errors[index]) ** 2 - least, 0.0)
        ratio = (math.sqrt(spread**2 + 4 * least * room**2) - spread) / (2 * least)
        return self.num_images / ratio


def paired_losses(
    correct: np.ndarray, others: Sequence[np.ndarray], groups: np.ndarray | None = None, seed: int = 0
) -> Losses:
    """Losses of M models against a larger one.

    Args:
        correct: (N,) bool, the images that the larger model classifies correctly.
        others: The same for each of M models.
        groups: (N,) as in `TableSplit`; None where the images are independent.
        seed: Random seed of the bootstrap.
    """
    number = len(correct)
    differences = np.stack([correct.astype(np.float32) - other for other in others])
    values = differences.mean(axis=1, dtype=np.float64)
    lost, won = ((sign * differences > 0).sum(axis=1) for sign in (1, -1))
    lost, won = (lost + 1) / (number + 2), (won + 1) / (number + 2)
    variances = (lost + won - (lost - won) ** 2) / (number + 2)
    centred = differences - values[:, None].astype(np.float32)
    if groups is not None:
        centred = sum_groups(centred, groups)
        units = centred.shape[1]
        variances = np.maximum(variances, (centred**2).sum(axis=1) / number**2 * units / (units - 1))
    critical = max_t_quantile(centred, centred.shape[1] - 1, seed)
    return Losses(values, lost - won, np.sqrt(variances), critical, number, math.sqrt(2) / (number + 2))


def resampled_losses(
    values: np.ndarray, samples: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> Losses:
    """Losses (M,) in another metric than top-1, from their values on bootstrap resamples (M, resamples) of the same
    images, with labels (N,).

    The least error is that of one win and one loss, as for top-1, in a mean over classes: of images of the smallest
    class, which weigh the most.
    """
    smallest, num_classes = np.unique(labels, return_counts=True)[1].min(), len(np.unique(labels))
    least = math.sqrt(2) / (smallest * num_classes + 2)
    centred = samples - samples.mean(axis=1, keepdims=True)
    errors = np.maximum(centred.std(axis=1, ddof=1), least)
    units = len(labels) if groups is None else len(np.unique(groups))
    return Losses(values, values, errors, max_t_quantile(centred, units - 1, seed), len(labels), least)


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """95% interval of the mean of one value per image (N,), by Student's t over images or over groups."""
    mean = values.mean()
    sums = values - mean if groups is None else sum_groups((values - mean)[None], groups)[0]
    units = len(sums)
    error = math.sqrt((sums**2).sum() * units / (units - 1)) / len(values)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, units - 1)) * error
    return float(mean - half), float(mean + half)


def sum_groups(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(M, number of groups) sums of (M, N) over the images of each group."""
    _, numbers = np.unique(groups, return_inverse=True)
    return np.stack([np.bincount(numbers, weights=row) for row in values])


def max_t_quantile(centred: np.ndarray, degrees: int, seed: int = 0) -> float:
    """95% quantile of max_m |T_m| for M means with the correlations of centred values (M, units), with so many degrees
    of freedom."""
    rng = np.random.default_rng(seed)
    deviations = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    varying = deviations[:, 0] > 0
    scaled = (centred[varying] / deviations[varying]).astype(np.float32)
    units = centred.shape[1]
    normal = np.zeros((NUM_DRAWS, len(scaled)), np.float32)
    for start in range(0, units, CHUNK):
        part = scaled[:, start : start + CHUNK]
        normal += rng.standard_normal((NUM_DRAWS, part.shape[1]), np.float32) @ part.T
    if not varying.all():  # how a model that differs nowhere would differ is not known: one more, independent
        normal = np.concatenate([normal, rng.standard_normal((NUM_DRAWS, 1), np.float32)], axis=1)
    scale = np.sqrt(rng.chisquare(degrees, NUM_DRAWS) / degrees)
    return float(np.quantile(np.abs(normal).max(axis=1) / scale, LEVEL))
