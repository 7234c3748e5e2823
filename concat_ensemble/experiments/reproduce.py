"""The paper's figures at desk scale: each is run, drawn, put beside the paper's, and said to hold or not.

    concat-ensemble reproduce all

Figures: figure-1, proposition-2.1, figure-2, figure-4, figure-5, figure-6, ntk, saturation; all of them take about 45 minutes on 2 cores. What is
finished is not done again. Each leaves a PNG and a JSON file in --output, and a page made of all that are there stands beside that folder.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.markdown import Markdown

from concat_ensemble.console import out
from concat_ensemble.experiments import budget_curve, compare, mixture, ntk_gap, theory
from concat_ensemble.experiments.compare import SUBJECT, to_the_end, told
from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.reporting.figures import BLUE, GREY, ORANGE
from concat_ensemble.studies.results import Results, t_interval

STUDY = "scattered_digits"
DIGITS = compare.IMAGES[STUDY][0]
BUDGETS = [200, 800, 2_400]
HELD, FAILED, OPEN = "holds", "does not hold", "not beyond chance"
CONTROLS = ("untrained", "raw pixels")


@dataclass
class Conclusion:
    """One of the paper's, and what was found here."""

    claim: str
    found: str
    verdict: str

    @classmethod
    def paired(cls, claim: str, difference: np.ndarray) -> "Conclusion":
        """Of a claim that (repeats,) differences are above zero: it holds, or not, where their interval excludes zero."""
        low, high = t_interval(difference)
        return cls(claim, f"{told(difference, '+')} points", HELD if low > 0 else FAILED if high < 0 else OPEN)


@dataclass
class Finding:
    """What a figure's function brings: Markdown, conclusions, and how to draw it."""

    title: str
    setting: str
    paper: str  # its numbers, or what it says where it has none
    table: str
    conclusions: list[Conclusion]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Desk:
    """Where networks are trained, and how much of it."""

    work: Path
    repeats: int
    smoke: bool

    def systems(self, study: str) -> dict[str, Results]:
        """CAT1, CAT2, CAT4, W2 and controls by training/compare.py."""
        return compare.run(study, self.work / study, DIGITS, self.repeats, full=False, smoke=self.smoke)


def figure_1(desk: Desk) -> Finding:
    repeats = mixture.run(
        mixture.Study(STUDY, "labels", DIGITS, mixture.STEPS, desk.work / "mixture", desk.smoke), desk.repeats
    )
    mean = {system: mixture.collect_top1(repeats, system)["mean"] for system in mixture.COLORS}
    return Finding(
        "Figure 1: direct training against transfer from a mixture",
        "Figure 2's mixture with images: four components of three kinds of digits each, labelled + or -, of which each gives one kind the label that the others "
        f"do not ({mixture.STEPS} steps for each direct network, as many as all four together for every system on the mixture). `training/mixture.py` has the details. A "
        "constant answer gets 75.",
        "No numbers: the figure asks the question.",
        mixture.table_of(repeats),
        [
            Conclusion.paired(
                "direct training on a component beats transfer from the mixture", mean["direct"] - mean["cat1"]
            ),
            Conclusion.paired(
                "networks trained apart on the mixture recover features (CAT8 - CAT1, equal steps)",
                mean["cat8"] - mean["cat1"],
            ),
            Conclusion.paired(
                "and not by width alone (CAT8 - as many untrained networks)", mean["cat8"] - mean["untrained members"]
            ),
        ],
        lambda path: mixture.draw(repeats, path),
    )


def proposition(desk: Desk) -> Finding:
    drawn = theory.draw_cancellations()
    lines = ["| covariance smaller than | share of mixtures [95% interval] |", "|---|---|"]
    for bound, share in drawn.within.items():
        low, high = wilson_interval(share, drawn.draws)
        lines.append(f"| {bound} | {share:.2e} [{low:.2e}, {high:.2e}] |")
    found = (
        f"{drawn.cancelled:,} cancellations in {drawn.draws:,} draws (share at most {drawn.most_that_cancel:.1e}); {drawn.exact:,} proportions that cancel were "
        f"found exactly, with a covariance of at most {drawn.largest_covariance:.0e}"
    )

    def draw(path: Path) -> None:
        figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
        axes = figure.subplots()
        bounds, shares = map(
            np.array, zip(*((float(bound), share) for bound, share in drawn.within.items()), strict=True)
        )
        axes.loglog(bounds, shares, "o", color=BLUE, label="drawn mixtures")
        axes.loglog(
            bounds, shares[-2] * bounds / bounds[-2], color=GREY, linewidth=1, label="in proportion: measure zero"
        )
        axes.set(xlabel="covariance of feature and label smaller than", ylabel="share of a million mixtures")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)

    return Finding(
        "Proposition 2.1: almost no mixture cancels a correlation",
        "A thousand random sets of four components, a thousand proportions each. `concat_ensemble/theory.py` has the construction.",
        "Only a measure-zero set of mixture proportions can cancel a correlation.",
        "\n".join(lines) + "\n",
        [Conclusion("a cancelling mixture is almost never drawn", found, FAILED if drawn.cancelled else HELD)],
        draw,
    )


def figure_2(desk: Desk) -> Finding:
    found = theory.train_counterexample(initialisations=10 if desk.smoke else 100)
    lines = [
        "| | columns | steps | features in use | accuracy on the mixture | on each component | all four fitted, % [95% interval] |",
        "|---" * 7 + "|",
    ]
    for row in found.rows:
        share, low, high = (100 * v for v in (row.all_fitted / found.initialisations, *row.interval))
        parts = ", ".join(f"{100 * part:.0f}" for part in row.components)
        lines.append(
            f"| {row.name} | {row.width} | {row.steps:,} | {row.features:.2f} | {100 * row.mixture:.1f} | {parts} | {share:.0f} [{low:.0f}, {high:.0f}] |"
        )
    direct, single, together, random = found.rows[0], found.rows[1], found.rows[-2], found.rows[-1]

    def apart(claim: str, more: theory.Row, less: theory.Row) -> Conclusion:
        text = f"{more.all_fitted} of {found.initialisations} against {less.all_fitted}"
        clear = more.interval[0] > less.interval[1]
        return Conclusion(claim, text, HELD if clear else FAILED if more.interval[1] < less.interval[0] else OPEN)

    fewer = single.features < direct.features
    return Finding(
        "Figure 2: the counterexample",
        f"{found.initialisations} initialisations of each kind of small network; the points' coordinates and labels are reconstructed (`concat_ensemble/theory.py`).",
        "A sparse solution on the mixture needs fewer features than the four direct solutions together, so some component loses one it needed.",
        "\n".join(lines) + "\n",
        [
            Conclusion("the mixture's solution uses fewer features than the direct ones together", f"{single.features:.2f} against {direct.features:.2f}", HELD if fewer else FAILED),
            apart("so some component cannot be fitted by retraining the head (direct - mixture)", direct, single),
            apart("networks trained apart, side by side, recover it", together, single),
            apart("and not by width alone (trained - untrained)", together, random),
        ],
        lambda path: theory.plot_counterexample(found, path),
    )  # fmt: skip


def figure_4(desk: Desk) -> Finding:
    return _systems(
        desk,
        STUDY,
        "Figure 4: time-concatenation and the wide network, with labels",
        "ResNet-10 on scattered digits 0 to 4, 1,600 steps in all (CAT1 an eighth more); W2 at CAT4's FLOPs. Linear probes.",
        "ImageNet-1k / iNat18 / CIFAR-100 / CIFAR-10, ResNet50: CAT1 78.4 / 33.7 / 71.0 / 90.4; CAT2 78.5 / 40.4 / 74.2 / 91.2; CAT4 78.3 / 42.9 / 76.8 / 92.7; CAT5 77.8 / "
        "46.2 / 77.1 / 92.8 (at equal steps). W2, read off the predecessor's figure, each network trained in full: ~ 77.6 / 37.3 / 72.7 / 90.9.",
    )


def figure_5(desk: Desk) -> Finding:
    return _systems(
        desk,
        f"{STUDY}_turned",
        "Figure 5: without labels, networks of several seeds",
        "Each image is given a quarter turn, which the network has to tell (RotNet): a pretext task in place of SwAV, and digits in place of ImageNet. As there, each "
        "network is trained in full (1,200 steps), and so is W2, at the FLOPs of the four together.",
        "SwAV on ImageNet, probed on ImageNet-1k / iNat18 / CIFAR-100 / CIFAR-10, read off the figure: ResNet50-W5 ~ 78.2 / 48.1 / 81.5 / 94.8; CAT7, as large, ~ 78.7 / 49.7 / "
        "82.7 / 95.6.",
    )


def figure_6(desk: Desk) -> Finding:
    return _systems(
        desk,
        f"{STUDY}_vit",
        "Figures 5 and 6: vision transformers",
        "Small ViTs (8x8 patches, three blocks of width 64) with labels, each trained in full (1,200 steps); W2 is twice as wide. The paper's members differ in recipe "
        "and size as well, ours in seed only.",
        "ViT-L/16 (augreg) ~ 83.4 against CAT2 of ViT-L/16 and ViT-B/16 ~ 84.2 on ImageNet-1k, read off the figure; no transfer is shown for them.",
    )


def _systems(desk: Desk, study: str, title: str, setting: str, paper: str) -> Finding:
    studies = desk.systems(study)
    unseen, seen = studies["unseen"], studies["in distribution"]
    whole, narrow = unseen[SUBJECT].top1, next(row for row in unseen.rows if ", PCA to " in row.name).top1
    one = compare.one_network(unseen)
    single = "CAT1" if "cat1" in unseen else "one of its networks"
    in_distribution = []  # of members trained in full, the papers show gains there too
    if "cat1" in unseen:
        in_distribution = [
            _no_better(
                "in distribution it gains less than a point (CAT4 - it)", seen[SUBJECT].top1 - seen["cat1"].top1
            )
        ]
    control = max((row for row in unseen.rows if row.kind == "control"), key=lambda row: row.mean)
    panels = {
        title: {row.name: row.top1 for row in compare.shown(results)}
        for title, results in (("unseen digits 5 to 9", unseen), ("digits 0 to 4", seen))
    }
    return Finding(
        title,
        setting,
        paper,
        compare.in_markdown(compare.table_of(studies)),
        [
            Conclusion.paired(f"CAT4 transfers better than {single} (CAT4 - it)", whole - one),
            Conclusion.paired("and better than a wide network (CAT4 - W2)", whole - unseen["w2"].top1),
            Conclusion.paired("also at one member's width (CAT4 by PCA - it)", narrow - one),
            Conclusion.paired("and it is what was learnt that counts (CAT4 - the better control)", whole - control.top1),
            *in_distribution,
        ],
        lambda path: _dots(panels, path),
    )  # fmt: skip


def _no_better(claim: str, difference: np.ndarray) -> Conclusion:
    """Of a claim that (repeats,) differences are below a point: it holds where their whole interval is."""
    low, high = t_interval(difference)
    return Conclusion(claim, f"{told(difference, '+')} points", HELD if high < 0.01 else FAILED if low > 0 else OPEN)


def _dots(panels: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """A panel for each title, a line for each system from the worst to the best in the first, with 95% intervals over (repeats,) accuracies."""
    first = next(iter(panels.values()))
    names = sorted(first, key=lambda name: first[name].mean())
    figure = Figure(figsize=(2 + 4 * len(panels), 4.2), dpi=150, layout="constrained")
    for axes, (title, top1) in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True
    ):
        for place, name in enumerate(names):
            mean, (low, high) = 100 * top1[name].mean(), 100 * np.array(t_interval(top1[name]))
            color = ORANGE if name.startswith(CONTROLS) else BLUE if name == SUBJECT else GREY
            axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("linear probe, top-1 (%)")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def ntk(desk: Desk) -> Finding:
    networks = desk.work / STUDY
    if not all((networks / f"seed-{seed}" / SUBJECT).is_dir() for seed in range(desk.repeats)):
        desk.systems(STUDY)
    top1 = ntk_gap.Gap(STUDY, DIGITS, networks, networks, desk.smoke).run(desk.repeats)
    single, gradients, whole = (top1[name] for name in ("cat1", "cat1" + ntk_gap.GRADIENTS, SUBJECT))
    return Finding(
        "NTK features: fine-tuning near the pretrained point",
        f"Figure 4's networks; gradients of a random unit combination of a network's features by all its parameters, hashed to {ntk_gap.COLUMNS:,} columns, standardised and probed. On scattered MNIST it is likewise (training/README.md).",
        "Tangent features of one network do not close the gap to a concatenation (no number is at hand).",
        ntk_gap.table_of(top1),
        [
            Conclusion.paired("CAT4's plain features stay above CAT1's gradients", whole - gradients),
            Conclusion.paired("also at CAT4's width (CAT4 - gradients by PCA)", whole - top1[ntk_gap.NARROW]),
            Conclusion.paired("gradients tell more than features of the same network (CAT1)", gradients - single),
        ],
        lambda path: _dots({"unseen digits 5 to 9": top1}, path),
    )


def saturation(desk: Desk) -> Finding:
    budgets = [8, 16] if desk.smoke else BUDGETS
    points, measured = budget_curve.run(
        STUDY, DIGITS, desk.work / "saturation", budgets, desk.repeats, smoke=desk.smoke
    )

    def at(system: str, budget: int) -> np.ndarray:
        return budget_curve.collect_top1(points, measured, "unseen", system)[budget]

    last, before = max(budgets), sorted(budgets)[-2]
    return Finding(
        "Information saturation: transfer against the training budget",
        "K networks trained for B / K steps each, probed on unseen digits, with few labels, and in distribution. The larger runs are in training/README.md.",
        "The paper has no such figure; its claim is that one network saturates while several go on.",
        budget_curve.table_of(points, measured),
        [
            Conclusion.paired(f"at {last:,} steps eight networks transfer better than one", at("cat8", last) - at("cat1", last)),
            Conclusion.paired(f"eight go on from {before:,} to {last:,} steps", at("cat8", last) - at("cat8", before)),
            _no_better(f"one does not, that is, by less than a point (from {before:,} to {last:,})", at("cat1", last) - at("cat1", before)),
        ],
        lambda path: budget_curve.draw(points, measured, path),
    )  # fmt: skip


FIGURES = {
    "figure-1": figure_1,
    "proposition-2.1": proposition,
    "figure-2": figure_2,
    "figure-4": figure_4,
    "figure-5": figure_5,
    "figure-6": figure_6,
    "ntk": ntk,
    "saturation": saturation,
}


def reproduced(figure: str, desk: Desk, output: Path) -> dict:
    """What was found, from its file where it is there."""
    path, asked = output / f"{figure}.json", {"repeats": desk.repeats, "smoke": desk.smoke}
    if path.is_file() and (content := json.loads(path.read_text()))["asked"] == asked:
        return content
    began = time.perf_counter()
    found = FIGURES[figure](desk)
    found.draw(path.with_suffix(".png"))
    content = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "draw"}
    content["conclusions"] = [dataclasses.asdict(conclusion) for conclusion in found.conclusions]
    content |= {"asked": asked, "minutes": math.ceil((time.perf_counter() - began) / 60)}
    write_json(path, content)
    return content


def section(figure: str, content: dict, images: str) -> str:
    """A figure in Markdown."""
    conclusions = "".join(
        f"| {conclusion['claim']} | {conclusion['found']} | **{conclusion['verdict']}** |\n"
        for conclusion in content["conclusions"]
    )
    return (
        f"## {content['title']}\n\n`concat-ensemble reproduce {figure}`: {content['setting']}\n\n![{content['title']}]({images}/{figure}.png)\n\n"
        f"{content['table']}\n**In the paper:** {content['paper']}\n\n| conclusion | here | |\n|---|---|---|\n{conclusions}"
    )


def page(output: Path) -> str:
    """Everything that is in a folder of results, as one page that stands beside it."""
    contents = {figure: json.loads((output / f"{figure}.json").read_text()) for figure in FIGURES if (output / f"{figure}.json").is_file()}  # fmt: skip
    verdicts = [conclusion["verdict"] for content in contents.values() for conclusion in content["conclusions"]]
    counted = ", ".join(f"{verdicts.count(verdict)} {words}" for verdict, words in ((HELD, "hold"), (OPEN, "are not beyond chance"), (FAILED, "do not hold")))  # fmt: skip
    repeats = sorted({content["asked"]["repeats"] for content in contents.values()})
    smoke = "**Smoke: a few steps only, the numbers mean nothing.**\n\n" if any(c["asked"]["smoke"] for c in contents.values()) else ""  # fmt: skip
    intro = (
        f"# The paper's evidence at desk scale\n\n{smoke}Made by `concat-ensemble reproduce all`, on real handwritten digits, without a GPU; top-1 in %, mean of {' or '.join(map(str, repeats))} repeats "
        f"with other seeds [95% interval], controls in every table. Of {len(verdicts)} conclusions {counted}. A conclusion holds where the interval of a paired difference leaves out zero; with "
        'few repeats an interval is wide, so "not beyond chance" is no refutation.\n'
    )
    return "\n".join([intro, *(section(figure, content, output.name) for figure, content in contents.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=(*FIGURES, "all"))
    parser.add_argument("--repeats", type=int, default=4, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduction"))
    reproduce(**vars(parser.parse_args()))


def reproduce(figure: str, *, output: Path = Path("runs/reproduction"), repeats: int = 4, smoke: bool = False) -> Path:
    """Reproduce a figure, or "all" of them, and print what came out; what is finished is not done again.

    Returns:
        The page of all figures that are in `output`, which stands beside this folder.

    Raises:
        ValueError: when there are too few repeats.
    """
    if repeats < 2:
        raise ValueError(f"--repeats {repeats} must be at least 2, for an interval.")
    output = output / "smoke" if smoke else output
    output.mkdir(parents=True, exist_ok=True)
    desk = Desk(output / "networks", repeats, smoke)
    for name in FIGURES if figure == "all" else [figure]:
        lines = section(name, reproduced(name, desk, output), output.name).splitlines()
        compare.console.print(Markdown("\n".join(line for line in lines if not line.startswith("!["))))
    beside = output.with_suffix(".md")
    beside.write_text(page(output))
    out.print(f"\npage: {beside}; figures and numbers: {output}", soft_wrap=True)
    return beside


if __name__ == "__main__":
    to_the_end(main)
