"""What the experiments share: studies and tasks, trainings as processes, numbers measured once, and options."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.resources import files
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
from datasets import DatasetDict
from rich.console import RenderableType

from concat_ensemble.console import MEASURED_KEPT, PlainConsole, be_quiet, out, print_error, print_stopped
from concat_ensemble.data.loading import load_data
from concat_ensemble.errors import name_options, option_name
from concat_ensemble.experiments.workers import start_worker
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.files import write_json
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.repeats import Estimate, estimate_over_repeats, estimate_over_repeats_and_images
from concat_ensemble.processes import refuse_several
from concat_ensemble.schema import Share, read_json

SUBJECT = "cat4"  # the ensemble that everything else is compared with
CONTROLS = ("untrained members", "raw pixels")
SMOKE_LIMIT = 100  # images of each split


@dataclass(frozen=True)
class Study:
    """Networks are trained on the digits 0 to 4 of a dataset and probed on 5 to 9."""

    dataset: str
    limit: int | None = None  # images of each split at most
    recipe: str = "timecat"  # or "seeds": networks of several seeds, each trained in full, as SwAV's are in the paper
    wide: bool = True  # whether its recipe has W2


@dataclass(frozen=True)
class Task:
    """What a probe is fitted and tested on."""

    classes: range
    test_size: float  # share of the images, where the dataset has no test split
    shots: int | None = None  # images per class for training and validation together


@dataclass(frozen=True)
class Training:
    """One run of a module of `concat_ensemble.training` with a recipe of the study."""

    module: str
    recipe: str
    output: Path
    label: str  # what is printed
    options: dict[str, Any] = field(default_factory=dict)  # fields of the recipe that differ


STUDIES = {
    "scattered_digits": Study("digits"),
    "scattered_mnist": Study("ylecun/mnist", limit=3_000),
    "scattered_digits_labeled": Study("digits", recipe="seeds"),
    "scattered_digits_turned": Study("digits", recipe="seeds"),
    "scattered_digits_vit": Study("digits", recipe="seeds", wide=False),
}
TASKS = {
    "unseen": Task(range(5, 10), 0.5),
    "few labels": Task(range(5, 10), 0.5, shots=10),
    "in distribution": Task(range(5), 0.3),
}


@dataclass(frozen=True)
class Setup:
    """A study, where its images come from, and the folder for its networks and numbers."""

    study: str
    dataset: str
    output: Path
    smoke: bool = False  # a few steps on a few images, to see that everything runs
    first_seed: int = 0

    def seeds(self, repeats: int) -> range:
        return range(self.first_seed, self.first_seed + repeats)

    @property
    def limit(self) -> int | None:
        return SMOKE_LIMIT if self.smoke else STUDIES[self.study].limit

    def load_task(self, name: str, seed: int) -> DatasetDict:
        """The images of one of `TASKS`, as `concat-ensemble probe` loads them."""
        task = TASKS[name]
        images = {"test_size": task.test_size, "limit": self.limit, "shots": task.shots, "seed": seed}
        return load_data(f"scattered:{self.dataset}", classes=task.classes, **images)

    def train(self, training: Training, seed: int) -> None:
        """Run a training. One that was stopped goes on, and one that is finished is skipped."""
        options = {"dataset": self.dataset, "seed": seed, "output": str(training.output)} | training.options
        arguments = [str(training_recipe_path(f"{self.study}_{training.recipe}")), "--cpu"]
        for name, value in options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            arguments += [f"--{name.replace('_', '-')}", text]
        if self.smoke:
            arguments.append("--smoke")
        run_module(f"concat_ensemble.training.{training.module}", arguments, f"seed {seed}: {training.label}")


def training_recipe_path(name: str) -> Path:
    """The path of an installed training recipe, such as scattered_digits_timecat; it need not exist."""
    return Path(str(files("concat_ensemble.training.recipes") / f"{name}.yaml"))


def plan_members(output: Path, label: str, counts: Sequence[int], steps: int, **options) -> Training:
    """A training of K networks for `steps` / K steps each, for every K in `counts`, without other baselines than those
    of the options."""
    plain = {"members": list(counts), "total_steps": steps, "baseline_extra": 0, "wide_steps": 0, "snapshots": 0}
    return Training("pretraining", "timecat", output, label, plain | options)


def run_module(module: str, arguments: list[str], label: str) -> None:
    """Run the `main` of a module on one core, as `python -m MODULE` does, after printing that command.

    Its process is a fork of one that has imported the libraries already, which takes seconds.

    Raises:
        RuntimeError: when it fails; the message ends with its last lines.
    """
    print_line(label)
    print_line(f"  {shlex.join(['python', '-m', module, *arguments])}", style="dim")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed.txt")
        command = (module, arguments, environment, printed)
        process = _warm_start().Process(target=_run_main, args=command, name=label)
        process.start()
        try:
            process.join()
        finally:
            process.terminate()  # where Ctrl-C ended the waiting; a training saves its state first
            process.join()
        if process.exitcode:
            tail = printed.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{label} failed with exit code {process.exitcode}:\n{tail}")


@cache
def _warm_start() -> Any:  # a context of multiprocessing, whose types lack Process
    """Starts processes as forks of one that has imported `preloaded`, where the system has such a start."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one core each: these networks are too small to share several
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["concat_ensemble.experiments.preloaded"])
    return context


def _run_main(module: str, arguments: list[str], environment: dict[str, str], printed: Path) -> None:
    os.environ.update(environment)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    import_module(module).main()


def map_two_at_a_time(function: Callable, arguments: Iterable) -> list:
    """`function` for each argument, in processes of one core with random generators of their own."""
    try:
        return list(_workers().map(function, arguments))
    except BaseException:
        _workers().shutdown(cancel_futures=True)
        _workers.cache_clear()
        raise


@cache
def _workers() -> ProcessPoolExecutor:
    """Two processes, which one experiment leaves to the next, since they and their imports take 20 s to start."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=start_worker)


class Measured(TypedDict, total=False):
    """A file of `measure_once`: shares by system, or by task and system, and the settings that gave them."""

    top1: Required[dict[str, Share | dict[str, Share]]]
    point: list
    asked: list


def measure_once(path: Path, settings: dict[str, list], measure: Callable[[], dict]) -> dict:
    """The result of `measure`, stored in a file beside its settings; read from there if it has been measured before.

    Raises:
        ValueError: when the file is of other settings.
    """
    if not path.is_file():
        write_json(path, settings | {"top1": measure()})
    content = read_json(path, Measured, "delete it")
    for key, value in settings.items():
        if content.get(key) != value:
            raise ValueError(f"{path} is of {content.get(key)}, not {value}; name another --output, or delete it.")
    return content["top1"]


def probe_tables(tables: dict[str, FeatureTable], seed: int, projected: str = "") -> dict[str, float]:
    """Test top-1 of linear probes as shares of one. The table `projected` holds PCA scores, which stay as they are."""
    top1 = {}
    for name, table in tables.items():
        probe = LinearProbe(standardize=name != projected, seed=seed)
        top1[name] = probe.fit(table["train"], validation=table["validation"]).score(table["test"])
    return top1


def estimate(values: np.ndarray) -> Estimate:
    """The mean of (repeats,) values, or of (repeats, N) values by test image, where the repeats share these."""
    return estimate_over_repeats(values) if values.ndim == 1 else estimate_over_repeats_and_images(values)


def mean_and_interval(shares: np.ndarray) -> tuple[float, float, float]:
    """Mean of shares of one, as `estimate` takes them, and the ends of its 95% interval, all in %, within [0, 100]."""
    low, high = estimate(shares).share_interval
    return 100 * float(shares.mean()), 100 * low, 100 * high


def error_bars(shares: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For matplotlib's `errorbar`: (systems,) means of shares and (2, systems) lengths of the bars below and above, in
    %. They differ where a share is near 0 or 1."""
    mean, low, high = np.transpose([mean_and_interval(each) for each in shares])
    return mean, np.maximum([mean - low, high - mean], 0)  # at 0 and 1 rounding can make a length negative


def format_mean(shares: np.ndarray) -> str:
    """Mean of shares of one, as `estimate` takes them, with its 95% interval, in %."""
    mean, low, high = mean_and_interval(shares)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def format_difference(differences: np.ndarray) -> str:
    """Mean of differences of shares, as `estimate` takes them, with its 95% interval, in percentage points."""
    low, high = np.clip(estimate(differences).interval, -1, 1) if differences.any() else (0.0, 0.0)
    return f"{100 * differences.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def format_markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    lines.insert(1, "|---" * len(heading) + "|")
    return "\n".join(lines) + "\n"


def print_line(text: str, style: str | None = None) -> None:
    """Print text as it is, however many and long its lines are."""
    for line in text.splitlines():
        out.print(line, style=style, soft_wrap=True)


def print_wide(content: RenderableType) -> None:
    """Print a table at the width of the terminal, or without a terminal at one that does not fold it."""
    PlainConsole(width=None if sys.stdout.isatty() else 140).print(content)


def print_table(table: str, repeats: int, figure: Path | None = None) -> None:
    """Print a Markdown table of `format_mean`, and where its figure is."""
    print_line(f"{table}\nTop-1 in %, mean of {repeats} repeats [95% interval]")
    if figure:
        print_line(f"figure: {figure}")


def create_parser(description: str | None, *, repeats: int, studies: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options that the experiments have in common; `repeats` is a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if studies:
        parser.add_argument("study", choices=studies)
        parser.add_argument("--dataset", help="source of the images, such as parquet:FOLDER (default: the Hub)")
    parser.add_argument("--repeats", type=int, default=repeats, help="seeds 0, 1, 2, ..., two at a time")
    parser.add_argument("--smoke", action="store_true", help="run a few steps only, to see that everything works")
    parser.add_argument("--output", type=Path, help="folder for everything that is written (default: in runs/)")
    return parser


def create_setup(study: str, dataset: str | None, output: Path | None, *, name: str, smoke: bool) -> Setup:
    """The setup of a command's options; runs/NAME is the folder if there is no `output`."""
    folder = output or Path("runs") / name
    return Setup(study, dataset or STUDIES[study].dataset, folder / "smoke" if smoke else folder, smoke)


def run_script(main: Callable[[], None]) -> None:
    """Run a command line. It exits with 2 after a mistake or a training that fails, and with 130 after Ctrl-C."""
    be_quiet()
    try:
        refuse_several(Path(sys.argv[0]).stem)
        with name_options(option_name):
            main()
    except KeyboardInterrupt:
        print_stopped(MEASURED_KEPT)
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        print_error(error)
        sys.exit(2)
