"""When a concatenation does better than its best member, over all studies of the repository, from their files alone.

    python -m concat_ensemble.experiments.gains

Run it in a clone. It reads the results of `model_cards` and `docs/difficult_cuts`, the tables of `docs/reproduction`
and the comparisons in the folder `overlap` of each, and writes the figure and the table of docs/choosing_members.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from concat_ensemble.console import out, print_error
from concat_ensemble.files import replace_file
from concat_ensemble.reporting.figures import BLUE, GREY, LIGHT_GREY, ORANGE
from concat_ensemble.schema import read_json
from concat_ensemble.studies.overlap_results import Overlap
from concat_ensemble.studies.results import PIXELS, RESULTS, UNTRAINED, Results, Row, format_points

START, END = "<!-- written by experiments/gains.py -->\n", "<!-- end -->"
FIGURE = "gains.png"
NUMBER = r"([-+]?\d+\.\d)"
ESTIMATE = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]")  # of `format_mean` and `format_difference` in desk.py
SAME_IMAGES = ("name", "config", "classes", "limit")  # settings of a dataset; overlap does not depend on its labels
COLORS = {"yes": BLUE, "not beyond chance": GREY, "a control is as good": ORANGE, "no, it loses": "#c0504d"}
PANELS = {
    "kappa": "overlap of members' errors: Cohen's kappa",
    "overlap": "overlap: R2 of members' features,\npredicted from the other members'",
    "pretraining": "worth of pretraining on the target: share of\nuntrained networks' errors that it removes",
}


class Reproduced(msgspec.Struct):
    """What is read of a file of `concat-ensemble reproduce`."""

    table: str


@dataclass(frozen=True)
class Gain:
    """The concatenation minus its best member in one study, as a share, and what may explain it."""

    study: str
    members: int
    best: float  # top-1 of the best member
    gain: float
    interval: tuple[float, float]  # 95%
    pretraining: float  # 1 - errors of the best member / errors of untrained members; below 0: pretraining does harm
    control: tuple[float, tuple[float, float]]  # the concatenation minus the best of the controls, and its interval
    kappa: float | None = None  # of members' errors, see `error_consistency`; None: the file has no images
    overlap: float | None = None  # mean R2 of a member's features from all the others'; None: it was not measured
    untrained_overlap: float | None = None  # the same from untrained networks

    @property
    def helps(self) -> str:
        (low, high), (_, (above_control, _)) = self.interval, self.control
        if low > 0:
            return "yes" if above_control > 0 else "a control is as good"
        return "no, it loses" if high < 0 else "not beyond chance"


def read_gains(folders: Sequence[Path], reproduction: Path) -> tuple[list[Gain], list[str]]:
    """The studies, from the smallest gain on, and the files that have no numbers of members."""
    gains, left_out = [], []
    results = [path for folder in folders for path in sorted(folder.glob(f"*/{RESULTS}/*.json"))]
    for path in [*results, *sorted(reproduction.glob("*.json"))]:
        try:
            gains.append(read_table(path) if path.parent == reproduction else read_results(path))
        except LookupError:
            left_out.append(f"{path.parent.name}/{path.name}")
    if not gains:
        searched = ", ".join(map(str, [*folders, reproduction]))
        raise ValueError(f"no results with members in {searched}; run this in a clone.")
    return sorted(gains, key=lambda each: each.gain), left_out


def read_results(path: Path) -> Gain:
    """A results file; the best member is that of each repeat, on the test images. LookupError without members."""
    results = Results.load(path)
    members = [row for row in results.rows if row.kind == "member"]
    if len(members) < 2 or UNTRAINED not in results:
        raise LookupError("no rows of members and untrained members")
    best = best_of_each_repeat(members)
    whole = results.rows[0]
    compared = dataclasses.replace(results, rows=[whole, best])
    gain, interval, _ = compared.difference(whole.name, best.name)
    folder = path.parents[1]
    overlap, untrained = read_overlap(folder / "overlap", results.dataset)
    pretraining = worth_of_pretraining(best.mean, results[UNTRAINED].mean)
    controls = [results.difference(whole.name, row.name)[:2] for row in results.rows if row.kind == "control"]
    least = min(controls, key=lambda difference: difference[0])
    study, kappa = f"{folder.name}, {path.stem}", error_consistency(members)
    return Gain(study, len(members), best.mean, gain, interval, pretraining, least, kappa, overlap, untrained)


def error_consistency(members: Sequence[Row]) -> float | None:
    """Cohen's kappa of which test images two members predict correctly, the mean over pairs and repeats: 1 if the
    same, 0 if they agree as by chance, given their accuracies (Geirhos et al. 2020). None without recorded images."""
    kappas = []
    for first, second in combinations(members, 2):
        for run, other in zip(first.runs, second.runs, strict=True):
            a, b = run.correct_images, other.correct_images
            if a is None or b is None:
                return None
            chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
            if chance < 1:  # members without any errors have no kappa
                kappas.append(((a == b).mean() - chance) / (1 - chance))
    return float(np.mean(kappas)) if kappas else None


def best_of_each_repeat(members: Sequence[Row]) -> Row:
    """A row with the best member's run of each repeat."""
    chosen = np.argmax([row.values for row in members], axis=0)
    runs = [members[k].runs[repeat] for repeat, k in enumerate(chosen)]
    return dataclasses.replace(members[0], name="best member", runs=runs)


def worth_of_pretraining(best: float, untrained: float) -> float:
    """The share of untrained members' errors that the best member does not make."""
    return 1 - (1 - best) / (1 - untrained)


def read_overlap(folder: Path, dataset: dict) -> tuple[float | None, float | None]:
    """`mean_r2` of the comparison on the same images; None and None where there is none."""
    for overlap in map(Overlap.load, sorted(folder.glob("*.json"))):
        if all(overlap.dataset.get(key) == dataset.get(key) for key in SAME_IMAGES):
            return mean_r2(overlap)
    return None, None


def mean_r2(overlap: Overlap) -> tuple[float, float | None]:
    """Mean R2 of each member's features from all the others together, and from untrained networks."""
    relations = [each for each in overlap.relations if len(each.sources) == len(overlap.subjects) - 1]
    untrained = [each.untrained_r2 for each in relations if each.untrained_r2 is not None]
    return float(np.mean([each.r2 for each in relations])), float(np.mean(untrained)) if untrained else None


def read_table(path: Path) -> Gain:
    """A reproduced figure, whose table has the best member by the mean over its repeats alone. Raises LookupError
    without members."""
    content = read_json(path, Reproduced, "reproduce it again").table
    lines = [line.split("|")[1:-1] for line in content.split("\n\n")[0].splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line] for line in lines]
    names = {cells[0]: cells for cells in table}
    members = [cells for cells in table if re.search(r", member \d+ alone$", cells[0])]
    paired = [k for k, text in enumerate(table[0]) if "minus it, paired" in text] if table else []
    if len(members) < 2 or UNTRAINED not in names or not paired:
        raise LookupError("no rows of members and untrained members")
    column = paired[0]
    best = max(members, key=lambda cells: _estimate(cells[column - 1])[0])
    gain, low, high = _estimate(best[column])
    top1, untrained = _estimate(best[column - 1])[0], _estimate(names[UNTRAINED][column - 1])[0]
    worth = worth_of_pretraining(top1, untrained)
    controls = [_estimate(names[name][column]) for name in (UNTRAINED, PIXELS) if name in names]
    least, *interval = min(controls)
    control, compared = (least, (interval[0], interval[1])), path.parent / "overlap" / path.name
    overlap = mean_r2(Overlap.load(compared)) if compared.is_file() else (None, None)
    study = f"reproduce {path.stem}, unseen*"
    return Gain(study, len(members), top1, gain, (low, high), worth, control, None, *overlap)


def _estimate(cell: str) -> tuple[float, float, float]:
    """Mean and interval as shares; LookupError for a cell without them."""
    found = ESTIMATE.match(cell)
    if not found:
        raise LookupError(f"no estimate in {cell!r}")
    mean, low, high = (float(text) / 100 for text in found.groups())
    return mean, low, high


def format_table(gains: Sequence[Gain], left_out: Sequence[str]) -> str:
    """The table in Markdown, numbered as in the figure, with what was left out."""
    heading = ["", "study", "members", "best member", "gain of the concatenation", "minus the best control", "helps?"]
    heading += ["kappa of errors", "R2 of features (from untrained)", "worth of pretraining"]
    rows = []
    for number, each in enumerate(gains, 1):
        untrained = "" if each.untrained_overlap is None else f" ({each.untrained_overlap:.2f})"
        overlap = "" if each.overlap is None else f"{each.overlap:.2f}{untrained}"
        gain = format_points(each.gain, each.interval)
        best, control = f"{100 * each.best:.1f}", format_points(*each.control)
        cells = [str(number), each.study, str(each.members), best, gain, control, each.helps]
        kappa = "" if each.kappa is None else f"{each.kappa:.2f}"
        rows.append([*cells, kappa, overlap, f"{each.pretraining:.2f}"])
    counts = {verdict: sum(each.helps == verdict for each in gains) for verdict in COLORS}
    families = len({each.study.split(",")[0] for each in gains})
    summary = f"{len(gains)} results of {families} studies, which share networks and images: it helps in "
    summary += (
        f"{counts['yes']}, in {counts['not beyond chance']} not beyond chance, in {counts['a control is as good']} "
    )
    summary += f"a control is as good, in {counts['no, it loses']} it loses.\n"
    skipped = f"\nLeft out for want of members' numbers: {', '.join(left_out)}.\n" if left_out else ""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (heading, ["---"] * len(heading), *rows)]
    return f"{''.join(lines)}\n{summary}{skipped}"


def plot_gains(gains: Sequence[Gain], path: Path) -> None:
    """Plot the gains against both explanations, one panel below the other, for a narrow screen."""
    shown = {key: text for key, text in PANELS.items() if any(getattr(each, key) is not None for each in gains)}
    figure = Figure(figsize=(5, 0.6 + 3.5 * len(shown)), dpi=150, layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False)[:, 0]
    for axes, (quantity, label) in zip(panels, shown.items(), strict=True):
        _plot_panel(axes, gains, quantity)
        axes.set_xlabel(label, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "Does the concatenation help?"
    figure.legend(handles, labels, title=title, fontsize=10, frameon=False, loc="outside upper center", ncols=2)
    with replace_file(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def _plot_panel(axes: Axes, gains: Sequence[Gain], quantity: str) -> None:
    for verdict, color in COLORS.items():
        chosen = [each for each in gains if each.helps == verdict and getattr(each, quantity) is not None]
        x, y = [getattr(each, quantity) for each in chosen], [100 * each.gain for each in chosen]
        lengths = [[100 * (each.gain - each.interval[0]), 100 * (each.interval[1] - each.gain)] for each in chosen]
        bars = np.reshape(lengths, (-1, 2)).T
        axes.errorbar(x, y, bars, color=color, marker="o", linestyle="none", capsize=3, label=verdict)
    for number, each in enumerate(gains, 1):
        if (x := getattr(each, quantity)) is not None:
            side, distance = ("right", -5) if number % 2 else ("left", 5)  # neighbors in the order are near each other
            where = {"xytext": (distance, 3), "textcoords": "offset points", "ha": side}
            axes.annotate(str(number), (x, 100 * each.gain), fontsize=11, **where)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(axis="y", color=LIGHT_GREY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("minus the best member (points)", fontsize=11)
    axes.margins(x=0.08)


def replace_table(page: str, table: str) -> str:
    """The page with the table between its marks. Raises ValueError for a page without them."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page must have the lines {START.strip()} and {END}; add them.")
    return f"{before}{START}\n{table}\n{END}{after}"


def write_page(folders: Sequence[Path], reproduction: Path, page: Path) -> str:
    """Write the table into the page and the figure beside it; returns the table."""
    gains, left_out = read_gains(folders, reproduction)
    table = format_table(gains, left_out)
    content = replace_table(page.read_text(), table)
    plot_gains(gains, page.with_name(FIGURE))
    page.write_text(content)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = [Path("model_cards"), Path("docs/difficult_cuts")]
    parser.add_argument("--folders", type=Path, nargs="+", default=folders, help="folders of results and overlap")
    parser.add_argument("--reproduction", type=Path, default=Path("docs/reproduction"), help="output of reproduce")
    parser.add_argument("--page", type=Path, default=Path("docs/choosing_members.md"), help="page with the table")
    options = parser.parse_args()
    try:
        for line in write_page(options.folders, options.reproduction, options.page).splitlines():
            out.print(line, soft_wrap=True)
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
