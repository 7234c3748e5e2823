"""Classification metrics as one `evaluate` module of our own: `evaluate.load` needs the Hub."""

import math

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score


class ProbeMetrics(evaluate.Metric):
    """Top-1, top-5 (with more than five classes), mean per class accuracy and macro F1, each as a share, from scores
    (N, C) and labels (N,).
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="scores and labels", features=features
        )

    def _compute(self, predictions, references):
        scores, labels = np.asarray(predictions), np.asarray(references)
        chosen, classes = scores.argmax(axis=1), np.arange(scores.shape[1])
        metrics = {"top1": float(np.mean(chosen == labels))}
        if len(classes) > 5:
            metrics["top5"] = float(top_k_accuracy_score(labels, scores, k=5, labels=classes))
        metrics["mean_per_class"] = float(recall_score(labels, chosen, labels=np.unique(labels), average="macro"))
        metrics["macro_f1"] = float(f1_score(labels, chosen, labels=classes, average="macro", zero_division=0))
        return metrics


def wilson_interval(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share of `number` independent images (Wilson 1927): holds near 0 and 1 too, where share +- 2
    sd leaves the range.
    """
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
