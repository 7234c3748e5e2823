"""The terminal: consoles for results and messages, the progress of a stage, and a way to silence other libraries.

Names of files, datasets and classes come from anywhere. Both consoles print them, in sentences and in the cells of
tables, as plain text on one line, so whoever prints has nothing to escape.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import wrapt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.protocol import is_renderable
from rich.text import Text

from concat_ensemble.errors import describe_error


def printable(value: object) -> str:
    """Text on one line, without the characters that control a terminal or the direction of the text: line ends and
    tabs become spaces, and all others that cannot be printed are left out. Bytes of a file's name that are no Unicode
    become \\udc..."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return "".join(filter(str.isprintable, re.sub(r"\s", " ", text)))


def stack_lines(*lines: object) -> Text:
    """Text on several lines, such as the heading of a column."""
    return Text("\n".join(map(printable, lines)))


class PlainConsole(Console):
    """A console for which every string, also in the cells and headings of a table, is one line of plain text: neither
    markup nor emoji codes, nor anything that `printable` removes. For several lines or a style, give a `Text`."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(each if is_renderable(each) else str(each) for each in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        plain: dict[str, Any] = {"markup": False, "emoji": False}
        return super().render_str(printable(text), **(options | plain))


out = PlainConsole()
errors = PlainConsole(stderr=True)

MEASURED_KEPT = "goes on: finished trainings and measured numbers are kept"  # after Ctrl-C in an experiment


def let_main_process_speak() -> None:
    """Wait in the other processes of a launch before an error is printed: one that all of them meet is then printed
    once, since the launcher ends them when the main process has ended."""
    if _is_other_process():
        time.sleep(OTHERS_WAIT)


def print_error(error: Exception) -> None:
    """Print an error on stderr: one line, or the several lines that a process of ours has ended with."""
    let_main_process_speak()
    for line in f"error: {describe_error(error)}".splitlines():
        errors.print(line, soft_wrap=True)


def print_stopped(goes_on: str) -> None:
    """Say on stderr, after Ctrl-C, how the same command goes on."""
    errors.print()
    errors.print(f"stopped; the same command {goes_on}.", soft_wrap=True)


OTHERS_WAIT = 15.0  # seconds, in which a busy machine too comes to the end of the main process
LINE_SECONDS = 30.0  # between two lines of one stage where there is no terminal


@contextmanager
def show_progress(
    stage: str, total: int | None, *, unit: str = "images", quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show how far a stage is, on stderr: a bar on a terminal; elsewhere, such as in a log, a line at its start, one
    every 30 seconds and one at its end. Of several processes only the first one shows it.

        with show_progress("probes", len(tables), unit="probes") as advance:
            for table in tables:
                ...
                advance()  # or advance(64) after 64 of them

    Args:
        stage: What is done, such as "features".
        total: Number of steps, or None where it is not known.
        unit: What a step is, in the plural.
        quiet: Show nothing.
    """
    if quiet or _is_other_process():
        yield lambda steps=1: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with ProgressBar(*columns, console=errors) as bar:
            task = bar.add_task(printable(stage), total=total)
            yield lambda steps=1: bar.advance(task, steps)
    else:
        lines = _StageLines(stage, total, unit)
        yield lines.advance
        lines.write()


def _is_other_process() -> bool:
    """Whether this is one of several processes, and not the first, as accelerate and torchrun number them."""
    return os.environ.get("RANK", "0") != "0"


def describe_progress(stage: str, done: int, total: int | None, *, unit: str, seconds: float) -> str:
    """One line on a stage of which `done` of `total` steps took so many seconds, with its speed and the time left."""
    counts = f"{stage}: {done:,} {unit}" if total is None else f"{stage}: {done:,} of {total:,} {unit}"
    if not done or seconds <= 0:
        return counts
    if done == total:
        return f"{counts} in {describe_seconds(seconds)}, {_describe_speed(done / seconds, unit)}"
    if total is None:
        return f"{counts}, {_describe_speed(done / seconds, unit)}"
    left = describe_seconds((total - done) * seconds / done)
    return f"{counts}, {_describe_speed(done / seconds, unit)}, about {left} left"


def describe_seconds(seconds: float) -> str:
    """A duration in seconds, minutes or hours, such as "45 s", "12 min" or "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _describe_speed(speed: float, unit: str) -> str:
    """Steps per second, or per minute where that reads better."""
    if speed < 0.1:
        return f"{60 * speed:.1f} {unit}/min"
    return f"{speed:,.0f} {unit}/s" if speed >= 9.95 else f"{speed:.1f} {unit}/s"


class _StageLines:
    """The lines on one stage; the first is written at once."""

    def __init__(self, stage: str, total: int | None, unit: str):
        self._stage, self._total, self._unit, self._done = stage, total, unit, 0
        self._started = self._written = time.monotonic()
        _write_line(f"{stage}: {unit} of a stream" if total is None else f"{stage}: {total:,} {unit}")

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if (self._total is None or self._done < self._total) and time.monotonic() - self._written >= LINE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write how far the stage is now."""
        self._written = time.monotonic()
        seconds = self._written - self._started
        _write_line(describe_progress(self._stage, self._done, self._total, unit=self._unit, seconds=seconds))


def _write_line(line: str) -> None:
    errors.print(line, soft_wrap=True)


class _PlainFormatter(logging.Formatter):
    """Writes the message of a log record as plain text on one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def be_quiet() -> None:
    """Show our own progress bars only, and warnings as plain text. Other libraries are silenced when they are
    imported; none is imported here."""
    if logging.lastResort is not None:  # what writes warnings where nobody has set up logging
        logging.lastResort.setFormatter(_PlainFormatter())
    for name in ("torch.utils._pytree", "torchao"):  # which warn when transformers imports torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    wrapt.register_post_import_hook(lambda logging: logging.disable_progress_bar(), "datasets.utils.logging")
    wrapt.register_post_import_hook(_silence_transformers, "transformers.utils.logging")


def _silence_transformers(logging) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
