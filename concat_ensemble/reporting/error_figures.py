"""Figures of a classifier's errors: the confusion matrix, and each class's recall."""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from concat_ensemble.files import replace_file
from concat_ensemble.reporting.confusion import check_confusion, class_recalls, shorten, shown_classes
from concat_ensemble.reporting.figures import BLUE, GREY, LIGHT_GREY, LITERAL

MAX_CLASSES = 30  # whose names can be read in a figure
MAX_NUMBERED = 15  # of which each cell has its number


@LITERAL
def plot_confusion_matrix(confusion: np.ndarray, class_names: list[str], path: Path) -> None:
    """Plot a confusion matrix (C, C) of numbers of images, the true class in the row: cells are shaded by their share
    of the true class's images. Of more than 30 classes those of the lowest recall are shown."""
    confusion = check_confusion(confusion, class_names)
    recalls = class_recalls(confusion.diagonal(), confusion.sum(axis=1))
    shown = shown_classes(recalls, len(class_names), MAX_CLASSES)
    cells, totals = confusion[np.ix_(shown, shown)], confusion.sum(axis=1)[shown]
    shares = cells / np.maximum(totals, 1)[:, None]
    names = [shorten(class_names[k]) for k in shown]
    side = 2.6 + 0.3 * max(len(shown), 6)
    figure = Figure(figsize=(side + 0.6, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(shown) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(cells):
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(_title("images by true and predicted class", len(shown), len(class_names)), fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    _save(figure, path)


@LITERAL
def plot_class_recall(confusion: np.ndarray, class_names: list[str], path: Path) -> None:
    """Plot each class's recall with its 95% interval from a confusion matrix (C, C), the lowest on top, and their mean
    as a line. Of more than 30 classes those of the lowest recall are shown; classes without images have none."""
    confusion = check_confusion(confusion, class_names)
    recalls = class_recalls(confusion.diagonal(), confusion.sum(axis=1))
    if not recalls:
        raise ValueError("confusion has no images; there is no recall to plot.")
    shown = recalls[:MAX_CLASSES]
    figure = Figure(figsize=(7, 1.6 + 0.24 * max(len(shown), 4)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    positions, values = range(len(shown)), np.array([100 * one.recall for one in shown])
    low, high = (100 * np.array(ends) for ends in zip(*(one.interval for one in shown), strict=True))
    spread = np.maximum([values - low, high - values], 0)  # at 0 and 1 rounding can make a length negative
    axes.barh(positions, values, color=BLUE, alpha=0.35, height=0.7)
    axes.errorbar(values, positions, xerr=spread, fmt="o", color=BLUE, markersize=3, capsize=2, linewidth=1)
    mean = 100 * float(np.mean([one.recall for one in recalls]))
    axes.axvline(mean, color=GREY, linestyle=":", linewidth=1, label=f"mean per class: {mean:.1f}")
    axes.set_yticks(positions, [f"{shorten(class_names[one.number])} ({one.images:,})" for one in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=LIGHT_GREY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("recall (%), with 95% interval; number of test images in brackets", fontsize=8)
    axes.set_title(_title("recall of each class", len(shown), len(recalls)), fontsize=10, loc="left")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center")
    _save(figure, path)


def _title(what: str, shown: int, total: int) -> str:
    return f"{what}: the {shown} classes with the lowest recall, of {total:,}" if shown < total else what


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings(), replace_file(path) as aside:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of names in scripts that the font lacks
        figure.savefig(aside, format=path.suffix[1:])
