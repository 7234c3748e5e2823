"""The paper's figures at desk scale: each is run, drawn and put beside the paper's, and its conclusions are tested.

    concat-ensemble reproduce all

What is finished is not run again. Every figure writes a PNG and a JSON file to --output, and a page made of all that
are there is written beside that folder.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from rich.markdown import Markdown

from concat_ensemble.errors import check_at_least
from concat_ensemble.experiments import (
    budget_curve,
    compare,
    desk,
    mixture,
    names,
    ntk_gap,
    shifts,
    theory,
    time_concatenation,
)
from concat_ensemble.experiments.desk import SUBJECT
from concat_ensemble.experiments.time_concatenation import MARGIN
from concat_ensemble.files import read_yaml, write_json
from concat_ensemble.reporting.figures import BLUE, GREY, ORANGE
from concat_ensemble.schema import Count, read_json
from concat_ensemble.studies.results import Results

STUDY = "scattered_digits"
BUDGETS, SMOKE_BUDGETS = [800, time_concatenation.BUDGET], [8, 16]
HELD, FAILED, OPEN = "holds", "does not hold", "not beyond chance"
FIGURE_6 = "time-concatenation"  # the folder of its networks
OUTPUT = Path("runs/reproduction")


class Conclusion(msgspec.Struct):
    """One of the paper's conclusions, tested here."""

    claim: str
    result: str = msgspec.field(name="found")  # its name in files
    verdict: str


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """The options that a figure was reproduced with."""

    repeats: Count
    smoke: bool
    first_seed: Count = 0


class Finding(msgspec.Struct):
    """A reproduced figure, as its JSON file has it; texts are Markdown."""

    title: str
    setting: str
    paper: str
    table: str
    conclusions: list[Conclusion]
    options: Options = msgspec.field(name="asked")
    minutes: int
    not_shown: str = ""


@dataclass(frozen=True)
class Workplace:
    """Where networks are trained, and how many."""

    folder: Path
    repeats: int
    smoke: bool
    first_seed: int = 0

    @property
    def initializations(self) -> int:
        return 10 if self.smoke else 100

    def setup(self, study: str, name: str) -> desk.Setup:
        return desk.Setup(study, desk.STUDIES[study].dataset, self.folder / name, self.smoke, self.first_seed)

    def compare(self, study: str) -> dict[str, Results]:
        """Results of CAT1, CAT2, CAT4, W2 and the controls, by task."""
        return compare.run_repeats(self.setup(study, study), self.repeats, full=False)


def judge_above_zero(claim: str, difference: np.ndarray) -> Conclusion:
    """Judge a claim that paired differences, as `desk.estimate` takes them, are above zero by whether their 95%
    interval excludes it."""
    low, high = desk.estimate(difference).interval
    verdict = HELD if low > 0 else FAILED if high < 0 else OPEN
    return Conclusion(claim, f"{desk.format_difference(difference)} points", verdict)


def judge_below_a_point(claim: str, difference: np.ndarray) -> Conclusion:
    """Judge a claim that paired differences, as `desk.estimate` takes them, are below a point by whether their whole
    95% interval is; it does not hold where the whole interval is above."""
    low, high = desk.estimate(difference).interval
    verdict = HELD if high < MARGIN else FAILED if low > MARGIN else OPEN
    return Conclusion(claim, f"{desk.format_difference(difference)} points", verdict)


def judge_level(claim: str, difference: np.ndarray) -> Conclusion:
    """Judge a claim that paired differences, as `desk.estimate` takes them, are within a point of zero by whether
    their whole 95% interval is; it does not hold where the whole interval is outside."""
    low, high = desk.estimate(difference).interval
    verdict = HELD if low > -MARGIN and high < MARGIN else FAILED if low > MARGIN or high < -MARGIN else OPEN
    return Conclusion(claim, f"{desk.format_difference(difference)} points", verdict)


def judge_fitted_more_often(claim: str, more: theory.Row, less: theory.Row, initializations: int) -> Conclusion:
    """Judge a claim that one kind of network fits all components more often by whether the intervals overlap."""
    verdict = HELD if more.interval[0] > less.interval[1] else FAILED if more.interval[1] < less.interval[0] else OPEN
    return Conclusion(claim, f"{more.all_fitted} of {initializations} against {less.all_fitted}", verdict)


def figure_1(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    study = mixture.Mixture(workplace.setup(STUDY, "mixture"), "labels", mixture.STEPS, counts=(1, 8))
    repeats = mixture.measure_mixture(study, workplace.repeats)
    mixture.plot_table(repeats, image)
    systems = ("direct", "cat1", "cat8", "untrained members")
    direct, cat1, cat8, untrained = (mixture.select_top1(repeats, system)["mean"] for system in systems)
    recover = "networks trained apart on the mixture recover features (CAT8 - CAT1, equal steps)"
    return mixture.format_table(repeats), [
        judge_above_zero("direct training on a component beats transfer from the mixture", direct - cat1),
        judge_above_zero(recover, cat8 - cat1),
        judge_above_zero("and not by width alone (CAT8 - as many untrained networks)", cat8 - untrained),
    ]


def proposition(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    cancellations = theory.sample_cancellations()
    rows = []
    for bound, share in cancellations.within.items():
        low, high = cancellations.intervals[bound]
        rows.append([bound, f"{share:.2e} [{low:.2e}, {high:.2e}]"])
    _plot_shares(cancellations.within, image)
    low, high = cancellations.slope_interval
    in_proportion = Conclusion(
        "the share of mixtures within a bound falls in proportion to it, as around a set of measure zero (slope 1)",
        f"{cancellations.slope:.3f} [{low:.3f}, {high:.3f}] on logarithmic axes, for bounds up to 0.01",
        HELD if low > 0.9 and high < 1.1 else FAILED if high < 0.9 or low > 1.1 else OPEN,
    )
    exact = Conclusion(
        "and some proportions cancel exactly",
        f"{cancellations.exact:,} found, with a covariance of at most {cancellations.largest_covariance:.0e}",
        HELD if cancellations.exact and cancellations.largest_covariance < 1e-12 else FAILED,
    )
    return desk.format_markdown(["covariance smaller than", "share of mixtures [95% interval]"], rows), [
        in_proportion,
        exact,
    ]


def _plot_shares(within: dict[str, float], image: Path) -> None:
    """The share of mixtures below each bound of the covariance, beside a line of slope one."""
    bounds, shares = np.array(list(map(float, within))), np.array(list(within.values()))
    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.loglog(bounds, shares, "o", color=BLUE, label="drawn mixtures")
    proportional = shares[-2] * bounds / bounds[-2]
    axes.loglog(bounds, proportional, color=GREY, linewidth=1, label="in proportion: measure zero")
    axes.set(xlabel="covariance of feature and label smaller than", ylabel="share of a million mixtures")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image)


def figure_2(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    count = workplace.initializations
    counterexample = theory.train_counterexample(initializations=count)
    theory.plot_counterexample(counterexample, image)
    rows = []
    for row in counterexample.rows:
        share, low, high = (100 * value for value in (row.all_fitted / count, *row.interval))
        components = ", ".join(f"{100 * accuracy:.0f}" for accuracy in row.components)
        cells = [row.name, f"{row.width}", f"{row.steps:,}", f"{row.features:.2f}", f"{100 * row.mixture:.1f}"]
        rows.append([*cells, components, f"{share:.0f} [{low:.0f}, {high:.0f}]"])
    heading = ["", "units", "steps", "features in use", "accuracy on the mixture", "on each component"]
    direct, single, wider, *_, together, _ = counterexample.rows
    fewer = HELD if single.features < direct.features else FAILED
    features = f"{single.features:.2f} against {direct.features:.2f}"
    lost = "so some component cannot be fitted by retraining the head (direct - mixture)"
    return desk.format_markdown([*heading, "all four fitted, % [95% interval]"], rows), [
        Conclusion("the mixture's solution uses fewer features than the direct ones together", features, fewer),
        judge_fitted_more_often(lost, direct, single, count),
        judge_fitted_more_often("networks trained apart, side by side, recover it", together, single, count),
        judge_fitted_more_often("and one network four times as wide does not", together, wider, count),
    ]


def compare_systems(study: str, workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    """The table of a study, and what the paper concludes from it."""
    studies = workplace.compare(study)
    unseen = studies["unseen"]
    panels = {"unseen digits 5 to 9": unseen, "digits 0 to 4": studies["in distribution"]}
    top1 = {title: {row.name: row.top1 for row in compare.select_rows(task)} for title, task in panels.items()}
    plot_points(top1, image)
    single = compare.single_network_top1(unseen)
    whole = unseen[SUBJECT].top1
    (projected,) = (row.top1 for row in unseen.rows if ", PCA to " in row.name)
    control = max((row for row in unseen.rows if row.kind == "control"), key=lambda row: row.mean).top1
    learned = "and it is what was learnt that counts (CAT4 - the better control)"
    conclusions = [judge_above_zero("CAT4 transfers better than one of its networks (CAT4 - it)", whole - single)]
    if "w2" in unseen:
        gain = whole - unseen["w2"].top1
        conclusions.append(judge_above_zero("and better than a wide network (CAT4 - W2)", gain))
    conclusions += [
        judge_above_zero("also at one member's width (CAT4 by PCA - it)", projected - single),
        judge_above_zero(learned, whole - control),
    ]
    return desk.format_markdown(*compare.build_table(studies)), conclusions


def plot_points(panels: dict[str, dict[str, np.ndarray]], image: Path, subject: str = SUBJECT) -> None:
    """Draw (repeats,) accuracies by title and system as means with 95% intervals: a panel for each title, with a row
    for each system, from the worst to the best in the first panel. The `subject` is blue.
    """
    first = next(iter(panels.values()))
    systems = sorted(first, key=lambda system: first[system].mean())
    width = 1 + 0.08 * max(map(len, systems)) + 3.6 * len(panels)  # inches; a letter of a label takes about 0.08
    figure = Figure(figsize=(width, 1.2 + 0.24 * len(systems)), dpi=150, layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, top1) in zip(columns, panels.items(), strict=True):
        for place, system in enumerate(systems):
            mean, bars = desk.error_bars([top1[system]])
            color = ORANGE if system.startswith(("untrained", "raw pixels")) else BLUE if system == subject else GREY
            axes.errorbar(mean, [place], xerr=bars, fmt="o", color=color, capsize=3)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("linear probe, top-1 (%)")
        axes.set_yticks(range(len(systems)), systems)
        axes.grid(axis="x", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image)


def ntk(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    repeats, budget = 3 * workplace.repeats // 2, _budgets(workplace)[-1]
    figure_6 = workplace.setup(STUDY, FIGURE_6)
    time_concatenation.write_images(time_concatenation.images_folder(figure_6), figure_6)
    train = partial(_train_figure_6, figure_6, budget)
    top1 = ntk_gap.measure_gap(workplace.setup(STUDY, "ntk"), repeats, train)
    plot_points({"unseen digits 5 to 9": top1}, image)
    whole, single = top1[SUBJECT], top1[ntk_gap.SINGLE]
    gradients, logits, tuned = (top1[ntk_gap.SINGLE + kind] for kind in (ntk_gap.RANDOM, ntk_gap.OWN, ntk_gap.TUNED))
    tuned_whole, whole_logits = (top1[SUBJECT + kind] for kind in (ntk_gap.TUNED, ntk_gap.OWN))
    return ntk_gap.format_table(top1), [
        judge_above_zero(
            "CAT4's plain features stay above CAT1's gradients of a random combination", whole - gradients
        ),
        judge_above_zero("and above CAT1's gradients of the logits, summed over classes", whole - logits),
        judge_above_zero("also at CAT4's number of features (by PCA)", whole - top1[ntk_gap.PROJECTED]),
        judge_above_zero("gradients tell more than features of the same network (CAT1, logits)", logits - single),
        judge_above_zero(
            "CAT4 stays ahead if its gradients are probed, too, hashed to as many numbers", whole_logits - logits
        ),
        judge_above_zero("CAT1 fine-tuned is above CAT4 probed", tuned - whole),
        judge_above_zero("and CAT4 fine-tuned is above CAT1 fine-tuned", tuned_whole - tuned),
    ]


def _train_figure_6(setup: desk.Setup, budget: int, seed: int) -> Path:
    return time_concatenation.train_networks(setup, budget, time_concatenation.FIRST_SEED + seed)


def time_concatenation_claims(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    (study,) = _measure_budgets(workplace, _budgets(workplace)[-1:], 2 * workplace.repeats).values()
    tasks = {"unseen digits 5 to 9": "unseen", "digits 0 to 4": "in distribution"}
    plot_points(
        {title: {system: study.correct(task, system) for system in study.systems} for title, task in tasks.items()},
        image,
    )
    conclusions = []
    for judgement in time_concatenation.judge_claims(study):
        difference = desk.format_difference(judgement.difference)
        verdict = {True: HELD, False: FAILED, None: OPEN}[judgement.holds]
        result = f"{difference} points, p = {judgement.p_value:.2g} after Holm's adjustment"
        conclusions.append(Conclusion(f"{judgement.claim.text} (primary)", result, verdict))
    return time_concatenation.format_table(study), conclusions


def saturation(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    budgets = _budgets(workplace)
    studies = _measure_budgets(workplace, budgets, workplace.repeats)

    def select(budget: int, task: str, system: str) -> np.ndarray:
        return studies[budget].correct(task, system)

    counts = time_concatenation.COUNTS
    budget_curve.plot_curve(budgets, select, image, counts)
    before, last = budgets[-2:]

    def gain(system: str) -> np.ndarray:
        return select(last, "unseen", system) - select(before, "unseen", system)

    claim = f"one network gains less than a point from {before:,} to {last:,} steps"
    return budget_curve.format_curve(budgets, select, counts), [
        judge_above_zero(f"eight networks gain from {before:,} to {last:,} steps", gain("cat8")),
        judge_below_a_point(claim, gain("cat1")),
    ]


def _budgets(workplace: Workplace) -> list[int]:
    return SMOKE_BUDGETS if workplace.smoke else BUDGETS


def _measure_budgets(workplace: Workplace, budgets: list[int], repeats: int) -> dict[int, time_concatenation.Study]:
    """The networks of Figure 6, where those of the largest budget are its own."""
    return time_concatenation.measure_budgets(workplace.setup(STUDY, FIGURE_6), budgets, repeats)


def spurious(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    without, with_it = shifts.HEADS
    shares, conclusions = compare_shift("spurious", f"{without}: worst group", workplace)
    panels = {f"worst group,\n{title}": shares[f"{title}: worst group"] for title in shifts.HEADS}
    biased = shares[f"{with_it}: mark reversed"]
    panels["marks reversed,\nhead fitted with the correlation"] = biased
    plot_points(panels, image, "cat8")
    single = [shares[f"{title}: worst group"][shifts.SINGLE] for title in shifts.HEADS]
    with_correlation = "with the correlation in the head's data, too, on reversed marks (CAT8 - CAT1)"
    balanced = "a new head on balanced data helps one network, too (CAT1, without - with)"
    return shifts.format_tables(shares), [
        *conclusions,
        judge_above_zero(with_correlation, biased["cat8"] - biased[shifts.SINGLE]),
        judge_above_zero(balanced, single[0] - single[1]),
    ]


def domains(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    columns = [f"{shifts.DOMAINS}: {column}" for column in shifts.DOMAIN_COLUMNS]
    shares, conclusions = compare_shift("domains", columns[0], workplace)
    titles = (column.replace(", ", ",\n") for column in shifts.DOMAIN_COLUMNS)
    plot_points(dict(zip(titles, (shares[column] for column in columns), strict=True)), image)
    own, others, seen = (shares[column][SUBJECT] - shares[column][shifts.SINGLE] for column in columns)
    return shifts.format_tables(shares), [
        *conclusions,
        judge_above_zero("also without labels of the held-out style (CAT4 - CAT1)", others),
        judge_above_zero("and the gain is larger than in the seen styles (of CAT4 - CAT1)", own - seen),
    ]


def long_tail(workplace: Workplace, image: Path) -> tuple[str, list[Conclusion]]:
    groups = {group: f"{shifts.BALANCED}: {group}" for group in ("unseen", "tail", "head")}
    shares, conclusions = compare_shift("long-tail", groups["unseen"], workplace)
    plot_points({f"{group} classes": shares[column] for group, column in groups.items()}, image, "cat8")
    gains = {group: shares[column]["cat8"] - shares[column][shifts.SINGLE] for group, column in groups.items()}
    return shifts.format_tables(shares), [
        *conclusions,
        judge_above_zero("also on the rarest classes of pretraining (CAT8 - CAT1)", gains["tail"]),
        judge_level("on the most frequent ones they are level, within a point (CAT8 - CAT1)", gains["head"]),
    ]


def compare_shift(name: str, column: str, workplace: Workplace) -> tuple[shifts.Shares, list[Conclusion]]:
    """The numbers of one of `names.SHIFTS`, and what they say of the features in one column."""
    shift = shifts.EXPERIMENTS[name]
    shares = shifts.measure_shift(name, workplace.setup(STUDY, name), workplace.repeats)
    top1 = shares[column]
    largest, projected = shift.largest.upper(), top1[shift.projected]
    whole, single, wide = (top1[system] for system in (shift.largest, shifts.SINGLE, shifts.WIDE))
    control = max((top1[system] for system in desk.CONTROLS), key=np.mean)
    where = f"{column.replace(': ', ', ')}: {largest} is better than CAT1 ({largest} - CAT1)"
    conclusions = [judge_above_zero(where, whole - single)]
    if shift.largest != SUBJECT:
        conclusions.append(judge_above_zero("so is CAT4 (CAT4 - CAT1)", top1[SUBJECT] - single))
    return shares, [
        *conclusions,
        judge_above_zero(f"and it is better than a wide network ({largest} - W2)", whole - wide),
        judge_above_zero(f"also at one member's width ({largest} by PCA - CAT1)", projected - single),
        judge_above_zero(f"it is what was learnt that counts ({largest} - the better control)", whole - control),
    ]


RUNS: dict[str, Callable[[Workplace, Path], tuple[str, list[Conclusion]]]] = {
    "figure-6": time_concatenation_claims,
    "figure-1": figure_1,
    "proposition-2.1": proposition,
    "figure-2": figure_2,
    "figure-4": partial(compare_systems, f"{STUDY}_labeled"),
    "figure-5": partial(compare_systems, f"{STUDY}_turned"),
    "figure-5-vit": partial(compare_systems, f"{STUDY}_vit"),
    "ntk": ntk,
    "saturation": saturation,
    "spurious": spurious,
    "domains": domains,
    "long-tail": long_tail,
}


def find_figure(figure: str, workplace: Workplace, output: Path) -> Finding:
    """A figure from its file in `output`, where it is run and written if it is not there with these options."""
    path = output / f"{figure}.json"
    options = Options(workplace.repeats, workplace.smoke, workplace.first_seed)
    if path.is_file():
        finding = load_finding(path)
        if finding.options == options:
            return finding
    started = time.perf_counter()
    table, conclusions = RUNS[figure](workplace, path.with_suffix(".png"))
    minutes = math.ceil((time.perf_counter() - started) / 60)
    texts = describe_figure(figure, workplace)
    title, setting, paper, limits = (texts.get(key, "") for key in ("title", "setting", "paper", "not_shown"))
    finding = Finding(title, setting, paper, table, conclusions, options, minutes, limits)
    write_json(path, msgspec.to_builtins(finding))
    return finding


def describe_figure(figure: str, workplace: Workplace) -> dict[str, str]:
    """The texts of a figure with the numbers that it was reproduced with."""
    values: dict = {"steps": mixture.STEPS, "budget": f"{BUDGETS[-1]:,}"}
    values["num_features"] = f"{ntk_gap.NUM_FEATURES:,}"
    values["shifts"] = shifts.EXPERIMENTS
    values["initializations"] = workplace.initializations
    return {key: text.format(**values) for key, text in load_texts()[figure].items()}


def load_texts() -> dict:
    """The texts of the page and of each figure."""
    return read_yaml(Path(str(files("concat_ensemble.experiments") / "figures.yaml")))


def load_finding(path: Path) -> Finding:
    return read_json(path, Finding, "delete it")


def format_section(figure: str, finding: Finding, images: str) -> str:
    """A figure as a section in Markdown; `images` is the folder of its PNG file, seen from the page."""
    conclusions = "".join(f"| {each.claim} | {each.result} | **{each.verdict}** |\n" for each in finding.conclusions)
    not_shown = f"**Not shown:** {finding.not_shown}\n\n" if finding.not_shown else ""
    return (
        f"## {finding.title}\n\n`concat-ensemble reproduce {figure}`: {finding.setting}\n\n"
        f"![{finding.title}]({images}/{figure}.png)\n\n{finding.table}\n**In the paper:** {finding.paper}\n\n"
        f"{not_shown}| conclusion | here | |\n|---|---|---|\n{conclusions}"
    )


def format_page(output: Path) -> str:
    """All figures in a folder as one page in Markdown, to be written beside the folder."""
    paths = {figure: output / f"{figure}.json" for figure in names.FIGURES}
    findings = {figure: load_finding(path) for figure, path in paths.items() if path.is_file()}
    verdicts = [conclusion.verdict for finding in findings.values() for conclusion in finding.conclusions]
    counts = {"held": verdicts.count(HELD), "undecided": verdicts.count(OPEN), "failed": verdicts.count(FAILED)}
    repeats = " or ".join(map(str, sorted({finding.options.repeats for finding in findings.values()})))
    first_seeds = sorted({finding.options.first_seed for finding in findings.values()} - {0})
    name = next(iter(findings)) if len(findings) == 1 else "all"
    command = " ".join([f"concat-ensemble reproduce {name}", *(f"--first-seed {seed}" for seed in first_seeds)])
    minutes = sum(finding.minutes for finding in findings.values())
    intro = load_texts()["page"].format(
        command=command, repeats=repeats, minutes=minutes, conclusions=len(verdicts), **counts
    )
    if any(finding.options.smoke for finding in findings.values()):
        intro = f"**Smoke: a few steps only, the numbers mean nothing.**\n\n{intro}"
    sections = [format_section(figure, finding, output.name) for figure, finding in findings.items()]
    return "\n".join([f"# The paper's evidence at desk scale\n\n{intro}\n", *sections])


def reproduce(
    figure: str, *, output: Path = OUTPUT, repeats: int = 4, first_seed: int = 0, smoke: bool = False
) -> Path:
    """Reproduce one of `names.FIGURES`, or "all", and print what came out. What is finished is not run again.

    Returns:
        The page of all figures that are in `output`, which is written beside this folder.

    Raises:
        ValueError: when there are too few repeats.
        RuntimeError: when a training fails.
    """
    check_at_least("repeats", repeats, 2)
    check_at_least("first_seed", first_seed, 0)
    output = output / "smoke" if smoke else output
    output.mkdir(parents=True, exist_ok=True)
    workplace = Workplace(output / "networks", repeats, smoke, first_seed)
    for name in names.FIGURES if figure == "all" else [figure]:
        lines = format_section(name, find_figure(name, workplace, output), output.name).splitlines()
        desk.print_wide(Markdown("\n".join(line for line in lines if not line.startswith("!["))))
    page = output.with_suffix(".md")
    page.write_text(format_page(output))
    desk.print_line(f"\npage: {page}; figures and numbers: {output}")
    return page


def main() -> None:
    parser = desk.create_parser(__doc__, repeats=4)
    time_needed = f"all of them take about {names.MINUTES} minutes on two cores"
    parser.add_argument("figure", choices=(*names.FIGURES, "all"), help=time_needed)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds of the repeats: this one and the next ones")
    parser.set_defaults(output=OUTPUT)
    reproduce(**vars(parser.parse_args()))


if __name__ == "__main__":
    desk.run_script(main)
