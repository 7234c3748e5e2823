"""Transfer against training budget for K = 1, 2, 4 and 8: the picture by which to choose K.

    .venv/bin/python training/budget_curve.py scattered_digits

Trains K networks for B / K steps each, for every K and every budget B, on the digits 0 to 4, and fits linear probes on the digits 5 to 9, which none
has seen: on all labels and on ten of each class; and on 0 to 4, in distribution. Beside them stand eight untrained networks and raw pixels. What is
measured is kept, a file for each repeat and budget, and not done again. Prints a table and leaves it, the figure and the numbers in --output.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from concat_ensemble.experiments.compare import IMAGES, STUDIES, data_of, kept, to_the_end, told, train, two_at_a_time
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.results import t_interval

COUNTS = (1, 2, 4, 8)
SYSTEMS = tuple(f"cat{count}" for count in COUNTS)
CONTROLS = ("untrained members", "raw pixels")
TITLES = {
    "unseen": "unseen digits 5 to 9",
    "few labels": "5 to 9, ten labels a class",
    "in distribution": "digits 0 to 4",
}
COLORS = ("#8a8a8a", "#7fb3d5", "#2e75b6", "#123a63")  # the more members, the darker


@dataclasses.dataclass(frozen=True)
class Point:
    """One repeat at one budget: what was trained, and how it is measured."""

    study: str
    dataset: str
    seed: int
    budget: int
    output: Path
    smoke: bool

    @property
    def path(self) -> Path:
        return self.output / f"seed-{self.seed}-steps-{self.budget}.json"

    def measured(self) -> dict[str, dict[str, float]]:
        """Top-1 by study and system; read where it was measured before."""
        asked = {"point": [self.study, self.dataset, self.seed, self.budget]}
        folder = self.output / "members" / self.path.stem
        found = kept(self.path, asked, lambda: self._measured_anew(folder))
        shutil.rmtree(folder, ignore_errors=True)  # only now: a kill before it loses no training
        return found

    def _measured_anew(self, folder: Path) -> dict[str, dict[str, float]]:
        what = f"seed {self.seed}, {self.budget:,} steps"
        train(self.study, self.dataset, folder, COUNTS, self.budget, self.seed, self.smoke, what)
        return self._probed(folder)

    def _probed(self, folder: Path) -> dict[str, dict[str, float]]:
        systems = {system: assemble(folder / system) for system in SYSTEMS}
        others = [json.loads(path.read_text()) for path in self.output.glob(f"seed-{self.seed}-steps-*.json")]
        known = [other["top1"] for other in others if other["point"][:3] == [self.study, self.dataset, self.seed]]
        if not known:  # else as with another budget: the controls depend on the seed alone
            systems["untrained members"] = untrained_like(systems[SYSTEMS[-1]], self.seed)
        found = {}
        for name in STUDIES:
            data = data_of(self.study, self.dataset, name, self.seed, self.smoke)
            tables = {
                system: extract_features(model, data, store=folder / "features", quiet=True)
                for system, model in systems.items()
            }
            if not known:
                tables["raw pixels"] = pixel_table(data, "L")
            found[name] = {control: known[0][name][control] for control in CONTROLS if known}
            for system, table in tables.items():
                probe = LinearProbe(seed=self.seed).fit(table["train"], validation=table["validation"])
                found[name][system] = probe.score(table["test"])
        return found


def collect_top1(points: list[Point], measured: list[dict], name: str, system: str) -> dict[int, np.ndarray]:
    """(repeats,): a system's accuracy on a study, by budget."""
    found: dict[int, list[float]] = {}
    for point, systems in zip(points, measured, strict=True):
        found.setdefault(point.budget, []).append(systems[name][system])
    return {budget: np.array(found[budget]) for budget in sorted(found)}


def table_of(points: list[Point], measured: list[dict]) -> str:
    """In Markdown: a line for each study, budget and K."""
    budgets, lines = sorted({point.budget for point in points}), []
    for name in STUDIES:
        lines += ["", f"| {TITLES[name]} | {' | '.join(f'{b:,} steps' for b in budgets)} |"]
        lines += ["|---" * (len(budgets) + 1) + "|"]
        top1 = {system: collect_top1(points, measured, name, system) for system in (*SYSTEMS, *CONTROLS)}
        lines += [f"| {system} | {' | '.join(map(told, row.values()))} |" for system, row in top1.items()]
        single = top1[SYSTEMS[0]]
        for system in SYSTEMS[1:]:  # repeat by repeat, which is surer than two means
            cells = [told(top1[system][budget] - single[budget]) for budget in budgets]
            lines.append(f"| {system} minus {SYSTEMS[0]}, paired | {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


def draw(points: list[Point], measured: list[dict], path: Path) -> None:
    """Three panels, a line for each K with its 95% interval, the controls as dashes."""
    budgets = sorted({point.budget for point in points})
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(STUDIES))
    for axes, name in zip(panels, STUDIES, strict=True):
        for count, color in zip(COUNTS, COLORS, strict=True):
            rows = collect_top1(points, measured, name, f"cat{count}").values()
            low, high = zip(*map(t_interval, rows), strict=True)
            means = [100 * row.mean() for row in rows]
            axes.plot(
                budgets,
                means,
                color=color,
                marker="o",
                markersize=4,
                label=f"{count} network{'s' if count > 1 else ''}",
            )
            axes.fill_between(budgets, 100 * np.array(low), 100 * np.array(high), color=color, alpha=0.12, linewidth=0)
        for system, style in zip(CONTROLS, ("--", ":"), strict=True):
            means = [100 * row.mean() for row in collect_top1(points, measured, name, system).values()]
            axes.plot(
                budgets,
                means,
                color="#c0504d",
                linestyle=style,
                label=f"{COUNTS[-1]} untrained networks" if "untrained" in system else system,
            )
        axes.set(title=TITLES[name], xscale="log", xlabel="training steps in all, shared by the networks")
        axes.set_xticks(budgets)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("linear probe, top-1 (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(COUNTS) + len(CONTROLS),
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def run(
    study: str, dataset: str, output: Path, budgets: list[int], repeats: int, *, smoke: bool
) -> tuple[list[Point], list[dict]]:
    """All points, two at a time, and what was measured of each; the table and the figure are left in the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    longest_first = sorted(budgets, reverse=True)  # so that none of these is left alone at the end
    points = [Point(study, dataset, s, b, output, smoke) for b, s in product(longest_first, range(repeats))]
    measured = two_at_a_time(Point.measured, points)
    (output / "table.md").write_text(table_of(points, measured))
    draw(points, measured, output / "budget.png")
    return points, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=IMAGES)
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 500, 1_200, 2_800, 6_000], help="steps in all")
    parser.add_argument("--repeats", type=int, default=3, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--output", type=Path, help="runs/STUDY-budget when left out")
    parser.add_argument("--dataset", help="where the images are, such as parquet:FOLDER; on the Hub when left out")
    options = parser.parse_args()
    if options.repeats < 2 or min(options.budgets) < COUNTS[-1]:
        sys.exit(
            f"error: --repeats {options.repeats} must be at least 2, for an interval, and --budgets at least {COUNTS[-1]}."
        )
    output = (options.output or Path("runs") / f"{options.study}-budget") / ("smoke" if options.smoke else "")
    dataset = options.dataset or IMAGES[options.study][0]
    points, measured = run(options.study, dataset, output, options.budgets, options.repeats, smoke=options.smoke)
    print(
        f"{table_of(points, measured)}\nTop-1 in %, mean of {options.repeats} repeats [95% t-interval]; figure: {output / 'budget.png'}"
    )


if __name__ == "__main__":
    to_the_end(main)
