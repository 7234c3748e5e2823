"""Figures of cards, from results alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.files import replace_file
from concat_ensemble.reporting.tables import METRIC_NAMES
from concat_ensemble.studies.overlap_results import Overlap
from concat_ensemble.studies.results import Results, Row, short_name
from concat_ensemble.studies.selection_results import Selection, Subset, format_members

# Names from strangers' files are no formulas: matplotlib would read text between two dollars as one.
MAX_TEXT = 300  # characters of a title or a label
LITERAL = matplotlib.rc_context({"text.parse_math": False})
BLUE, GREY, ORANGE, LIGHT_GREY = "#1f5fa8", "#8a8a8a", "#d9772b", "#e5e5e5"
PANELS = {  # quantities of `Relation` and the titles of their matrices
    "cka": "linear CKA",
    "r2": "R2 of the column's features,\nfrom the row's",
    "untrained_r2": "R2 of the column's features,\nfrom an untrained row's",
    "residual_top1": "top-1 of the column's residual after the row\n(diagonal: of all its features)",
}


@LITERAL
def plot_accuracy_against_members(results: Results, path: Path) -> None:
    """Plot the metric on the test images against the number of members.

    Lines join ensembles at equal training steps and the first members of this ensemble; other baselines and the
    controls are horizontal lines.
    """
    figure, axes = _new_figure("number of members", f"linear probe, test {METRIC_NAMES[results.metric]} (%)")
    equal, baselines = equal_steps(results)
    if len(equal) > 1:
        _errorbar(axes, equal, label="ensembles at equal training steps", color=BLUE, marker="o", linewidth=2)
    first = _first_members(results)
    if len(first) > 1:
        color = GREY if len(equal) > 1 else BLUE
        label = f"first members of {results.rows[0].name}"
        _errorbar(axes, first, label=label, color=color, marker=".", linestyle="--", linewidth=1.2)
    for row in (row for row in results.rows if row.kind == "projected"):
        marker, label = "D" if ", PCA to " in row.name else "x", short_name(results, row)
        _errorbar(axes, [row], label=label, color=ORANGE, marker=marker, mfc="white", linestyle="none")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(describe_dataset(results.dataset), fontsize=10, loc="left")
    _plot_levels(axes, baselines + [row for row in results.rows if row.kind == "control"], results)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    _save(figure, path)


@LITERAL
def plot_accuracy_against_cost(selection: Selection, path: Path) -> None:
    """Plot held-out top-1 of every subset against its FLOPs, the best subsets for their cost and the chosen one."""
    figure, axes = _new_figure("GFLOPs per image", f"ridge probe, held-out {selection.metric} (%)")
    axes.set_axisbelow(True)
    for size in range(1, len(selection.names) + 1):
        coordinates = _cost_and_accuracy([subset for subset in selection.subsets if len(subset.members) == size])
        shade, label = 0.75 - 0.6 * size / len(selection.names), f"{size} member{'s' if size > 1 else ''}"
        axes.scatter(*coordinates, s=18, color=str(shade), label=label)
    front = _best_for_cost(selection.subsets)
    axes.step(*_cost_and_accuracy(front), where="post", color=BLUE, linewidth=1.2, label="best for its cost")
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for subset in front[-6:]:
        axes.annotate(format_members(subset.members), (subset.cost.gflops, 100 * subset.score), color=BLUE, **above)
    best = selection[selection.best]
    label = "chosen: " + " + ".join(f"{k} {selection.names[k]}" for k in best.members)
    circle = {"marker": "o", "ms": 11, "mfc": "none", "mec": ORANGE, "mew": 2, "linestyle": "none"}
    axes.plot(*_cost_and_accuracy([best]), label=label, **circle)
    # A subset far below the others would squeeze them into one line.
    span = 100 * max(front[-1].score - front[0].score, 0.02)
    floor = 100 * front[0].score - span
    if below := sum(100 * subset.score < floor for subset in selection.subsets):
        axes.set_ylim(floor, 100 * front[-1].score + 0.3 * span)
        axes.text(0.01, 0.02, f"{below} below", transform=axes.transAxes, fontsize=8, color=GREY)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    _save(figure, path)


@LITERAL
def plot_overlap(overlap: Overlap, path: Path) -> None:
    """Plot four matrices of relations with their numbers: sources are rows, targets are columns."""
    subjects, count = overlap.subjects, len(overlap.subjects)
    labels = [subject.name for subject in subjects] + ["all others"] * (count > 2)
    figure = Figure(figsize=(5 + 1.4 * count, 2.6 + 0.9 * len(labels)), dpi=150, layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(2, 2, sharey=True).flat, PANELS.items(), strict=True):
        matrix = np.full((len(labels), count), np.nan)
        for relation in overlap.relations:
            row = relation.sources[0] if len(relation.sources) == 1 else count
            matrix[row, relation.target] = getattr(relation, quantity)
        if quantity == "residual_top1":
            np.fill_diagonal(matrix, [subject.top1 for subject in subjects])
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            text = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if value > 0.55 else "black")
        axes.set_xticks(range(count), range(count))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(title, fontsize=9, loc="left")
    _save(figure, path)


def equal_steps(results: Results) -> tuple[list[Row], list[Row]]:
    """The ensemble and the baselines of about equal training steps, one for each number of members; all others.

    A fifth more or less counts as equal, since CAT1 is commonly trained an eighth longer.
    """
    rows = [row for row in results.rows if row.kind in ("ensemble", "baseline")]
    steps, equal = results.rows[0].steps, {}
    for row in rows:
        if steps and row.steps and abs(row.steps / steps - 1) < 0.2:
            equal.setdefault(row.num_members, row)
    others = [row for row in rows if row.kind == "baseline" and equal.get(row.num_members) is not row]
    return [equal[count] for count in sorted(equal)], others


def _first_members(results: Results) -> list[Row]:
    """The first member, the first two members and so on to the whole ensemble."""
    subject = results.rows[0]
    single = [row for row in results.rows if row.name == f"{subject.name}, member 0 alone"]
    several = [row for row in results.rows if row.kind == "first_members" or row is subject]
    return single + sorted(several, key=lambda row: row.num_members)


def _best_for_cost(subsets: list[Subset]) -> list[Subset]:
    """The subsets that no cheaper one equals or beats, cheapest first."""
    front = []
    for subset in sorted(subsets, key=lambda subset: (subset.cost.gflops, -subset.score)):
        if not front or subset.score > front[-1].score:
            front.append(subset)
    return front


def _cost_and_accuracy(subsets: list[Subset]) -> tuple[list[float], list[float]]:
    return [subset.cost.gflops for subset in subsets], [100 * subset.score for subset in subsets]


def _new_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color=LIGHT_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shorten_texts(figure: Figure) -> None:
    """Cut off texts that no reader reads to the end: matplotlib takes minutes to measure a name of a megabyte."""
    for text in figure.findobj(Text):
        if len(text.get_text()) > MAX_TEXT:
            text.set_text(f"{text.get_text()[:MAX_TEXT]}...")


def _save(figure: Figure, path: Path) -> None:
    shorten_texts(figure)
    with replace_file(path) as aside:
        figure.savefig(aside, format=path.suffix[1:])


def _errorbar(axes: Axes, rows: Sequence[Row], **style: Any) -> None:
    """Plot the metric in % against the number of members, with intervals."""
    below = [100 * max(row.mean - row.interval[0], 0) for row in rows]
    above = [100 * max(row.interval[1] - row.mean, 0) for row in rows]
    means, counts = [100 * row.mean for row in rows], [row.num_members for row in rows]
    axes.errorbar(counts, means, [below, above], capsize=3, **style)


def _plot_levels(axes: Axes, rows: list[Row], results: Results) -> None:
    """Plot rows that have no place on the axis of members as horizontal lines, with their names at the right."""
    rows = sorted(rows, key=lambda row: row.mean)
    for row in rows:
        color, linestyle = ("black", ":") if row.kind == "control" else (GREY, "-")
        axes.axhline(100 * row.mean, color=color, linestyle=linestyle, linewidth=1, zorder=1)
    low, high = axes.get_ylim()
    heights = _space_out([100 * row.mean for row in rows], low, high)
    transform = axes.get_yaxis_transform()
    arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0}
    style = {"fontsize": 8, "va": "center", "annotation_clip": False, "arrowprops": arrow}
    for row, height in zip(rows, heights, strict=True):
        features = f" ({row.num_features:,} features)" if row.num_features else ""
        text = f"{short_name(results, row)}{features}"
        axes.annotate(text, (1, 100 * row.mean), (1.06, height), transform, transform, **style)


def _space_out(values: list[float], low: float, high: float) -> list[float]:
    """Heights for labels of sorted `values` that are far enough apart to be read and stay between `low` and `high`."""
    gap, heights = (high - low) / 17, []
    for value in values:
        heights.append(max(value, heights[-1] + gap if heights else low))
    limit = high
    for k in reversed(range(len(heights))):  # labels that ended above the top move down again
        heights[k] = min(heights[k], limit)
        limit = heights[k] - gap
    return heights
