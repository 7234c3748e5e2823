"""Classification metrics by scikit-learn: one at a time, or all in one `evaluate` module (`load` needs the Hub)."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from concat_ensemble.data.naming import METRICS
from concat_ensemble.probes.scores import RANKING_METRICS, check_metric, check_scores, ranked_classes

NUM_BINS = 15  # of confidence, as in Guo et al. 2017


def default_metrics(num_classes: int) -> tuple[str, ...]:
    """The metrics that are computed unless others are asked for: the ranking metrics for two classes only."""
    return METRICS if num_classes == 2 else tuple(name for name in METRICS if name not in RANKING_METRICS)


def metric_value(
    metric: str, scores: np.ndarray, labels: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """One of `METRICS` as scikit-learn computes it, from 0 to 1.

    - `top1`: `accuracy_score`. The class with the highest score is predicted.
    - `mean_per_class`: recall, averaged over the classes that occur in the labels (`balanced_accuracy_score`).
    - `macro_f1`: F1, averaged over the classes that occur in the labels or in the predictions.
    - `auroc`, `average_precision`: with two classes, of the second score minus the first. With more, each class
      against the rest by its own column, averaged over the classes that have images in the labels.

    Args:
        metric: The name.
        scores: (N, C). With more than two classes the ranking metrics compare one column between images, so pass
            log-probabilities (`predict_log_proba`). A class without a finite score is never predicted.
        labels: (N,) class numbers from 0 to C - 1.
        sample_weight: (N,) how often each image counts. Default: once.

    Raises:
        ValueError: If the metric is unknown, a score is NaN, a label is not a class number, or a ranking metric gets
            labels of one class only.
    """
    check_metric(metric)
    scores, labels = check_scores(scores, labels)
    if metric not in RANKING_METRICS:
        return predicted_metric(metric, scores.argmax(axis=1), labels, sample_weight)
    score = roc_auc_score if metric == "auroc" else average_precision_score
    by_class = [
        score(positive, ranks, sample_weight=sample_weight) for positive, ranks in ranked_classes(scores, labels)
    ]
    return float(np.mean(by_class))


def predicted_metric(
    metric: str, predicted: np.ndarray, labels: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """`top1`, `mean_per_class` or `macro_f1`, as in `metric_value`, from predicted class numbers (N,)."""
    if metric == "top1":
        return float(accuracy_score(labels, predicted, sample_weight=sample_weight))
    # scikit-learn has no stubs: pyright takes the type of zero_division from its default, "warn".
    settings: dict[str, Any] = {"average": "macro", "zero_division": 0, "sample_weight": sample_weight}
    if metric == "mean_per_class":
        return float(recall_score(labels, predicted, labels=np.unique(labels), **settings))
    return float(f1_score(labels, predicted, **settings))


class ProbeMetrics(evaluate.Metric):
    """`default_metrics` with top-5 (with more than five classes) and the calibration error of the softmax, each from 0
    to 1, of scores (N, C) and labels (N,). `compute(..., metrics=["auroc"])` adds further ones of `METRICS`.
    """

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        description, inputs = self.__doc__ or "", "scores and labels"
        return evaluate.MetricInfo(description, "", datasets.Features(features), inputs_description=inputs)

    def _compute(self, predictions, references, metrics: Sequence[str] = ()):
        scores, labels = check_scores(predictions, references)
        for metric in metrics:
            check_metric(metric)
        names = {*default_metrics(scores.shape[1]), *metrics}
        if len(np.unique(labels)) < 2:  # nothing to rank
            names -= {name for name in RANKING_METRICS if name not in metrics}
        values = {name: metric_value(name, scores, labels) for name in METRICS if name in names}
        if scores.shape[1] > 5:
            classes = np.arange(scores.shape[1])
            values["top5"] = float(top_k_accuracy_score(labels, scores, k=5, labels=classes))
        return values | {"calibration_error": calibration_error(softmax(scores, axis=1), labels)}


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error with 15 equal bins of confidence (Guo et al. 2017) of probabilities (N, C) and labels
    (N,): the mean distance of confidence and accuracy, 0 if calibrated."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))
