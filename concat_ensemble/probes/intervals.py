"""Confidence intervals and tests of metrics, over test images, over groups of them or over repeats."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.sparse import csr_array

from concat_ensemble.probes.scores import RANKING_METRICS, check_metric, check_scores, ranked_classes

NUM_RESAMPLES = 1_000
CHUNK_SIZE = 2_000_000  # weights of images that are in memory at once, 8 bytes each
Interval = tuple[float, float]
WILSON_LEVEL = 0.9500000018071153  # exactly z = 1.959964, so that intervals stored by version 0.1.0 stay the same


def resampled_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    metrics: Sequence[str],
    groups: np.ndarray | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, np.ndarray]:
    """Metrics of bootstrap resamples of the test images, each as `metric_value` computes it.

    The resamples depend on `labels`, `groups` and `seed` only, so that two models on the same images are compared by
    the differences of their values.

    Args:
        scores, labels: As for `metric_value`.
        metrics: Names from `METRICS`.
        groups: (N,) numbers or names of groups, such as patients, which are drawn whole. Default: images are drawn.
        seed: Random seed.
        num_resamples: Number of resamples.

    Returns:
        Values (num_resamples,) by metric. A class without images in a resample, which only groups of several classes
        bring about, is not averaged over there.

    Raises:
        ValueError: As `metric_value`, or if all images are of one group.
    """
    for metric in metrics:
        check_metric(metric)
    scores, labels = check_scores(scores, labels)
    confusion = Confusion(scores.argmax(axis=1), labels, scores.shape[1])
    ranked = ranked_classes(scores, labels) if set(metrics) & set(RANKING_METRICS) else []
    values: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    for weights in resample_weights(labels, groups, seed=seed, num_resamples=num_resamples):
        by_metric = confusion.metrics(weights)
        if ranked:
            by_class = [ranking_metrics(positive, ranks, weights) for positive, ranks in ranked]
            by_metric |= {name: np.nanmean([of_class[name] for of_class in by_class], 0) for name in RANKING_METRICS}
        for metric in metrics:
            values[metric].append(by_metric[metric])
    return {metric: np.concatenate(chunks) for metric, chunks in values.items()}


def resample_weights(
    labels: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Iterator[np.ndarray]:
    """How often each image is in each resample, in chunks (N, r) of the resamples.

    Images are drawn within their class, as many as it has, so that no class is missing from a resample. A class with
    one image adds nothing to the spread. Groups are drawn among those with the same rarest class, where rare means in
    few groups: each of two classes is then in every resample. (If all groups of one class also had the other, the
    other would be in at least as many groups; so either each group has both, or some have the first class alone and
    are drawn among themselves.)
    """
    if groups is None:
        strata, unit_numbers = labels, None
    else:
        strata, unit_numbers = group_strata(labels, groups)
    order = np.argsort(strata, kind="stable")
    _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
    start_of, count_of = np.repeat(starts, counts)[:, None], np.repeat(counts, counts)[:, None]
    rng, num_units = np.random.default_rng(seed), len(order)
    step = max(1, CHUNK_SIZE // len(labels))
    for first in range(0, num_resamples, step):
        size = min(step, num_resamples - first)
        drawn = start_of + (rng.random((num_units, size)) * count_of).astype(np.int64)
        cells = drawn * size + np.arange(size)
        weights = np.empty((num_units, size))
        weights[order] = np.bincount(cells.ravel(), minlength=num_units * size).reshape(num_units, size)
        yield weights if unit_numbers is None else weights[unit_numbers]


def group_strata(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rarest class (G,) of each group, and the number (N,) of each image's group."""
    names, group_numbers = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"all images are of the one group {names[0].item()!r}; without a second group nothing is known about the "
            "spread between groups: pass images of more groups, or groups=None for the spread between images."
        )
    pairs = np.unique(np.stack([group_numbers, labels]), axis=1)  # (group, class), each once
    num_groups_with = np.bincount(pairs[1])
    rarest_first = np.lexsort((pairs[1], num_groups_with[pairs[1]], pairs[0]))
    sorted_groups, first = np.unique(pairs[0][rarest_first], return_index=True)
    strata = np.empty(len(names), np.int64)
    strata[sorted_groups] = pairs[1][rarest_first][first]
    return strata, group_numbers


class Confusion:
    """The parts of a confusion matrix that the metrics of predicted classes need, for images (N,) with weights."""

    def __init__(self, predicted: np.ndarray, labels: np.ndarray, num_classes: int):
        hits = np.where(predicted == labels, labels, num_classes)  # a last row for the others
        self.hits = sum_by(hits, num_classes + 1)
        self.true, self.predicted = sum_by(labels, num_classes), sum_by(predicted, num_classes)

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric (r,), from weights (N, r)."""
        hits, true, predicted = (self.hits @ weights)[:-1], self.true @ weights, self.predicted @ weights
        with np.errstate(invalid="ignore"):  # 0 / 0 where a class does not occur
            recall, f1 = hits / true, 2 * hits / (true + predicted)
        return {
            "top1": hits.sum(0) / true.sum(0),
            "mean_per_class": np.nanmean(recall, 0),
            "macro_f1": np.nanmean(f1, 0),
        }


def ranking_metrics(positive: np.ndarray, ranks: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision (r,) of one class, from weights (N, r); NaN where the class or the rest is missing.

    The positive images have m different ranks u_0 < u_1 < ..., and only they are thresholds: an image goes to bin 2k
    if it lies between u_(k-1) and u_k, and to bin 2k + 1 if its rank is u_k. So weights are added up by bin, and no
    resample is sorted.
    """
    thresholds = np.unique(ranks[positive])
    places = np.searchsorted(thresholds, ranks)
    is_equal = thresholds[np.minimum(places, len(thresholds) - 1)] == ranks
    bins, num_bins = 2 * places + is_equal, 2 * len(thresholds) + 1
    positives = (sum_by(bins[positive], num_bins) @ weights[positive])[1::2]  # (m, r)
    negatives = sum_by(bins[~positive], num_bins) @ weights[~positive]  # (2m + 1, r)
    num_positives, num_negatives = positives.sum(0), negatives.sum(0)
    below, equal = negatives.cumsum(0)[:-1:2], negatives[1::2]
    true_positives = num_positives - positives.cumsum(0) + positives  # at least as high as each threshold
    false_positives = num_negatives - below
    with np.errstate(invalid="ignore"):  # 0 / 0
        precision = np.where(positives > 0, true_positives / (true_positives + false_positives), 0)
        auroc = (positives * (below + equal / 2)).sum(0) / (num_positives * num_negatives)
        average_precision = (positives * precision).sum(0) / num_positives
    return {"auroc": auroc, "average_precision": np.where(num_negatives > 0, average_precision, np.nan)}


def sum_by(numbers: np.ndarray, size: int) -> csr_array:
    """The matrix (size, n) that adds up the rows of an array (n, r) that have the same number (n,)."""
    order = np.argsort(numbers, kind="stable")
    ends = np.concatenate([[0], np.bincount(numbers, minlength=size).cumsum()])
    return csr_array((np.ones(len(numbers)), order, ends), shape=(size, len(numbers)))


def central_interval(values: ArrayLike, point: float | None = None) -> Interval:
    """The central 95% of the values of resamples of a metric.

    With `point`, the metric of the images themselves, the values are shifted so that their mean is the point, and the
    interval is cut off at 0 and 1. That matters where a resample is biased, since it repeats images: macro F1 falls
    with few images of a class, average precision rises.
    """
    values = np.asarray(values, float)
    if point is None:
        low, high = np.percentile(values, [2.5, 97.5])
    else:
        low, high = np.percentile(values - values.mean() + point, [2.5, 97.5])
        low, high = max(0.0, min(low, point)), min(1.0, max(high, point))
    return float(low), float(high)


def paired_resampled_difference(
    values: np.ndarray, other_values: np.ndarray, point: float, other_point: float
) -> tuple[float, Interval, float]:
    """Compare two models by the values (num_resamples,) of a metric on the same resamples.

    Returns:
        The first point minus the second, the central 95% of the differences over resamples, shifted so that their
        mean is that of the points, and a two-sided p-value: twice the share of resamples in which the difference is
        not on the more frequent side of zero, with one added to both counts so that it is never 0 (Davison and
        Hinkley 1997, section 4.2). It is below 0.05 about where the interval excludes 0.
    """
    difference = float(point - other_point)
    differences = np.asarray(values, float) - np.asarray(other_values, float)
    differences += difference - differences.mean()
    differences[np.abs(differences) < 1e-12] = 0  # equal models differ by the rounding of the shift
    fewer = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
    return difference, central_interval(differences), float(p)


def paired_difference(correct: np.ndarray, other_correct: np.ndarray, seed: int = 0) -> tuple[float, Interval, float]:
    """Compare two models on the same images by which images (N,) bool each classifies correctly.

    Returns:
        Top-1 of the first minus top-1 of the second, its 95% bootstrap interval over images, and the p-value of
        McNemar's exact test of equal accuracy (McNemar 1947).
    """
    differences = correct.astype(float) - other_correct
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return float(differences.mean()), bootstrap_mean(differences, seed), float(p)


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Interval:
    """95% bootstrap percentile interval of the mean of values (N,). Only counts of equal values are resampled."""
    values, counts = np.unique(values, return_counts=True)
    number = counts.sum()
    means = np.random.default_rng(seed).multinomial(number, counts / number, NUM_RESAMPLES) @ values / number
    return central_interval(means)


def t_interval(values: np.ndarray) -> Interval:
    """95% interval of the mean of at least two values (N,), by Student's t."""
    mean, error = float(values.mean()), stats.sem(values)
    if error == 0:  # scipy returns NaN
        return mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return float(low), float(high)


def wilson_interval(share: float, number: int) -> Interval:
    """95% interval of a share k / `number` of independent images (Wilson 1927), which also holds near 0 and 1, where
    the bootstrap and share +- 2 standard deviations do not."""
    interval = stats.binomtest(round(share * number), number).proportion_ci(WILSON_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
