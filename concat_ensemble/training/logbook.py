"""What people watch while networks train: a line every `log_every` steps, `log.csv`, and a tracker's curves."""

from __future__ import annotations

import csv
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import tqdm

from concat_ensemble.console import out, printable
from concat_ensemble.files import replace_file
from concat_ensemble.training.evaluation import Evaluation
from concat_ensemble.training.recipe import Settings

LOGS = "logs"  # the folder in the output folder
TRAINING_COLUMNS = ("step", "loss", "learning_rate", "images_per_second", "seconds")
EVALUATION_COLUMNS = ("eval_loss", "eval_top1", "eval_top5")
COLUMNS = TRAINING_COLUMNS + EVALUATION_COLUMNS


class Logbook:
    """The log of one training of one or several networks, written by the main process of its team.

    Args:
        files: The CSV file of each network, named like it. Without any, none is written.
        name: Of the training.
        count: Number of networks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        files: Sequence[Path],
        name: str,
        steps: int,
        count: int,
    ):
        self.accelerator, self.settings, self.files, self.steps = accelerator, settings, files, steps
        self.name, self.names = name, [file.stem for file in files]
        if not files:
            self.names = [name] if count == 1 else [f"{name}, network {k}" for k in range(count)]
        self.sums, self.images, self.count = [0.0] * len(self.names), 0.0, 0  # since the last row
        self.since = 0.0  # seconds of the training at the last row
        self.run_id = uuid.uuid4().hex[:8]  # of the tracker
        self._row: dict[str, Any] | None = None
        self._losses: list[float] = []
        self.bar = tqdm(disable=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON, so that rows after it are those of a training without interruption."""
        return {key: getattr(self, key) for key in ("sums", "images", "count", "since", "run_id")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in self.state_dict().keys() & state.keys():
            setattr(self, key, state[key])

    def open(self, step: int) -> Any:
        """Begin after `step`: cut rows after it off the files, start the trackers, and return the bar to be shown on a
        terminal."""
        if self.accelerator.is_main_process and self.settings.log_every:
            for file in self.files:
                cut_log(file, step)
        if self.accelerator.log_with:
            self._start_trackers(step)
        hidden = not (sys.stderr.isatty() and self.accelerator.is_main_process)
        title = printable(f"{self.name} ({self.steps:,} steps)")
        self.bar = tqdm(total=self.steps, initial=step, desc=title, dynamic_ncols=True, disable=hidden)
        return self.bar

    def is_due(self, step: int) -> bool:
        every = self.settings.log_every
        return bool(every) and (step % every == 0 or step == self.steps)

    def add(self, losses: Sequence[Sequence[float]], images: float) -> None:
        """Count the losses of some steps, a row of one for each network for each step, and their images."""
        for row in losses:
            self.sums = [total + value for total, value in zip(self.sums, row, strict=True)]
        self.count, self.images = self.count + len(losses), self.images + images

    def record(self, step: int, seconds: float, learning_rate: float) -> None:
        """Begin a row: the mean loss and the speed since the last one, which are printed."""
        elapsed = max(seconds - self.since, 1e-9)
        speed, left = self.images / elapsed, seconds / step * (self.steps - step)
        self._losses = [total / max(self.count, 1) for total in self.sums]
        values = {"learning_rate": learning_rate, "images_per_second": round(speed, 1), "seconds": round(seconds, 2)}
        self._row = {"step": step} | values
        self.sums, self.images, self.count, self.since = [0.0] * len(self.names), 0.0, 0, seconds
        pace = f"{speed:,.0f} images/s, ETA {timedelta(seconds=round(left))}"
        self.bar.set_postfix_str(f"loss {_mean(self._losses):.3f}, lr {learning_rate:.2e}, {speed:,.0f} images/s")
        if self.bar.disable and self.settings.log_every:
            for name, loss in zip(self.names, self._losses, strict=True):
                share = f"{step:,}/{self.steps:,} ({100 * step // self.steps}%)"
                self.print(f"{name}: step {share}, loss {loss:.4f}, lr {learning_rate:.2e}, {pace}")

    def write(self, step: int, evaluations: Sequence[Evaluation] = (), pause: float = 0.0) -> None:
        """Complete the row with the networks' evaluations, which took `pause` seconds, and write it."""
        self.since += pause
        for name, evaluation in zip(self.names, evaluations, strict=bool(evaluations)):
            self.print(f"{name}: step {step:,}/{self.steps:,}, held-out {evaluation}")
        if self._row is None:
            return
        row, self._row = self._row, None
        self._track(step, row, evaluations)
        if not (self.accelerator.is_main_process and self.settings.log_every):
            return
        for k, file in enumerate(self.files):
            found = evaluations[k].to_dict() if evaluations else {}
            cells = row | {"loss": self._losses[k]} | {f"eval_{key}": value for key, value in found.items()}
            append_row(file, cells)

    def print(self, line: str) -> None:
        """Print a line at once, above the bar if there is one."""
        if self.accelerator.is_main_process:
            self.bar.clear()
            out.print(line, soft_wrap=True)
            out.file.flush()
            self.bar.refresh()

    def _track(self, step: int, row: dict[str, Any], evaluations: Sequence[Evaluation]) -> None:
        values = {key: row[key] for key in ("learning_rate", "images_per_second")} | {"loss": _mean(self._losses)}
        if len(self.names) > 1:
            values |= {f"loss/{k}": loss for k, loss in enumerate(self._losses)}
        for k, evaluation in enumerate(evaluations):
            found = evaluation.to_dict()
            values |= {f"eval_loss/{k}": found.pop("loss")} | {f"{key}/{k}": value for key, value in found.items()}
        self.accelerator.log(values, step=step)

    def _start_trackers(self, step: int) -> None:
        """Start a run of the trackers with the settings as its hyperparameters, or continue that of the checkpoint."""
        options = {
            "tensorboard": {"purge_step": step + 1} if step else {},
            "wandb": {"id": self.run_id, "name": self.name, "resume": "allow"},
            "trackio": {"name": f"{self.name}-{self.run_id}", "resume": "allow"},
        }
        self.accelerator.init_trackers(
            self.name.replace("/", "-"),
            config=None if step else hyperparameters(self.settings) | {"run_id": self.run_id},
            init_kwargs=options,
        )


def hyperparameters(settings: Settings) -> dict[str, bool | float | int | str]:
    """The settings in the types that every tracker takes; others as JSON."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in asdict(settings).items()}


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log as numbers, without empty cells, up to a line that a killed process has left unfinished."""
    rows: list[dict[str, float]] = []
    if not file.is_file():
        return rows
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    for cells in csv.DictReader(whole.splitlines()):
        try:
            row = {key: float(value) for key, value in cells.items() if value}
        except (TypeError, ValueError):  # a line of more or other cells
            break
        if tuple(cells) != COLUMNS or "step" not in row:
            break
        rows.append(row)
    return rows


def draw_curves(files: Sequence[Path], *paths: Path) -> None:
    """Draw the training curves of the networks that have logs, the same figure at each path; none without any log."""
    logs = {file.stem: rows for file in files if (rows := read_log(file))}
    if not logs:
        return
    from concat_ensemble.reporting.training_curves import plot_training  # matplotlib loads after the training

    for path in paths:
        plot_training(logs, path)


def cut_log(file: Path, step: int) -> None:
    """Keep the rows of a log up to a step, letter for letter; a training that starts anew starts a new log."""
    if not file.exists():
        return
    count = sum(row["step"] <= step for row in read_log(file)) if step else 0
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[: count + 1 if count else 0]
    with replace_file(file) as aside:
        aside.write_text("".join(lines), encoding="utf-8")


def append_row(file: Path, cells: dict[str, Any]) -> None:
    """Append a row to a log, and its header first if it is empty. The row is with the system when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as opened:
        writer: Any = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if not opened.tell():
            writer.writeheader()
        writer.writerow(cells)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
