"""Confidence intervals and tests of accuracies, over test images or over repeats."""

import numpy as np
from scipy import stats

NUM_RESAMPLES = 1_000
Interval = tuple[float, float]
WILSON_LEVEL = 0.9500000018071153  # exactly z = 1.959964, so that intervals stored by version 0.1.0 stay the same


def bootstrap_intervals(predictions: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, Interval]:
    """95% bootstrap percentile intervals of `top1`, `mean_per_class` and `macro_f1` from class numbers (N,).

    To resample images is to resample the counts of the confusion matrix, so no prediction is repeated.
    """
    cells, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    resamples = rng.multinomial(len(labels), counts / len(labels), NUM_RESAMPLES).astype(np.float64)
    num_classes = int(cells.max()) + 1
    true, predicted = (np.eye(num_classes)[row] for row in cells)
    hits, num_true = resamples @ (true * (cells[0] == cells[1])[:, None]), resamples @ true
    num_predicted = resamples @ predicted
    with np.errstate(invalid="ignore"):
        recall, f1 = hits / num_true, 2 * hits / (num_true + num_predicted)
    metrics = {
        "top1": hits.sum(axis=1) / len(labels),
        "mean_per_class": np.nanmean(recall, axis=1),  # over the classes that are in the resample
        "macro_f1": np.nanmean(f1, axis=1),
    }
    return {name: _central_95(values) for name, values in metrics.items()}


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
    return _central_95(means)


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


def _central_95(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
