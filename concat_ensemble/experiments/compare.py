"""The paper's table at desk scale: time-concatenation, its baselines and controls on classes that no network has seen.

    python -m concat_ensemble.experiments.compare scattered_digits --full --repeats 5

Trains the networks of the recipe STUDY_timecat.yaml on half of the classes and probes them on the other half, in
several repeats with other seeds, beside the controls that a skeptic asks for. Every training and every probe is a
command that you could run yourself: it is printed, and what is finished is not run again. Without --full the systems
are CAT1, CAT2, CAT4 and W2, which is `make demo`; with it also CAT5, snapshots, members that share their batches,
distillation, fine-tuning and few labels.
"""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.table import Table

from concat_ensemble.errors import check_at_least
from concat_ensemble.experiments import desk
from concat_ensemble.experiments.desk import SUBJECT
from concat_ensemble.reporting.model_card import FIGURES, renew_card
from concat_ensemble.reporting.verdicts import verdict
from concat_ensemble.studies.ensemble_folders import replace_ensemble
from concat_ensemble.studies.results import RESULTS, Results, Row

TOGETHER = f"{SUBJECT}-together"  # CAT4 with members that were trained in one pass, on the same batches
BASELINES = ("cat1", "cat2", "w2")
MORE_BASELINES = ("cat5", "cat4-s", TOGETHER, "distilled/distilled", "two-stage/two-stage")
# Classifiers, which are not probed: their folders, and their names in the table.
FINE_TUNED = {"tuned": f"{SUBJECT}, fine-tuned at once", "tuned-cat1": "cat1, fine-tuned"}
HEADINGS = {"few labels": "10 labels a class", "in distribution": "seen 0 to 4"}


def plan_trainings(setup: desk.Setup, folder: Path, *, full: bool) -> list[desk.Training]:
    """All trainings of one repeat, in order: later ones read the networks of earlier ones."""
    if desk.STUDIES[setup.study].recipe == "seeds":
        return [desk.Training("pretraining", "seeds", folder, "train the members")]
    fewer = {} if full else {"members": [1, 2, 4], "snapshots": 0}
    trainings = [desk.Training("pretraining", "timecat", folder, "train the members", fewer)]
    if not full:
        return trainings
    together = {"members": [4], "snapshots": 0, "wide_steps": 0, "members_per_process": 4}
    teachers = [str(folder / "members" / f"{SUBJECT}-{k}") for k in range(4)]
    trainings += [
        desk.Training("pretraining", "timecat", folder / "together", "train the members in one pass", together),
        desk.Training("distillation", "distill", folder / "distilled", f"distill {SUBJECT}", {"teachers": teachers}),
    ]
    tunings = (("two-stage", SUBJECT, "two"), ("tuned", SUBJECT, "one"), ("tuned-cat1", "cat1", "one"))
    for name, model, stages in tunings:
        options = {"dataset": f"scattered:{setup.dataset}", "model": str(folder / model), "stages": stages}
        trainings.append(desk.Training("finetuning", "finetune", folder / name, f"fine-tune {model}", options))
    return trainings


def plan_probes(setup: desk.Setup, *, full: bool) -> dict[str, list[str]]:
    """The baselines that each task has, as folders of a repeat."""
    baselines = [*BASELINES, *(MORE_BASELINES if full else ())]
    if desk.STUDIES[setup.study].recipe == "seeds":
        baselines = ["w2"] if desk.STUDIES[setup.study].wide else []
    # Two-stage fine-tuning has used all labels of the unseen classes, so it is compared on that task only.
    frozen = [name for name in baselines if "two-stage" not in name]
    tasks = [name for name, task in desk.TASKS.items() if full or not task.shots]
    return {name: baselines if name == "unseen" else frozen for name in tasks}


def run_repeat(setup: desk.Setup, seed: int, *, full: bool) -> dict[str, Results]:
    """Train everything with one seed and probe it, in processes of their own; results by task."""
    folder = setup.output / f"seed-{seed}"
    for training in plan_trainings(setup, folder, full=full):
        setup.train(training, seed)
    if full:
        shutil.copytree(folder / "together" / SUBJECT, folder / TOGETHER, dirs_exist_ok=True)
    results = {}
    for task, baselines in plan_probes(setup, full=full).items():
        path = folder / f"{file_stem(task)}.json"
        run_probe(setup, task, seed, path, baselines=[folder / name for name in baselines])
        results[task] = Results.load(path)
    if full:
        for part, name in FINE_TUNED.items():
            (row,) = Results.load(folder / part / "whole" / RESULTS / "fine-tuned.json").rows
            results["unseen"].rows.append(dataclasses.replace(row, name=name, kind="baseline"))
    return results


def run_probe(setup: desk.Setup, name: str, seed: int, path: Path, *, baselines: list[Path]) -> None:
    """Probe CAT4 and its baselines on a task by the command line, whose results file is `path`."""
    task = desk.TASKS[name]
    classes = f"{task.classes[0]}-{task.classes[-1]}"
    arguments = ["probe", str(path.with_name(SUBJECT)), "--dataset", f"scattered:{setup.dataset}"]
    arguments += ["--classes", classes, "--test-size", str(task.test_size), "--seed", str(seed)]
    arguments += ["--output", str(path), "--quiet", "--json"]
    if task.shots:
        arguments += ["--shots", str(task.shots)]
    if setup.limit:
        arguments += ["--limit", str(setup.limit)]
    for baseline in baselines:
        arguments += ["--baseline", str(baseline)]
    if name == "unseen":
        arguments.append("--save-head")
    desk.run_module("concat_ensemble.commands.app", arguments, f"seed {seed}: probe {name} (classes {classes})")


def file_stem(task: str) -> str:
    return task.replace(" ", "-")


def run_repeats(setup: desk.Setup, repeats: int, *, full: bool) -> dict[str, Results]:
    """All repeats, two at a time, merged by task."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        measured = list(pool.map(lambda seed: run_repeat(setup, seed, full=full), setup.seeds(repeats)))
    return {task: Results.merged([results[task] for results in measured]) for task in measured[0]}


def select_rows(results: Results) -> list[Row]:
    """The systems that were trained as such. Where CAT1 was not, the parts of CAT4 take its place."""
    return [row for row in results.rows if row.kind not in ("first_members", "member") or "cat1" not in results]


def single_network_top1(results: Results) -> np.ndarray:
    """(repeats,) top-1 of CAT1, or where it was not trained as such the mean over the members of CAT4."""
    rows = [results["cat1"]] if "cat1" in results else [row for row in results.rows if row.kind == "member"]
    return np.mean([row.top1 for row in rows], axis=0)


def build_table(studies: dict[str, Results]) -> tuple[list[str], list[list[str]]]:
    """The heading, and rows from the worst system to the best on the unseen classes."""
    unseen = studies["unseen"]
    others = [task for task in studies if task != "unseen"]
    heading = ["", "features", "steps", "unseen 5 to 9", f"{SUBJECT} minus it, paired"]
    heading += [HEADINGS[task] for task in others]
    rows = []
    for row in sorted(select_rows(unseen), key=lambda row: row.mean):
        paired = "" if row.name == SUBJECT else desk.format_difference(unseen[SUBJECT].top1 - row.top1)
        cells = [row.name, f"{row.num_features:,}", f"{row.steps:,}", desk.format_mean(row.top1), paired]
        for task in others:
            results = studies[task]
            cells.append(desk.format_mean(results[row.name].top1) if row.name in results else "")
        rows.append(cells)
    return heading, rows


def print_results(studies: dict[str, Results], *, smoke: bool) -> None:
    """Print the table, the paired differences to a single network, and the verdict of each task."""
    unseen = studies["unseen"]
    if smoke:
        desk.print_line("SMOKE: a few steps only, the numbers mean nothing", style="bold")
    protocols = " and ".join(results.protocol for results in studies.values())
    desk.print_line(f"Top-1 in %, mean of {unseen.repeats} repeats [95% interval]; protocols {protocols}")
    heading, rows = build_table(studies)
    table = Table()
    for text in heading:
        table.add_column(text, justify="right" if text else "left")
    for cells in rows:
        table.add_row(*cells, style="bold" if cells[0] == SUBJECT else None)
    desk.print_wide(table)
    single = "cat1" if "cat1" in unseen else "a member"
    gains = ", ".join(f"{gain:+.1f}" for gain in 100 * (unseen[SUBJECT].top1 - single_network_top1(unseen)))
    desk.print_line(f"{SUBJECT} minus {single}, repeat by repeat: {gains}")
    for task, results in studies.items():
        desk.print_line(f"{task.capitalize()}: {verdict(results).replace('**', '')}")


def save_ensemble(studies: dict[str, Results], output: Path) -> Path:
    """Copy the ensemble of the first repeat, with the results of all repeats on its card, and return its folder."""
    folder = output / SUBJECT
    not_copied = shutil.ignore_patterns(RESULTS, FIGURES, "README.md")

    def save(new: Path) -> None:
        shutil.copytree(output / "seed-0" / SUBJECT, new, ignore=not_copied, dirs_exist_ok=True)
        for task, results in studies.items():
            results.save(new / RESULTS / f"{file_stem(task)}.json")

    replace_ensemble(folder, save, lambda new: renew_card(new, folder))
    return folder


def main() -> None:
    parser = desk.create_parser(__doc__, repeats=5, studies=tuple(desk.STUDIES))
    parser.add_argument("--full", action="store_true", help="train every system of the paper, not only CAT and W2")
    options = parser.parse_args()
    repeats = 2 if options.smoke else options.repeats
    check_at_least("repeats", repeats, 2)
    if options.full and not desk.training_recipe_path(f"{options.study}_finetune").is_file():
        raise ValueError(f"--full needs a recipe for fine-tuning, which {options.study} lacks; leave --full out.")
    setup = desk.create_setup(options.study, options.dataset, options.output, name=options.study, smoke=options.smoke)
    studies = run_repeats(setup, repeats, full=options.full)
    print_results(studies, smoke=options.smoke)
    (setup.output / "table.md").write_text(desk.format_markdown(*build_table(studies)))
    folder = save_ensemble(studies, setup.output)
    source = f'from_pretrained("{folder}")'
    repeated = f"of each repeat: {setup.output}/seed-*"
    desk.print_line(f"\nA complete Hub folder, with card and figures: {folder} ({repeated}).")
    desk.print_line("Load it:\n\n    import concat_ensemble")
    desk.print_line("    from transformers import AutoImageProcessor, AutoModel")
    desk.print_line(f"    processor = AutoImageProcessor.{source}\n    model = AutoModel.{source}")


if __name__ == "__main__":
    desk.run_script(main)
