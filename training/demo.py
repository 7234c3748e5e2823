"""The paper's claim on real handwritten digits, in minutes, with the controls that a sceptic asks for: `make demo`.

Networks are trained on scattered digits 0 to 4 and probed on scattered digits 5 to 9, which none has seen, in several
repeats with other seeds. Everything is done by the scripts that you would use yourself; their commands are printed.
What is finished is not done again.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from concat_ensemble.model_card import FIGURES, RESULTS, verdict, write_card
from concat_ensemble.results import Results

HERE = Path(__file__).parent
SYSTEMS = ("cat1", "cat2", "w2")  # what cat4 is compared with
STUDIES = {"unseen": ("5-9", 0.5), "in distribution": ("0-4", 0.3)}  # classes, share of images for the test
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def repeat(seed: int, output: Path, smoke: bool) -> dict[str, Results]:
    """Train everything with one seed and probe it, in processes of their own."""
    folder = output / f"seed-{seed}"
    train = [
        "training/pretrain_members.py",
        "training/recipes/scattered_digits_timecat.yaml",
        "--cpu",
        "--seed",
        str(seed),
        "--output",
        str(folder),
    ]
    call([sys.executable, *train, *(["--smoke"] if smoke else [])], f"seed {seed}: train cat1, cat2, cat4 and w2")
    found = {}
    for study, (classes, test_size) in STUDIES.items():
        path = folder / f"{study.replace(' ', '-')}.json"
        probe = [
            str(Path(sys.executable).with_name("concat-ensemble")),
            "probe",
            str(folder / "cat4"),
            "--dataset",
            "scattered-digits",
        ]
        probe += [
            "--classes",
            classes,
            "--test-size",
            str(test_size),
            "--seed",
            str(seed),
            "--output",
            str(path),
            "--quiet",
            "--json",
        ]
        probe += [word for name in SYSTEMS for word in ("--baseline", str(folder / name))] + (
            ["--limit", "100"] if smoke else []
        )
        call(
            [*probe, *(["--save-head"] if study == "unseen" else [])], f"seed {seed}: probe {study} (digits {classes})"
        )
        found[study] = Results.load(path)
    return found


def call(command: list[str], what: str) -> None:
    console.print(f"{what}\n  [dim]{shlex.join([Path(command[0]).name, *command[1:]])}[/]", soft_wrap=True)
    # One core each: these networks are too small to share several.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{what} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def show(studies: dict[str, Results], smoke: bool) -> None:
    unseen, known = studies["unseen"], studies["in distribution"]
    if smoke:
        console.print("SMOKE: a few steps only, the numbers mean nothing", style="bold")
    console.print(
        f"Linear probe, top-1 in %, mean of {unseen.repeats} repeats [95% t-interval]; protocols {unseen.protocol} and {known.protocol}"
    )
    table = Table()
    for heading in ("", "columns", "steps", "unseen 5 to 9", "cat4 minus it, paired", "seen 0 to 4"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in sorted((row for row in unseen.rows if row.kind not in ("prefix", "member")), key=lambda row: row.mean):
        (low, high), at_home = row.interval, known[row.name].mean
        cells = [
            row.name,
            f"{row.width:,}",
            f"{row.steps:,}",
            f"{100 * row.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        ]
        mean, (low, high), _ = unseen.difference("cat4", row.name)
        cells.append("" if row.name == "cat4" else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        table.add_row(*cells, f"{100 * at_home:.1f}", style="bold" if row.name == "cat4" else None)
    console.print(table)
    paired = 100 * (unseen["cat4"].top1 - unseen["cat1"].top1)
    console.print(f"cat4 minus cat1, repeat by repeat: {', '.join(f'{value:+.1f}' for value in np.atleast_1d(paired))}")
    console.print(
        f"Unseen digits: {verdict(unseen).replace('**', '')}\nDigits 0 to 4: {verdict(known).replace('**', '')}",
        soft_wrap=True,
    )


def publish(studies: dict[str, Results], output: Path) -> Path:
    """The ensemble of the first repeat, with the results of all repeats on its card."""
    folder = output / "cat4"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(output / "seed-0" / "cat4", folder, ignore=shutil.ignore_patterns(RESULTS, FIGURES, "README.md"))
    for study, results in studies.items():
        results.save(folder / RESULTS / f"{study.replace(' ', '-')}.json")
    write_card(folder, title="cat4")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two repeats of a few steps, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5, help="seeds 0, 1, 2, ... (two at a time)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    repeats = 2 if options.smoke else options.repeats
    output = options.output / "smoke" if options.smoke else options.output
    if repeats < 2:
        sys.exit(f"error: --repeats {repeats}: an interval needs at least 2.")
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda seed: repeat(seed, output, options.smoke), range(repeats)))
    studies = {study: Results.merged([results[study] for results in found]) for study in STUDIES}
    show(studies, options.smoke)
    folder = publish(studies, output)
    console.print(
        f"\nA complete Hub folder, with card and figures: {folder} (and one for each repeat in {output}/seed-*). Load it:\n",
        soft_wrap=True,
    )
    console.print("    from transformers import AutoImageProcessor, AutoModel", soft_wrap=True)
    console.print(
        f'    processor = AutoImageProcessor.from_pretrained("{folder}", trust_remote_code=True)', soft_wrap=True
    )
    console.print(f'    model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)', soft_wrap=True)


if __name__ == "__main__":
    main()
