"""Scores of images by class: which metrics rank the images by them, and their checks; a light module."""

import numpy as np

from concat_ensemble.data.naming import METRICS

RANKING_METRICS = ("auroc", "average_precision")  # they rank the images by their scores for a class


def ranked_classes(scores: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class that a ranking metric averages over: which images (N,) bool are of the class, and the rank (N,)
    of each image by its score for the class, equal for equal scores. Ranks are finite where scores are not."""
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(
            f"auroc and average_precision need images of two classes, but all are of class {present[0]}; take images "
            "of more classes, or another metric such as top1."
        )
    if scores.shape[1] == 2:
        columns = [(1, scores[:, 1].astype(np.float64) - scores[:, 0])]
    else:
        columns = [(c, scores[:, c]) for c in present]
    return [(labels == c, np.unique(column, return_inverse=True)[1]) for c, column in columns]


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} must be one of {', '.join(METRICS)}.")


def check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, C) and labels (N,) as arrays of numbers; ValueError if they do not fit together."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"scores of shape {scores.shape} and labels of shape {labels.shape} must be (N, C) and (N,).")
    bad_rows = np.flatnonzero(np.isnan(scores).any(axis=1))
    if len(bad_rows):
        raise ValueError(f"the scores of row {bad_rows[0]} hold NaN; fit again on finite features.")
    if not np.isin(labels, np.arange(scores.shape[1])).all():
        raise ValueError(f"labels={labels!r} must be class numbers from 0 to {scores.shape[1] - 1}.")
    return scores, labels.astype(np.int64)
