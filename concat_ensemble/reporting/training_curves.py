"""The training curves of networks, from the rows of their logs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from concat_ensemble.files import replace_file
from concat_ensemble.reporting.figures import LIGHT_GREY, LITERAL, shorten_texts

Log = Sequence[Mapping[str, float]]  # rows with step, loss and, after an evaluation, eval_loss and eval_top1
SIZE, MOST_NAMES = 11, 8  # points of the text, which is read at 400 pixels; networks that a legend names


@LITERAL
def plot_training(logs: Mapping[str, Log], path: Path) -> None:
    """Plot the loss of networks against their steps and, if there were evaluations, loss and top-1 on held-out images.
    Each network has its own colour."""
    evaluated, has_top1 = (
        any(key in row for log in logs.values() for row in log) for key in ("eval_loss", "eval_top1")
    )
    figure = Figure(figsize=(5, 5.6 if has_top1 else 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(2 if has_top1 else 1, sharex=True, squeeze=False)[:, 0]
    colors = colormaps["tab10" if len(logs) <= 10 else "viridis"].resampled(max(len(logs), 10))
    for k, log in enumerate(logs.values()):
        _plot(panels[0], log, "loss", color=colors(k))
        _plot(panels[0], log, "eval_loss", color=colors(k), linestyle="--", marker="o", markersize=3)
        _plot(panels[-1], log, "eval_top1", 100, color=colors(k), linestyle="--", marker="o", markersize=3)
    _style(panels[0], "loss (cross-entropy)" if has_top1 else "loss")
    if has_top1:
        _style(panels[1], "held-out top-1 (%)")
    panels[-1].set_xlabel("training steps", fontsize=SIZE)
    handles = [Line2D([], [], color=colors(k), label=name, linewidth=2) for k, name in enumerate(logs)]
    if len(handles) > MOST_NAMES:
        handles = [*handles[: MOST_NAMES - 1], handles[-1]]
    handles += [Line2D([], [], color="black", label="training")] * evaluated
    handles += [Line2D([], [], color="black", linestyle="--", marker="o", markersize=3, label="held-out")] * evaluated
    figure.legend(handles=handles, fontsize=SIZE - 1, frameon=False, loc="outside lower center", ncols=3)
    shorten_texts(figure)
    with replace_file(path) as aside:
        figure.savefig(aside, format=path.suffix[1:])


def _plot(axes: Axes, log: Log, key: str, factor: float = 1, **style) -> None:
    if points := [(row["step"], factor * row[key]) for row in log if key in row]:
        options: dict[str, Any] = {"marker": "o" if len(points) == 1 else None, "linewidth": 1.5} | style
        axes.plot(*zip(*points, strict=True), **options)


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=SIZE)
    axes.tick_params(labelsize=SIZE - 1)
    axes.grid(axis="y", color=LIGHT_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
