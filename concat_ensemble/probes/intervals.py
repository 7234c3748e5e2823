"""How sure a number is: intervals and tests over test images."""

import math

import numpy as np
from scipy.stats import binomtest

NUM_RESAMPLES = 1_000


def bootstrap_intervals(chosen: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of `top1`, `mean_per_class` and `macro_f1` over redrawn test images, from the classes
    chosen and true (N,).

    Redrawing images is redrawing the counts of the confusion matrix, so that no prediction is made again.
    """
    cells, counts = np.unique(np.stack([labels, chosen]), axis=1, return_counts=True)
    draws = (
        np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), NUM_RESAMPLES).astype(np.float64)
    )
    size = int(cells.max()) + 1
    true, guessed = (np.eye(size)[row] for row in cells)
    hits, present = draws @ (true * (cells[0] == cells[1])[:, None]), draws @ true
    predicted = draws @ guessed
    with np.errstate(invalid="ignore"):
        recall, f1 = hits / present, 2 * hits / (present + predicted)
    redrawn = {
        "top1": hits.sum(axis=1) / len(labels),
        "mean_per_class": np.nanmean(recall, axis=1),  # over the classes that were drawn
        "macro_f1": np.nanmean(f1, axis=1),
    }
    return {name: tuple(map(float, np.percentile(values, [2.5, 97.5]))) for name, values in redrawn.items()}


def paired_difference(right: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float], float]:
    """Of two models on the same images, from which they get right (N,) bool: the first's top-1 minus the second's, its 95%
    bootstrap interval over redrawn images, and the p-value of McNemar's exact test that both are as good (McNemar 1947).
    """
    gaps = right.astype(float) - other
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return float(gaps.mean()), bootstrap_mean(gaps, seed), float(p)


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of values (N,), of which few are different: only their counts are redrawn."""
    values, counts = np.unique(values, return_counts=True)
    number = counts.sum()
    draws = np.random.default_rng(seed).multinomial(number, counts / number, NUM_RESAMPLES) @ values / number
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share of `number` independent images (Wilson 1927): holds near 0 and 1 too, where the bootstrap
    and share +- 2 sd do not.
    """
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
