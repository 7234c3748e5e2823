"""Transfer against training budget for K = 1, 2, 4 and 8 networks: the figure by which to choose K.

    python -m concat_ensemble.experiments.budget_curve scattered_digits

Trains K networks for B / K steps each, for every K and every budget B, on the digits 0 to 4. Linear probes are fitted
on the digits 5 to 9, which no network has seen, with all labels and with ten per class, and on 0 to 4, in
distribution. The controls are eight untrained networks and raw pixels. Every repeat and budget is measured once and
stored in a file. Prints a table, and writes it with the figure and the numbers to --output.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from concat_ensemble.errors import check_at_least
from concat_ensemble.experiments import desk
from concat_ensemble.experiments.names import STUDIES
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.members.assemble import assemble
from concat_ensemble.schema import read_json
from concat_ensemble.studies.controls import pixel_table, untrained_like

COUNTS = (1, 2, 4, 8)
SYSTEMS = tuple(f"cat{count}" for count in COUNTS)
BUDGETS = [200, 500, 1_200, 2_800, 6_000]
TITLES = {
    "unseen": "unseen digits 5 to 9",
    "few labels": "5 to 9, ten labels a class",
    "in distribution": "digits 0 to 4",
}
COLORS = {1: "#8a8a8a", 2: "#7fb3d5", 4: "#2e75b6", 8: "#123a63"}  # the more members, the darker
CONTROL_COLOR = "#c0504d"
Top1 = dict[str, dict[str, float]]  # shares of one by task and system
Curve = dict[int, list[Top1]]  # one entry per repeat, by budget
# (budget, task, system) -> values that `desk.estimate` takes
Select = Callable[[int, str, str], np.ndarray]


def measure_point(setup: desk.Setup, point: tuple[int, int]) -> Top1:
    """Top-1 of one budget in one repeat (the seed), from its file if it has been measured before."""
    budget, seed = point
    path = setup.output / f"seed-{seed}-steps-{budget}.json"
    networks = setup.output / "members" / path.stem

    def measure() -> Top1:
        setup.train(desk.plan_members(networks, f"{budget:,} steps", COUNTS, budget), seed)
        return probe_networks(setup, networks, seed)

    top1 = desk.measure_once(path, {"point": [setup.study, setup.dataset, seed, budget]}, measure)
    shutil.rmtree(networks, ignore_errors=True)  # not earlier: a kill before this loses no training
    return top1


def probe_networks(setup: desk.Setup, networks: Path, seed: int) -> Top1:
    """Top-1 of all systems and controls on all tasks."""
    models = {system: assemble(networks / system) for system in SYSTEMS}
    controls = read_controls(setup, seed)
    if not controls:
        models["untrained members"] = untrained_like(models[SYSTEMS[-1]], seed)
    top1 = {}
    for task in desk.TASKS:
        data = setup.load_task(task, seed)
        store = networks / "features"
        tables = {name: extract_features(model, data, store=store, quiet=True) for name, model in models.items()}
        if not controls:
            tables["raw pixels"] = pixel_table(data, "L", quiet=True)
        top1[task] = controls.get(task, {}) | desk.probe_tables(tables, seed)
    return top1


def read_controls(setup: desk.Setup, seed: int) -> Top1:
    """Top-1 of the controls, which depend on the seed alone, from the file of another budget; empty without one."""
    for path in setup.output.glob(f"seed-{seed}-steps-*.json"):
        content: Any = read_json(path, desk.Measured, "delete it")
        if content.get("point", [])[:3] == [setup.study, setup.dataset, seed]:
            try:
                return {task: {name: content["top1"][task][name] for name in desk.CONTROLS} for task in desk.TASKS}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} has no top-1 of {error}; delete it.") from error
    return {}


def select_top1(curve: Curve, budget: int, task: str, system: str) -> np.ndarray:
    """(repeats,) top-1 of a system on a task."""
    return np.array([top1[task][system] for top1 in curve[budget]])


def format_curve(budgets: Sequence[int], select: Select, counts: Sequence[int] = COUNTS) -> str:
    """A Markdown table for each task, with a column for each budget; `select` gives the values of a system, of which
    there is one for each of `counts`."""
    tables, systems = [], [f"cat{count}" for count in counts]
    for task, title in TITLES.items():
        rows = []
        for system in (*systems, *desk.CONTROLS):
            rows.append([system, *(desk.format_mean(select(budget, task, system)) for budget in budgets)])
        single = {budget: select(budget, task, systems[0]) for budget in budgets}
        for system in systems[1:]:
            # A paired difference has less variance than the difference of two means.
            gains = [select(budget, task, system) - single[budget] for budget in budgets]
            rows.append([f"{system} minus {systems[0]}, paired", *map(desk.format_difference, gains)])
        tables.append(desk.format_markdown([title, *(f"{budget:,} steps" for budget in budgets)], rows))
    return "\n".join(tables)


def plot_curve(budgets: Sequence[int], select: Select, path: Path, counts: Sequence[int] = COUNTS) -> None:
    """A panel for each task: a line with its 95% interval for each K of `counts`, and dashed ones for the controls."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(desk.TASKS))
    for axes, task in zip(panels, desk.TASKS, strict=True):
        _plot_task(axes, budgets, counts, partial(_select_task, select, task), TITLES[task])
    panels[0].set_ylabel("linear probe, top-1 (%)")
    legend = {"loc": "outside lower center", "ncols": len(counts) + len(desk.CONTROLS), "frameon": False}
    figure.legend(*panels[0].get_legend_handles_labels(), **legend)
    figure.savefig(path, dpi=150)


def _select_task(select: Select, task: str, budget: int, system: str) -> np.ndarray:
    return select(budget, task, system)


def _plot_task(
    axes: Axes,
    budgets: Sequence[int],
    counts: Sequence[int],
    select: Callable[[int, str], np.ndarray],
    title: str,
) -> None:
    def interval(system: str) -> np.ndarray:
        """(3, budgets): mean, and both ends of the interval."""
        return np.transpose([desk.mean_and_interval(select(budget, system)) for budget in budgets])

    for count in counts:
        color = COLORS[count]
        mean, low, high = interval(f"cat{count}")
        label = f"{count} network{'s' if count > 1 else ''}"
        axes.plot(budgets, mean, color=color, marker="o", markersize=4, label=label)
        axes.fill_between(budgets, low, high, color=color, alpha=0.12, linewidth=0)
    for system, style in zip(desk.CONTROLS, ("--", ":"), strict=True):
        label = f"{counts[-1]} untrained networks" if "untrained" in system else system
        axes.plot(budgets, interval(system)[0], color=CONTROL_COLOR, linestyle=style, label=label)
    axes.set(title=title, xscale="log", xlabel="training steps in all, shared by the networks")
    axes.set_xticks(budgets)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def measure_curve(setup: desk.Setup, budgets: list[int], repeats: int) -> Curve:
    """Measure all points, two at a time, and write the table and the figure to the output folder."""
    setup.output.mkdir(parents=True, exist_ok=True)
    # The longest first, so that none of these is left alone at the end.
    points = list(product(sorted(budgets, reverse=True), range(repeats)))
    curve: Curve = {}
    for (budget, _), top1 in zip(points, desk.map_two_at_a_time(partial(measure_point, setup), points), strict=True):
        curve.setdefault(budget, []).append(top1)
    (setup.output / "table.md").write_text(format_curve(sorted(curve), partial(select_top1, curve)))
    plot_curve(sorted(curve), partial(select_top1, curve), setup.output / "budget.png")
    return curve


def main() -> None:
    parser = desk.create_parser(__doc__, repeats=3, studies=STUDIES)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="training steps in all")
    options = parser.parse_args()
    check_at_least("repeats", options.repeats, 2)
    check_at_least("budgets", min(options.budgets), COUNTS[-1])
    name = f"{options.study}-budget"
    setup = desk.create_setup(options.study, options.dataset, options.output, name=name, smoke=options.smoke)
    curve = measure_curve(setup, options.budgets, options.repeats)
    table = format_curve(sorted(curve), partial(select_top1, curve))
    desk.print_table(table, options.repeats, setup.output / "budget.png")


if __name__ == "__main__":
    desk.run_script(main)
