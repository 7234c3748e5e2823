"""Figures of cards, from results alone."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.studies.overlap import Overlap
from concat_ensemble.studies.results import Results, Row, short_name
from concat_ensemble.studies.selection import Selection

# Names of strangers are no formulas: matplotlib reads what stands between two dollars as one.
LITERAL = matplotlib.rc_context({"text.parse_math": False})
BLUE, GREY, ORANGE = "#1f5fa8", "#8a8a8a", "#d9772b"


@LITERAL
def plot_accuracy_against_members(results: Results, path: Path) -> None:
    """Test top-1 against the number of members: ensembles at equal training steps, the prefixes of the one at hand,
    and the controls as levels.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    equal, levels = equal_steps(results)
    if len(equal) > 1:
        _line(axes, equal, "ensembles at equal training steps", BLUE, marker="o", linewidth=2)
    subject = results.rows[0]
    prefixes = sorted(
        (row for row in results.rows if row.kind == "first_members" or row is subject), key=lambda row: row.num_members
    )
    first = [row for row in results.rows if row.name == f"{subject.name}, member 0 alone"]
    if len(first + prefixes) > 1:
        _line(
            axes,
            first + prefixes,
            f"first members of {subject.name}",
            GREY if len(equal) > 1 else BLUE,
            marker=".",
            linestyle="--",
            linewidth=1.2,
        )
    for row in (row for row in results.rows if row.kind == "projected"):
        low, high = row.interval
        axes.errorbar([row.num_members], [100 * row.mean], [[100 * (row.mean - low)], [100 * (high - row.mean)]], color=ORANGE,
                      marker="D" if ", PCA to " in row.name else "x", mfc="white",
                      capsize=3, linestyle="none", label=short_name(results, row))  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("number of members")
    axes.set_ylabel("linear probe, test top-1 (%)")
    axes.set_title(describe_dataset(results.dataset), fontsize=10, loc="left")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    _levels(axes, levels + [row for row in results.rows if row.kind == "control"], results)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@LITERAL
def plot_accuracy_against_cost(selection: Selection, path: Path) -> None:
    """Held-out top-1 of every subset against its FLOPs, those that nothing cheaper beats, and the chosen one."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for size in range(1, len(selection.names) + 1):
        points = [s for s in selection.subsets if len(s.members) == size]
        shade = 0.75 - 0.6 * size / len(selection.names)
        axes.scatter([s.cost.gflops for s in points], [100 * s.top1 for s in points], s=18, color=str(shade),
                     label=f"{size} member{'s' if size > 1 else ''}")  # fmt: skip
    front = []
    for subset in sorted(selection.subsets, key=lambda s: (s.cost.gflops, -s.top1)):
        if not front or subset.top1 > front[-1].top1:
            front.append(subset)
    axes.step([s.cost.gflops for s in front], [100 * s.top1 for s in front], where="post", color=BLUE, linewidth=1.2,
              label="best for its cost")  # fmt: skip
    for subset in front[-6:]:
        axes.annotate("+".join(map(str, subset.members)), (subset.cost.gflops, 100 * subset.top1), fontsize=8,
                      xytext=(0, 5), textcoords="offset points", ha="center", color=BLUE)  # fmt: skip
    best = selection[selection.best]
    axes.plot([best.cost.gflops], [100 * best.top1], marker="o", ms=11, mfc="none", mec=ORANGE, mew=2, linestyle="none",
              label="chosen: " + " + ".join(f"{k} {selection.names[k]}" for k in best.members))  # fmt: skip
    # A hopeless subset would press all others into one line.
    span = 100 * max(front[-1].top1 - front[0].top1, 0.02)
    floor = 100 * front[0].top1 - span
    if below := sum(100 * s.top1 < floor for s in selection.subsets):
        axes.set_ylim(floor, 100 * front[-1].top1 + 0.3 * span)
        axes.text(0.01, 0.02, f"{below} below", transform=axes.transAxes, fontsize=8, color=GREY)
    axes.set_xlabel("GFLOPs per image")
    axes.set_ylabel("ridge probe, held-out top-1 (%)")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@LITERAL
def plot_overlap(overlap: Overlap, path: Path) -> None:
    """Four matrices with their numbers: row `given`, column `wanted`."""
    subjects, count = overlap.subjects, len(overlap.subjects)
    labels = [subject.name for subject in subjects] + ["all others"] * (count > 2)
    panels = {"cka": "linear CKA", "r2": "R2 of the column's features,\nfrom the row's", "untrained_r2": "R2 of the column's features,\nfrom an untrained row's",
              "rest_top1": "top-1 of the column's rest after the row\n(diagonal: of all of it)"}  # fmt: skip
    figure = Figure(figsize=(5 + 1.4 * count, 2.6 + 0.9 * len(labels)), dpi=150, layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(2, 2, sharey=True).flat, panels.items(), strict=True):
        matrix = np.full((len(labels), count), np.nan)
        for relation in overlap.relations:
            row = relation.given[0] if len(relation.given) == 1 else count
            matrix[row, relation.wanted] = getattr(relation, quantity)
        if quantity == "rest_top1":
            np.fill_diagonal(matrix, [subject.top1 for subject in subjects])
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            text = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if value > 0.55 else "black")
        axes.set_xticks(range(count), range(count))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(title, fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _levels(axes, rows: list[Row], results: Results) -> None:
    """Rows that have no place on the axis of members, as lines with their names at the right, apart enough to be read."""
    rows = sorted(rows, key=lambda row: row.mean)
    for row in rows:
        control = row.kind == "control"
        axes.axhline(100 * row.mean, color="black" if control else GREY, linestyle=":" if control else "-", linewidth=1, zorder=1)  # fmt: skip
    low, high = axes.get_ylim()
    gap, places = (high - low) / 17, []
    for row in rows:
        places.append(max(100 * row.mean, places[-1] + gap if places else low))
    for k in range(len(places) - 1, -1, -1):  # what was pushed above the top goes down again
        places[k] = min(places[k], places[k + 1] - gap if k + 1 < len(places) else high)
    at, leader = axes.get_yaxis_transform(), {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0}  # fmt: skip
    for row, place in zip(rows, places, strict=True):
        text = f"{short_name(results, row)} ({row.num_features:,} columns)"
        axes.annotate(text, (1, 100 * row.mean), (1.06, place), at, at, leader, fontsize=8, va="center", annotation_clip=False)  # fmt: skip


def equal_steps(results: Results) -> tuple[list[Row], list[Row]]:
    """The ensemble and its baselines: those trained for about as many steps as it was (CAT1's customary eighth more is
    let pass), by number of members, one of each; and the others."""
    rows = [row for row in results.rows if row.kind in ("ensemble", "baseline")]
    steps, alike = results.rows[0].steps, {}
    for row in rows:
        if steps and row.steps and abs(row.steps / steps - 1) < 0.2:
            alike.setdefault(row.num_members, row)
    others = [row for row in rows if row.kind == "baseline" and alike.get(row.num_members) is not row]
    return [alike[count] for count in sorted(alike)], others


def _line(axes, rows: list[Row], label: str, color: str, **style) -> None:
    means = [100 * row.mean for row in rows]
    spread = [
        [100 * (row.mean - row.interval[0]) for row in rows],
        [100 * (row.interval[1] - row.mean) for row in rows],
    ]
    axes.errorbar([row.num_members for row in rows], means, spread, label=label, color=color, capsize=3, **style)
