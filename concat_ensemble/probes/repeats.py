"""Intervals and tests over repeats that share their test images, and over several claims."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit, logit

from concat_ensemble.probes.intervals import wilson_interval

ROUNDING = 1e-12  # of means and errors of shares; the differences of equal shares leave that much


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, and the degrees of freedom of this error. An error of rounding alone is 0."""

    mean: float
    error: float
    freedom: float
    num_images: int | None = None  # different test images, where the mean is a share of images; else None

    def __post_init__(self):
        if self.error < ROUNDING:
            object.__setattr__(self, "error", 0.0)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, by Student's t. Without any spread nothing is known about it: the interval is everything."""
        half = stats.t.ppf(0.975, self.freedom) * self.error if self.error else np.inf
        return self.mean - float(half), self.mean + float(half)

    @property
    def share_interval(self) -> tuple[float, float]:
        """95% for the mean of shares: `interval`, or on the logit scale where that would leave [0, 1]. With the mean m
        and its error e, the ends are there those of logit(m) +- t e / (m (1 - m)). Without any spread, as where all
        images are correct in all repeats, Wilson's over the images; of width 0 where their number is not known."""
        if not self.error and self.num_images:
            return wilson_interval(self.mean, self.num_images)
        low, high = self.interval if self.error else (self.mean, self.mean)
        if (low >= 0 and high <= 1) or not ROUNDING < self.mean < 1 - ROUNDING:
            return max(low, 0.0), min(high, 1.0)
        half = stats.t.ppf(0.975, self.freedom) * self.error / (self.mean * (1 - self.mean))
        return float(expit(logit(self.mean) - half)), float(expit(logit(self.mean) + half))

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided p-value of the mean being `value`; 1 without any spread."""
        return float(2 * stats.t.sf(abs(self.mean - value) / self.error, self.freedom)) if self.error else 1.0

    def equivalence_p_value(self, margin: float) -> float:
        """P-value of the mean being `margin` or more away from zero: the larger one of two one-sided tests (Schuirmann
        1987). Below 0.05, the 90% interval is within the margin."""
        if not self.error:
            return 1.0
        sides = [(self.mean + margin) / self.error, (margin - self.mean) / self.error]
        return float(max(stats.t.sf(sides, self.freedom)))


def estimate_over_repeats(values: ArrayLike, num_images: int | None = None) -> Estimate:
    """The mean of (R,) values of independent repeats, each with test images of its own: `num_images` in all."""
    values = np.asarray(values, float)
    return Estimate(float(values.mean()), float(stats.sem(values)), len(values) - 1, num_images)


def estimate_over_repeats_and_images(values: ArrayLike) -> Estimate:
    """The mean of (R, N) values, of R repeats on the same N test images, for other repeats and other images.

    Both are random and crossed. Student's t over repeats takes the images for given: it leaves out that some images
    favour one of two systems in every repeat. With the mean squares of a two-way analysis of variance, the variance of
    the mean is (MS_repeats + max(MS_images - MS_rest, 0)) / (R N), with the degrees of freedom of Hillis (2007,
    Statistics in Medicine 26), as in studies of several readers of the same radiographs.

    Args:
        values: For example the differences of two systems' correctness, from -1 to 1.

    Raises:
        ValueError: when there are fewer than two repeats or images.
    """
    values = np.asarray(values, float)
    of_repeats, of_images, of_rest = mean_squares(values)
    total = of_repeats + max(of_images - of_rest, 0.0)
    freedom = (len(values) - 1) * (total / of_repeats) ** 2 if of_repeats else np.inf
    return Estimate(float(values.mean()), float(np.sqrt(total / values.size)), float(freedom), values.shape[1])


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of repeats, of images and of the rest, in a two-way analysis of variance of (R, N) values.

    Raises:
        ValueError: when there are fewer than two repeats or images.
    """
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values of shape {values.shape} must be (R, N), with at least two repeats and two images.")
    repeats, images = values.shape
    by_repeat, by_image = values.mean(1), values.mean(0)
    rest = values - by_repeat[:, None] - by_image + values.mean()
    of_rest = np.square(rest).sum() / ((repeats - 1) * (images - 1))
    return float(images * by_repeat.var(ddof=1)), float(repeats * by_image.var(ddof=1)), float(of_rest)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment (1979) of the p-values of several claims: where those below 0.05 are taken for true, the
    chance is 5% at most that any of them is not."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values, float)[order]), 1)
    return adjusted.tolist()
