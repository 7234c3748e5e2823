"""Confusion matrices: each class's recall with its interval, the worst classes, and the most frequent confusions."""

from typing import NamedTuple

import numpy as np

from concat_ensemble.console import printable
from concat_ensemble.probes.intervals import wilson_interval


class ClassRecall(NamedTuple):
    """The share of a class's images that is classified correctly."""

    number: int  # of the class
    correct: int  # images
    images: int
    interval: tuple[float, float]  # 95%, Wilson's

    @property
    def recall(self) -> float:
        return self.correct / self.images


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64 numbers of images, the true class in the row and the predicted one in the column."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def check_confusion(confusion: np.ndarray, class_names: list[str]) -> np.ndarray:
    """The matrix as an array. Raises ValueError unless it is (C, C) counts for C class names."""
    confusion, count = np.asarray(confusion), len(class_names)
    if confusion.shape != (count, count) or confusion.dtype.kind not in "iu" or (confusion < 0).any():
        expected = f"({count}, {count}) numbers of images, a row and a column for each class name"
        raise ValueError(f"confusion of shape {confusion.shape} and dtype {confusion.dtype} must be {expected}.")
    return confusion


def class_recalls(correct: np.ndarray, images: np.ndarray) -> list[ClassRecall]:
    """The recall of each class that has images, the lowest first, from counts (C,) by class."""
    recalls = [
        ClassRecall(k, int(correct[k]), int(images[k]), wilson_interval(correct[k] / images[k], int(images[k])))
        for k in np.flatnonzero(images).tolist()
    ]
    return sorted(recalls, key=lambda one: (one.recall, -one.images, one.number))


def shown_classes(recalls: list[ClassRecall], num_classes: int, limit: int) -> list[int]:
    """All classes in their order, or the `limit` ones of the lowest recall if there are more."""
    return list(range(num_classes)) if num_classes <= limit else sorted(one.number for one in recalls[:limit])


def shorten(name: str, limit: int = 24) -> str:
    """A class name for the axis of a figure: its beginning and its end, since long names often begin alike."""
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit // 2 - 1) :]}"
