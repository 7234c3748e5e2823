"""Direct training against transfer (Figure 1): networks trained on each component of a mixture and on the mixture, probed on each component.

    concat-ensemble mixture scattered_digits --components labels

Components are made of real images: `classes` are pairs of classes, each with its own labels. `labels` is the paper's Figure 2 with the images of four
classes in place of its points: component i has those of class i twice, of the one after and the one before it once; they are labelled + - + - in turn,
but the one before i bears the other label in component i. On their mixture classes 0 and 2, and 1 and 3, need not be told apart, in two of the
components each they must be.

The direct networks together cost as many steps as one network on the mixture, and as CAT2 to CAT8. All are probed alike. Each repeat is kept in a file
and not done again. Prints a table, and leaves it with the figure and the numbers in --output.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from matplotlib.figure import Figure

from concat_ensemble.data.labels import read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.experiments.compare import IMAGES, kept, to_the_end, told, train, two_at_a_time
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.results import t_interval

COUNTS = (1, 2, 4, 8)
DIRECT, SINGLE, MOST = "direct", "cat1", f"cat{COUNTS[-1]}"
SIGNS = (1, 0, 1, 0)  # of Figure 2's four points: the label that most components give
STEPS = 400  # of each direct network
MIXTURE = "mixture"
COLORS = {DIRECT: "black", "cat1": "#8a8a8a", "cat2": "#7fb3d5", "cat4": "#2e75b6", "cat8": "#123a63", f"{MOST} by PCA": "#d9772b"}  # fmt: skip
COLORS |= {"untrained members": "#c0504d", "raw pixels": "#e0a09e"}
Measured = dict[str, dict[str, float]]  # top-1 by component and system


def pairs_of_classes(data: DatasetDict) -> dict[str, DatasetDict]:
    """Each two classes as a component, with labels of the whole, so that the mixture is the dataset."""
    names = data["train"].features["label"].names
    return {
        f"{names[k]}, {names[k + 1]}": _relabelled(data, [(k, k), (k + 1, k + 1)], names)
        for k in range(0, len(names) - 1, 2)
    }


def disputed_labels(data: DatasetDict) -> dict[str, DatasetDict]:
    """Figure 2's four components, with a class for each of its points."""
    names, found = data["train"].features["label"].names, {}
    for k in range(4):
        after, before = (k + 1) % 4, (k - 1) % 4
        parts = [(k, SIGNS[k]), (k, SIGNS[k]), (after, SIGNS[after]), (before, 1 - SIGNS[before])]
        found[f"{names[k]}, {names[before]} or {names[after]}"] = _relabelled(data, parts, ["-1", "+1"])
    return found


KINDS = {"labels": (disputed_labels, range(4)), "classes": (pairs_of_classes, None)}  # and of which classes


def _relabelled(data: DatasetDict, parts: list[tuple[int, int]], names: list[str]) -> DatasetDict:
    """The images of `parts`' classes, each with the label beside it."""

    def of(split: Dataset) -> Dataset:
        labels = read_labels(split)
        numbers = [np.flatnonzero(labels == wanted) for wanted, _ in parts]
        given = np.repeat([label for _, label in parts], [len(part) for part in numbers])
        chosen = split.select(np.concatenate(numbers)).remove_columns("label")
        return chosen.add_column("label", given.tolist()).cast_column("label", ClassLabel(names=names))

    return DatasetDict({name: of(split) for name, split in data.items()})


@dataclass(frozen=True)
class Study:
    """What is mixed, and with which settings networks are trained on it."""

    study: str
    components: str
    dataset: str
    steps: int
    output: Path
    smoke: bool

    def measured(self, seed: int) -> Measured:
        """One repeat; read where it was measured before."""
        asked = {"asked": [self.study, self.components, self.dataset, self.steps, seed]}
        folder = self.output / "members" / f"seed-{seed}"
        found = kept(self.output / f"seed-{seed}.json", asked, lambda: self._measured_anew(folder, seed))
        shutil.rmtree(folder, ignore_errors=True)  # only now: a kill before it loses no training
        return found

    def _measured_anew(self, folder: Path, seed: int) -> Measured:
        names = self._written(folder, seed)
        for number in range(len(names)):
            self._train(folder / f"{number}", self.steps, [1], seed, f"train on component {names[number]}")
        self._train(folder / MIXTURE, self.steps * len(names), COUNTS, seed, "train on the mixture")
        return self._probed(folder, names, seed)

    def _written(self, folder: Path, seed: int) -> list[str]:
        """The components and their mixture as datasets on disk, which the training script takes."""
        make, classes = KINDS[self.components]
        data = load_data(self.dataset, classes=classes, limit=100 if self.smoke else IMAGES[self.study][1], seed=seed)
        made = make(data)
        parts = dict(zip(map(str, range(len(made))), made.values(), strict=True))
        parts[MIXTURE] = DatasetDict(
            {name: concatenate_datasets([part[name] for part in made.values()]) for name in data}
        )
        for name, part in parts.items():
            (folder / name / "data").mkdir(parents=True, exist_ok=True)
            for split, images in part.items():
                images.to_parquet(folder / name / "data" / f"{split}.parquet")
        return list(made)

    def _train(self, folder: Path, steps: int, counts: Sequence[int], seed: int, what: str) -> None:
        data = f"parquet:{folder / 'data'}"
        train(self.study, data, folder, counts, steps, seed, self.smoke, f"seed {seed}: {what}", "--classes", "null")

    def _probed(self, folder: Path, names: list[str], seed: int) -> Measured:
        systems = {f"cat{count}": assemble(folder / MIXTURE / f"cat{count}") for count in COUNTS}
        systems["untrained members"] = untrained_like(systems[MOST], seed)
        found = {}
        for number, name in enumerate(names):
            data = load_data(f"scattered:parquet:{folder / str(number) / 'data'}", seed=seed)
            systems[DIRECT] = assemble(folder / str(number) / "cat1")
            tables = {
                system: extract_features(model, data, store=folder / "features", quiet=True)
                for system, model in systems.items()
            }
            whole = tables[MOST]
            tables[f"{MOST} by PCA"] = principal_projection(whole, max(whole.feature_dims))(whole)
            tables["raw pixels"] = pixel_table(data, "L")
            found[name] = {}
            for system, table in tables.items():
                probe = LinearProbe(standardize="PCA" not in system, seed=seed)
                probe.fit(table["train"], validation=table["validation"])
                found[name][system] = probe.score(table["test"])
        return found


def collect_top1(measured: list[Measured], system: str) -> dict[str, np.ndarray]:
    """(repeats,) by component, and of their mean."""
    found = {name: np.array([repeat[name][system] for repeat in measured]) for name in measured[0]}
    return found | {"mean": np.mean(list(found.values()), axis=0)}


def recovered(measured: list[Measured], system: str) -> str:
    """The share of the gap between direct training and one network on the mixture that a system closes, where there is a gap."""
    direct, single, mine = (collect_top1(measured, name)["mean"] for name in (DIRECT, SINGLE, system))
    if t_interval(direct - single)[0] <= 0:
        return "no gap"
    return f"{(mine - single).mean() / (direct - single).mean():.0%}"


def table_of(measured: list[Measured]) -> str:
    """In Markdown: a line for each system."""
    names = [*measured[0], "mean"]
    lines = [
        f"| | {' | '.join(names)} | minus {SINGLE}, paired | of the gap to direct |",
        "|---" * (len(names) + 3) + "|",
    ]
    single = collect_top1(measured, SINGLE)["mean"]
    for system in COLORS:
        top1 = collect_top1(measured, system)
        paired = "" if system == SINGLE else told(top1["mean"] - single, "+")
        share = recovered(measured, system) if system.startswith("cat") and system != SINGLE else ""
        lines.append(f"| {system} | {' | '.join(map(told, top1.values()))} | {paired} | {share} |")
    return "\n".join(lines) + "\n"


def draw(measured: list[Measured], path: Path) -> None:
    """A group of dots for each component, with 95% intervals."""
    names = [*measured[0], "mean"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, (system, color) in enumerate(COLORS.items()):
        rows = list(collect_top1(measured, system).values())
        means = np.array([row.mean() for row in rows])
        half = [row.mean() - t_interval(row)[0] for row in rows]
        axes.errorbar(np.arange(len(names)) + (place - 3.5) * 0.09, 100 * means, 100 * np.array(half), color=color,
                      marker="s" if system == DIRECT else "o", markersize=5, linestyle="none", capsize=2, label=system)  # fmt: skip
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") if len(name) > 6 else name for name in names])
    for k in range(len(names) - 1):
        axes.axvline(k + 0.5, color="#dddddd", linewidth=1)
    axes.set(xlabel="component", ylabel="linear probe on the component, top-1 (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=150)


def run(study: Study, repeats: int) -> list[Measured]:
    """All repeats, two at a time, and what is left of them in the output folder."""
    study.output.mkdir(parents=True, exist_ok=True)
    measured = two_at_a_time(study.measured, range(repeats))
    (study.output / "table.md").write_text(table_of(measured))
    draw(measured, study.output / "mixture.png")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=IMAGES)
    parser.add_argument("--components", choices=KINDS, default="labels")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each direct network")
    parser.add_argument("--repeats", type=int, default=3, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--output", type=Path, help="runs/STUDY-mixture-COMPONENTS when left out")
    parser.add_argument("--dataset", help="where the images are, such as parquet:FOLDER; on the Hub when left out")
    options = parser.parse_args()
    if options.repeats < 2 or options.steps < COUNTS[-1]:
        sys.exit(f"error: --repeats {options.repeats} must be at least 2, for an interval, and --steps {options.steps} at least {COUNTS[-1]}.")  # fmt: skip
    output = options.output or Path("runs") / f"{options.study}-mixture-{options.components}"
    study = Study(options.study, options.components, options.dataset or IMAGES[options.study][0], options.steps,
                  output / ("smoke" if options.smoke else ""), options.smoke)  # fmt: skip
    measured = run(study, options.repeats)
    print(
        f"{table_of(measured)}\nTop-1 in %, mean of {options.repeats} repeats [95% t-interval]; figure: {study.output / 'mixture.png'}"
    )


if __name__ == "__main__":
    to_the_end(main)
