"""Figures of cards, from results alone."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from concat_ensemble.results import Results, Row

BLUE, GREY, ORANGE = "#1f5fa8", "#8a8a8a", "#d9772b"


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
        (row for row in results.rows if row.kind == "prefix" or row is subject), key=lambda row: row.num_members
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
    narrow = [row for row in results.rows if ", PCA to " in row.name]
    for row in narrow:
        low, high = row.interval
        axes.errorbar([row.num_members], [100 * row.mean], [[100 * (row.mean - low)], [100 * (high - row.mean)]], color=ORANGE, marker="D", mfc="white",
                      capsize=3, linestyle="none", label=row.name)  # fmt: skip
    levels += [row for row in results.rows if row.kind == "control" and row not in narrow]
    styles = [":", "-.", (0, (5, 2)), (0, (1, 3))]
    for row, style in zip(levels, styles * len(levels), strict=False):
        axes.axhline(
            100 * row.mean, color="black", linestyle=style, linewidth=1, label=f"{row.name} ({row.width:,} columns)"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("number of members")
    axes.set_ylabel("linear probe, test top-1 (%)")
    axes.set_title(describe_dataset(results.dataset), fontsize=10, loc="left")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def equal_steps(results: Results) -> tuple[list[Row], list[Row]]:
    """The ensemble and its baselines: those trained for about as many steps as it was (CAT1's customary eighth more is
    let pass), by number of members, and the others."""
    rows = [row for row in results.rows if row.kind in ("ensemble", "baseline")]
    steps = results.rows[0].steps
    alike = [row for row in rows if steps and row.steps and abs(row.steps / steps - 1) < 0.2]
    return sorted(alike, key=lambda row: row.num_members), [
        row for row in rows if row not in alike and row.kind == "baseline"
    ]


def describe_dataset(dataset: dict) -> str:
    """One line: the dataset, its classes where they were chosen, its test images."""
    classes = f", classes {', '.join(map(str, dataset['classes']))}" if dataset.get("classes") else ""
    images = f", {dataset['test_images']:,} test images" if dataset.get("test_images") else ""
    config = f" ({dataset['config']})" if dataset.get("config") else ""
    return f"{dataset.get('name', 'dataset')}{config}{classes}{images}"


def _line(axes, rows: list[Row], label: str, color: str, **style) -> None:
    means = [100 * row.mean for row in rows]
    spread = [
        [100 * (row.mean - row.interval[0]) for row in rows],
        [100 * (row.interval[1] - row.mean) for row in rows],
    ]
    axes.errorbar([row.num_members for row in rows], means, spread, label=label, color=color, capsize=3, **style)
