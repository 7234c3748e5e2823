"""Classification metrics as one `evaluate` module (`evaluate.load` would need the Hub)."""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score

NUM_BINS = 15  # of confidence, as in Guo et al. 2017


class ProbeMetrics(evaluate.Metric):
    """Top-1, top-5 (with more than five classes), mean per class accuracy, macro F1 and the calibration error of the
    softmax, each from 0 to 1, of scores (N, C) and labels (N,). A class without a finite score is never predicted.
    """

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        description, inputs = self.__doc__ or "", "scores and labels"
        return evaluate.MetricInfo(description, "", datasets.Features(features), inputs_description=inputs)

    def _compute(self, predictions, references):
        scores, labels = np.asarray(predictions), np.asarray(references)
        predicted, classes = scores.argmax(axis=1), np.arange(scores.shape[1])
        metrics = {"top1": float(np.mean(predicted == labels))}
        if len(classes) > 5:
            metrics["top5"] = float(top_k_accuracy_score(labels, scores, k=5, labels=classes))
        metrics["mean_per_class"] = float(recall_score(labels, predicted, labels=np.unique(labels), average="macro"))
        # scikit-learn has no stubs: pyright takes the type of zero_division from its default, "warn".
        settings: dict[str, Any] = {"average": "macro", "zero_division": 0}
        metrics["macro_f1"] = float(f1_score(labels, predicted, labels=classes, **settings))
        metrics["calibration_error"] = calibration_error(softmax(scores, axis=1), labels)
        return metrics


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error with 15 equal bins of confidence (Guo et al. 2017) of probabilities (N, C) and labels
    (N,): the mean distance of confidence and accuracy, 0 if calibrated."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))
