"""The paper's table on a desk: time-concatenation and what it is compared with, on classes that no network has seen.

    .venv/bin/python training/compare.py scattered_digits --full --repeats 5

Trains the networks of `training/recipes/STUDY_timecat.yaml` on half of the classes and probes them on the other half, in several repeats
with other seeds, beside the controls that a sceptic asks for. Everything is done by the scripts that you would use yourself; their
commands are printed, and what is finished is not done again. Without `--full`: CAT1, CAT2, CAT4 and W2 alone, which is `make demo`; with it
CAT5, snapshots, members that share their batches, distillation, fine-tuning and few labels besides.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from rich.console import Console
from rich.table import Table

from concat_ensemble.console import be_quiet
from concat_ensemble.data.loading import load_data
from concat_ensemble.files import write_json
from concat_ensemble.reporting.model_card import FIGURES, write_card
from concat_ensemble.reporting.verdicts import verdict
from concat_ensemble.studies.results import RESULTS, Results, Row, t_interval

HERE = Path(__file__).parents[2] / "training"
SUBJECT = "cat4"
OTHERS = ("cat1", "cat2", "w2")  # what it is compared with
TOGETHER = f"{SUBJECT}-together"  # its members trained in one pass, on the same batches
MORE = ("cat5", "cat4-s", TOGETHER, "distilled/distilled", "two-stage/two-stage")
IMAGES = {
    "scattered_digits": ("digits", None),
    "scattered_mnist": ("ylecun/mnist", 3_000),
}  # dataset, images of each split
SEEDS = {
    "scattered_digits_turned": ("digits", None),
    "scattered_digits_vit": ("digits", None),
}  # as SwAV's: each in full
# What is measured: classes, share of images for the test where there is no test split, and images of a class.
STUDIES = {"unseen": ("5-9", 0.5, None), "few labels": ("5-9", 0.5, 10), "in distribution": ("0-4", 0.3, None)}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def repeat(study: str, seed: int, output: Path, dataset: str, full: bool, smoke: bool) -> dict[str, Results]:
    """Train everything with one seed and probe it, in processes of their own."""
    folder = output / f"seed-{seed}"
    program = str(Path(sys.executable).with_name("concat-ensemble"))
    limit = (IMAGES | SEEDS)[study][1]
    small = ["--smoke"] if smoke else []

    def script(name: str, recipe: str, part: str, what: str, *words: str, data: str = dataset) -> None:
        command = [f"training/{name}.py", f"training/recipes/{study}_{recipe}.yaml", "--cpu", "--dataset", data]
        target = ["--seed", str(seed), "--output", str(folder / part)]
        call([sys.executable, *command, *target, *words, *small], f"seed {seed}: {what}")

    fewer = [] if full or study in SEEDS else ["--members", "[1, 2, 4]", "--snapshots", "0"]
    script("pretrain_members", "seeds" if study in SEEDS else "timecat", ".", "train the members", *fewer)
    names = ["w2"] if study in SEEDS else [*OTHERS, *(MORE if full else ())]
    if full:
        alone = ["--members", "[4]", "--snapshots", "0", "--wide-steps", "0", "--members-per-process", "4"]
        script("pretrain_members", "timecat", "together", "train the members in one pass", *alone)
        together = [str(folder / "together" / SUBJECT), "--output", str(folder / TOGETHER), "--overwrite"]
        call([program, "build", *together], f"seed {seed}: name it {TOGETHER}")
        teachers = f"[{', '.join(str(folder / 'members' / f'{SUBJECT}-{k}') for k in range(4))}]"
        script("distill", "distill", "distilled", f"distil {SUBJECT}", "--teachers", teachers)
        for part, model, stages in (
            ("two-stage", SUBJECT, "two"),
            ("tuned", SUBJECT, "one"),
            ("tuned-cat1", "cat1", "one"),
        ):
            words = ["--model", str(folder / model), "--stages", stages]
            script("finetune", "finetune", part, f"fine-tune {model}", *words, data=f"scattered:{dataset}")
    found = {}
    for measured, (classes, test_size, shots) in STUDIES.items():
        if shots and not full:
            continue
        path = folder / f"{measured.replace(' ', '-')}.json"
        probe = [program, "probe", str(folder / SUBJECT), "--dataset", f"scattered:{dataset}", "--classes", classes]
        probe += ["--test-size", str(test_size), "--seed", str(seed), "--output", str(path), "--quiet", "--json"]
        probe += ["--shots", str(shots)] if shots else []
        probe += ["--limit", "100" if smoke else str(limit)] if smoke or limit else []
        tuned = measured == "unseen"
        for name in names:
            if tuned or "two-stage" not in name:
                probe += ["--baseline", str(folder / name)]
        call([*probe, *(["--save-head"] if tuned else [])], f"seed {seed}: probe {measured} (classes {classes})")
        found[measured] = Results.load(path)
    if full:
        for part, name in (("tuned", f"{SUBJECT}, fine-tuned at once"), ("tuned-cat1", "cat1, fine-tuned")):
            (row,) = Results.load(folder / part / "whole" / RESULTS / "fine-tuned.json").rows
            found["unseen"].rows.append(dataclasses.replace(row, name=name, kind="baseline"))
    return found


def run(study: str, output: Path, dataset: str, repeats: int, *, full: bool, smoke: bool) -> dict[str, Results]:
    """All repeats, two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda seed: repeat(study, seed, output, dataset, full, smoke), range(repeats)))
    return {name: Results.merged([results[name] for results in found]) for name in found[0]}


def call(command: list[str], what: str) -> None:
    console.print(what)
    console.print(f"  {shlex.join([Path(command[0]).name, *command[1:]])}", style="dim", soft_wrap=True, markup=False)
    # One core each: these networks are too small to share several.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = [str(HERE.parent / word) if word.startswith("training/") else word for word in command]  # wherever we are
    done = subprocess.run(found, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def train(
    study: str,
    dataset: str,
    folder: Path,
    counts: Sequence[int],
    steps: int,
    seed: int,
    smoke: bool,
    what: str,
    *words: str,
) -> None:
    """Networks of a study's recipe: K for `steps` / K each, for every K in `counts`, and nothing besides."""
    command = ["training/pretrain_members.py", f"training/recipes/{study}_timecat.yaml", "--cpu", "--dataset", dataset]
    command += ["--members", str(list(counts)), "--baseline-extra", "0", "--wide-steps", "0", "--snapshots", "0"]
    command += ["--total-steps", str(steps), "--seed", str(seed), "--output", str(folder), *words]
    call([sys.executable, *command, *(["--smoke"] if smoke else [])], what)


def data_of(study: str, dataset: str, measured: str, seed: int, smoke: bool) -> DatasetDict:
    """What one of `STUDIES` is measured on, as `concat-ensemble probe` loads it."""
    classes, test_size, shots = STUDIES[measured]
    low, high = map(int, classes.split("-"))
    limit = 100 if smoke else IMAGES[study][1]
    scattered = f"scattered:{dataset}"
    return load_data(scattered, classes=range(low, high + 1), test_size=test_size, limit=limit, shots=shots, seed=seed)


def kept(path: Path, asked: dict[str, list], measure: Callable[[], dict]) -> dict:
    """What `measure` gives, in a file after what was `asked`; read from there where it was measured before.

    Raises:
        ValueError: where the file is of something else.
    """
    if not path.is_file():
        write_json(path, asked | {"top1": measure()})
    content = json.loads(path.read_text())
    ((key, wanted),) = asked.items()
    if content[key] != wanted:
        raise ValueError(f"{path} is of {content[key]}, not {wanted}; name another --output, or delete it.")
    return content["top1"]


def table_of(studies: dict[str, Results]) -> list[list[str]]:
    """Headings and rows."""
    headings = ["", "columns", "steps", "unseen 5 to 9", f"{SUBJECT} minus it, paired"]
    named = {"few labels": "10 labels a class", "in distribution": "seen 0 to 4"}
    return [headings + [named[name] for name in studies if name != "unseen"], *format_rows(studies)]


def in_markdown(table: list[list[str]]) -> str:
    headings, *rows = table
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, ["---"] * len(headings), *rows))


def format_rows(studies: dict[str, Results]) -> list[list[str]]:
    """The table's cells, from the worst to the best on the unseen classes."""
    unseen, rows = studies["unseen"], []
    for row in sorted(shown(unseen), key=lambda row: row.mean):
        cells = [row.name, f"{row.num_features:,}", f"{row.steps:,}", told(row.top1), ""]
        if row.name != SUBJECT:
            cells[-1] = told(unseen[SUBJECT].top1 - row.top1, "+")
        others = [results for name, results in studies.items() if name != "unseen"]
        rows.append([*cells, *(told(results[row.name].top1) if row.name in results else "" for results in others)])
    return rows


def two_at_a_time(function: Callable, arguments: Iterable) -> list:
    """`function` of each, in processes of one core and of generators of their own: untrained networks are drawn from torch's global one."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_in_a_process) as pool:
        return list(pool.map(function, arguments))


def _in_a_process() -> None:
    torch.set_num_threads(1)
    be_quiet()


def shown(results: Results) -> list[Row]:
    """Systems that were trained as such; where CAT1 was not, those that are parts of CAT4 stand for it."""
    return [row for row in results.rows if row.kind not in ("first_members", "member") or "cat1" not in results]


def one_network(results: Results) -> np.ndarray:
    """(repeats,): CAT1, or where it was not trained as such the mean of the members of CAT4."""
    rows = [results["cat1"]] if "cat1" in results else [row for row in results.rows if row.kind == "member"]
    return np.mean([row.top1 for row in rows], axis=0)


def told(shares: np.ndarray, sign: str = "") -> str:
    """The mean over repeats of shares of one, in %, and its 95% interval; `sign="+"` for differences."""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (shares.mean(), *t_interval(shares)))
    return f"{mean} [{low}, {high}]"


def show(studies: dict[str, Results], output: Path, smoke: bool) -> None:
    """Print the table, and leave it in Markdown."""
    unseen = studies["unseen"]
    if smoke:
        console.print("SMOKE: a few steps only, the numbers mean nothing", style="bold")
    protocols = " and ".join(results.protocol for results in studies.values())
    console.print(f"Top-1 in %, mean of {unseen.repeats} repeats [95% t-interval]; protocols {protocols}")
    lines = table_of(studies)
    headings, *rows = lines
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for cells in rows:
        table.add_row(*cells, style="bold" if cells[0] == SUBJECT else None)
    console.print(table)
    (output / "table.md").write_text(in_markdown(lines))
    paired = 100 * (unseen[SUBJECT].top1 - one_network(unseen))
    console.print(
        f"{SUBJECT} minus {'cat1' if 'cat1' in unseen else 'a member'}, repeat by repeat: {', '.join(f'{value:+.1f}' for value in np.atleast_1d(paired))}"
    )
    for name, results in studies.items():
        console.print(f"{name.capitalize()}: {verdict(results).replace('**', '')}", soft_wrap=True)


def publish(studies: dict[str, Results], output: Path) -> Path:
    """The ensemble of the first repeat, with the results of all repeats on its card."""
    folder = output / SUBJECT
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(output / "seed-0" / SUBJECT, folder, ignore=shutil.ignore_patterns(RESULTS, FIGURES, "README.md"))
    for study, results in studies.items():
        results.save(folder / RESULTS / f"{study.replace(' ', '-')}.json")
    write_card(folder, title=SUBJECT)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*IMAGES, *SEEDS))
    parser.add_argument("--full", action="store_true", help="every system of the paper, not CAT and W2 alone")
    parser.add_argument("--smoke", action="store_true", help="two repeats of a few steps, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--output", type=Path, help="runs/STUDY when left out")
    parser.add_argument("--dataset", help="where the images are, such as parquet:FOLDER; on the Hub when left out")
    options = parser.parse_args()
    dataset = options.dataset or (IMAGES | SEEDS)[options.study][0]
    repeats = 2 if options.smoke else options.repeats
    output = options.output or Path("runs") / options.study
    output = output / "smoke" if options.smoke else output
    if repeats < 2:
        sys.exit(f"error: --repeats {repeats}: an interval needs at least 2.")
    if options.full and not (HERE / "recipes" / f"{options.study}_finetune.yaml").is_file():
        sys.exit(
            f"error: --full needs recipes for distilling and fine-tuning, which {options.study} has not; leave it out."
        )
    studies = run(options.study, output, dataset, repeats, full=options.full, smoke=options.smoke)
    show(studies, output, options.smoke)
    folder = publish(studies, output)
    console.print(
        f"\nA complete Hub folder, with card and figures: {folder} (and one for each repeat in {output}/seed-*). Load it:\n",
        soft_wrap=True,
    )
    for line in (
        "from transformers import AutoImageProcessor, AutoModel",
        f'processor = AutoImageProcessor.from_pretrained("{folder}", trust_remote_code=True)',
        f'model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)',
    ):
        console.print(f"    {line}", soft_wrap=True)


def to_the_end(main: Callable[[], None]) -> None:
    """Run a script whose parts are processes; Ctrl-C and a part that fails end it without a traceback of this one."""
    be_quiet()
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    to_the_end(main)
