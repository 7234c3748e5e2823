"""Direct training against transfer (Figure 1): networks trained on the components of a mixture, and on the mixture.

    concat-ensemble mixture scattered_digits --components labels

Components are made of real images. With `classes` they are pairs of classes, each with its own labels. `labels` is the
paper's Figure 2 with the images of four classes in place of its points: component i holds the images of class i twice,
and those of the classes after and before it once. Classes are labeled + - + - in turn, except that the class before i
has the other label in component i. In their mixture nothing is lost by confusing classes 0 and 2, or 1 and 3, which
each must be told apart in two of the components.

The direct networks together cost as many steps as one network on the mixture, and as CAT2 to CAT8. All are probed
alike. Every repeat is measured once and stored in a file. Prints a table, and writes it with the figure and the
numbers to --output.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from matplotlib.figure import Figure

from concat_ensemble.data.labels import read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.errors import check_at_least
from concat_ensemble.experiments import desk
from concat_ensemble.experiments.names import COMPONENTS, STUDIES
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.intervals import t_interval
from concat_ensemble.studies.controls import pixel_table, untrained_like

COUNTS = (1, 2, 4, 8)
DIRECT, SINGLE, LARGEST = "direct", "cat1", "cat8"
PROJECTED = f"{LARGEST} by PCA"
MIXTURE = "mixture"
LABELS = (1, 0, 1, 0)  # of Figure 2's four points in most components
STEPS = 400  # of each direct network
# The systems in the order of the table; the more members, the darker.
COLORS = {DIRECT: "black", "cat1": "#8a8a8a", "cat2": "#7fb3d5", "cat4": "#2e75b6", "cat8": "#123a63"}
COLORS |= {PROJECTED: "#d9772b", "untrained members": "#c0504d", "raw pixels": "#e0a09e"}
Top1 = dict[str, dict[str, float]]  # shares of one by component and system


def pairs_of_classes(data: DatasetDict) -> dict[str, DatasetDict]:
    """Components of two classes each, with the labels of the whole, so that their mixture is the dataset."""
    names = data["train"].features["label"].names
    components = {}
    for k in range(0, len(names) - 1, 2):
        components[f"{names[k]}, {names[k + 1]}"] = _relabel(data, [(k, k), (k + 1, k + 1)], names)
    return components


def disputed_labels(data: DatasetDict) -> dict[str, DatasetDict]:
    """Figure 2's four components, with a class for each of its points."""
    names = data["train"].features["label"].names
    components = {}
    for k in range(4):
        after, before = (k + 1) % 4, (k - 1) % 4
        parts = [(k, LABELS[k]), (k, LABELS[k]), (after, LABELS[after]), (before, 1 - LABELS[before])]
        components[f"{names[k]}, {names[before]} or {names[after]}"] = _relabel(data, parts, ["-1", "+1"])
    return components


def _relabel(data: DatasetDict, parts: list[tuple[int, int]], names: list[str]) -> DatasetDict:
    """The images of the classes in `parts`, pairs of a class and the label that its images get."""

    def relabel(split: Dataset) -> Dataset:
        classes = read_labels(split)
        numbers = [np.flatnonzero(classes == old) for old, _ in parts]
        labels = np.repeat([new for _, new in parts], [len(part) for part in numbers])
        images = split.select(np.concatenate(numbers)).remove_columns("label")
        return images.add_column("label", labels.tolist()).cast_column("label", ClassLabel(names=names))

    return DatasetDict({name: relabel(split) for name, split in data.items()})


@dataclass(frozen=True)
class Kind:
    """A way to make components."""

    make: Callable[[DatasetDict], dict[str, DatasetDict]]
    classes: range | None  # of the dataset; None: all


KINDS = {"labels": Kind(disputed_labels, range(4)), "classes": Kind(pairs_of_classes, None)}


@dataclass(frozen=True)
class Mixture:
    """What is mixed, and for how many steps a direct network is trained."""

    setup: desk.Setup
    components: str
    steps: int
    counts: tuple[int, ...] = COUNTS  # of networks on the mixture; the first is CAT1

    def measure_repeat(self, seed: int) -> Top1:
        """Top-1 of one repeat, from its file if it has been measured before."""
        settings = [self.setup.study, self.components, self.setup.dataset, self.steps, list(self.counts), seed]
        folder = self.setup.output / "members" / f"seed-{seed}"

        def measure() -> Top1:
            names = self._write_datasets(folder, seed)
            self._train(folder, names, seed)
            return self._probe(folder, names, seed)

        top1 = desk.measure_once(self.setup.output / f"seed-{seed}.json", {"asked": settings}, measure)
        shutil.rmtree(folder, ignore_errors=True)  # not earlier: a kill before this loses no training
        return top1

    def _write_datasets(self, folder: Path, seed: int) -> list[str]:
        """Write the components, to folders 0, 1, ..., and their mixture for the trainings; return the names."""
        kind = KINDS[self.components]
        data = load_data(self.setup.dataset, classes=kind.classes, limit=self.setup.limit, seed=seed)
        components = kind.make(data)
        for number, component in enumerate(components.values()):
            _write_splits(folder / str(number) / "data", component)
        mixed = {name: concatenate_datasets([part[name] for part in components.values()]) for name in data}
        _write_splits(folder / MIXTURE / "data", DatasetDict(mixed))
        return list(components)

    def _train(self, folder: Path, names: list[str], seed: int) -> None:
        for number, name in enumerate(names):
            self._train_on(folder / str(number), f"train on component {name}", [1], self.steps, seed)
        self._train_on(folder / MIXTURE, "train on the mixture", self.counts, self.steps * len(names), seed)

    def _train_on(self, folder: Path, label: str, counts: Iterable[int], steps: int, seed: int) -> None:
        data = {"dataset": f"parquet:{folder / 'data'}", "classes": None}
        self.setup.train(desk.plan_members(folder, label, list(counts), steps, **data), seed)

    def _probe(self, folder: Path, names: list[str], seed: int) -> Top1:
        models = {f"cat{count}": assemble(folder / MIXTURE / f"cat{count}") for count in self.counts}
        models["untrained members"] = untrained_like(models[LARGEST], seed)
        top1 = {}
        for number, component in enumerate(names):
            data = load_data(f"scattered:parquet:{folder / str(number) / 'data'}", seed=seed)
            models[DIRECT] = assemble(folder / str(number) / "cat1")
            store = folder / "features"
            tables = {name: extract_features(model, data, store=store, quiet=True) for name, model in models.items()}
            largest = tables[LARGEST]
            tables[PROJECTED] = principal_projection(largest, max(largest.feature_dims))(largest)
            tables["raw pixels"] = pixel_table(data, "L", quiet=True)
            top1[component] = desk.probe_tables(tables, seed, projected=PROJECTED)
        return top1


def _write_splits(folder: Path, data: DatasetDict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in data.items():
        split.to_parquet(folder / f"{name}.parquet")


def list_systems(repeats: list[Top1]) -> list[str]:
    """The systems that were measured, in the order of the table."""
    measured = next(iter(repeats[0].values()))
    return [system for system in COLORS if system in measured]


def select_top1(repeats: list[Top1], system: str) -> dict[str, np.ndarray]:
    """(repeats,) top-1 of a system by component, and as "mean" over the components."""
    top1 = {name: np.array([repeat[name][system] for repeat in repeats]) for name in repeats[0]}
    return top1 | {"mean": np.mean(list(top1.values()), axis=0)}


def format_recovered(repeats: list[Top1], system: str) -> str:
    """The share that a system closes of the gap from one network on the mixture to direct training."""
    direct, single, other = (select_top1(repeats, name)["mean"] for name in (DIRECT, SINGLE, system))
    if t_interval(direct - single)[0] <= 0:
        return "no gap"
    return f"{(other - single).mean() / (direct - single).mean():.0%}"


def format_table(repeats: list[Top1]) -> str:
    """A Markdown table with a row for each system."""
    single = select_top1(repeats, SINGLE)["mean"]
    rows = []
    for system in list_systems(repeats):
        top1 = select_top1(repeats, system)
        paired = "" if system == SINGLE else desk.format_difference(top1["mean"] - single)
        share = format_recovered(repeats, system) if system.startswith("cat") and system != SINGLE else ""
        rows.append([system, *map(desk.format_mean, top1.values()), paired, share])
    return desk.format_markdown(["", *repeats[0], "mean", f"minus {SINGLE}, paired", "of the gap to direct"], rows)


def plot_table(repeats: list[Top1], path: Path) -> None:
    """A group of points for each component, with 95% intervals."""
    names = [*repeats[0], "mean"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots()
    systems = list_systems(repeats)
    for place, system in enumerate(systems):
        mean, bars = desk.error_bars(select_top1(repeats, system).values())
        style = {"marker": "s" if system == DIRECT else "o", "markersize": 5, "linestyle": "none", "capsize": 2}
        x = np.arange(len(names)) + (place - (len(systems) - 1) / 2) * 0.09
        axes.errorbar(x, mean, bars, color=COLORS[system], label=system, **style)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") if len(name) > 6 else name for name in names])
    for k in range(len(names) - 1):
        axes.axvline(k + 0.5, color="#dddddd", linewidth=1)
    axes.set(xlabel="component", ylabel="linear probe on the component, top-1 (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems), frameon=False)
    figure.savefig(path, dpi=150)


def measure_mixture(mixture: Mixture, repeats: int) -> list[Top1]:
    """Measure all repeats, two at a time, and write the table and the figure to the output folder."""
    output = mixture.setup.output
    output.mkdir(parents=True, exist_ok=True)
    measured = desk.map_two_at_a_time(mixture.measure_repeat, mixture.setup.seeds(repeats))
    (output / "table.md").write_text(format_table(measured))
    plot_table(measured, output / "mixture.png")
    return measured


def run_mixture(
    study: str,
    *,
    components: str = "labels",
    steps: int = STEPS,
    repeats: int = 3,
    smoke: bool = False,
    output: Path | None = None,
    dataset: str | None = None,
) -> None:
    """Measure a mixture, print the table, and write table, figure and numbers.

    Args:
        study: One of `names.STUDIES`; `components` is one of `names.COMPONENTS`.
        steps: Training steps of each direct network.
        output: Folder to write; runs/STUDY-mixture-COMPONENTS by default.
        dataset: Source of the images, as `load_data` takes it; the study's by default.

    Raises:
        ValueError: when there are too few repeats or steps.
        RuntimeError: when a training fails.
    """
    check_at_least("repeats", repeats, 2)
    check_at_least("steps", steps, COUNTS[-1])
    setup = desk.create_setup(study, dataset, output, name=f"{study}-mixture-{components}", smoke=smoke)
    measured = measure_mixture(Mixture(setup, components, steps), repeats)
    desk.print_table(format_table(measured), repeats, setup.output / "mixture.png")


def main() -> None:
    parser = desk.create_parser(__doc__, repeats=3, studies=STUDIES)
    parser.add_argument("--components", choices=COMPONENTS, default="labels")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each direct network")
    run_mixture(**vars(parser.parse_args()))


if __name__ == "__main__":
    desk.run_script(main)
