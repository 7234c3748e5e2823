"""The CSV file of predictions: an image a row, with the probability of each class or of the most probable ones."""

from __future__ import annotations

import csv
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from concat_ensemble.console import printable
from concat_ensemble.files import replace_file
from concat_ensemble.inference.prediction import Prediction

# With these first, a spreadsheet takes a cell for a formula (owasp.org/www-community/attacks/CSV_Injection).
FORMULA = re.compile(r"[=+@\t\r\n＝＋－＠]|-(?![0-9.])")  # noqa: RUF001


@dataclass
class Summary:
    """What was written: how many images, how often each class was predicted, and which images cannot be read."""

    num_images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def write_predictions(
    path: Path | None,
    heading: str,
    class_names: list[str],
    predictions: Iterable[Prediction],
    *,
    top: int | None = None,
) -> Summary:
    """Write predictions as they come, to a file that takes its place at `path` once it is whole; or to stdout, once
    all are there.

    The columns are `heading` ("file" or "row"), `predicted`, and each class's probability under its name; an
    unreadable image has empty cells. With `top` they are instead `predicted`, `probability`, `predicted_2`,
    `probability_2` and so on, for that many classes. No spreadsheet takes a cell for a formula: a path that looks like
    one begins with ./ instead, and a class name with an apostrophe.
    """
    top = None if top is None else min(top, len(class_names))
    summary = Summary()
    with _open(path) as file:
        writer = csv.writer(_UnixLines(file))
        writer.writerow([heading, *_headings(class_names, heading, top)])
        for name, probabilities, problem in predictions:
            summary.num_images += 1
            if problem is not None:
                summary.problems.append(problem)
            cells = _cells(probabilities, class_names, top)
            summary.counts.update(class_names[int(p.argmax())] for p in (probabilities,) if p is not None)
            writer.writerow([escape_path(name), *cells])
    return summary


def describe_predictions(
    heading: str, class_names: list[str], predictions: Iterable[Prediction], *, top: int | None = None
) -> list[dict[str, Any]]:
    """The same as a list for JSON: the image, `predicted`, and `probabilities` by class, the highest first."""
    names, images = unique_names(class_names), []
    for name, probabilities, _ in predictions:
        order = [] if probabilities is None else np.argsort(-probabilities, kind="stable")[:top].tolist()
        shares = {names[k]: float(probabilities[k]) for k in order} if probabilities is not None else None
        images.append({heading: name, "predicted": class_names[order[0]] if order else None, "probabilities": shares})
    return images


def unique_names(class_names: list[str], taken: Iterable[str] = ()) -> list[str]:
    """The names of classes as headings: those that occur twice or are `taken` are followed by the class's number."""
    counts = Counter([*class_names, *taken])
    return [name if counts[name] == 1 else f"{name} (class {k})" for k, name in enumerate(class_names)]


def escape_path(name: str) -> str:
    """A path that no spreadsheet takes for a formula, and that names the same file."""
    text = name.encode("utf-8", "backslashreplace").decode()  # a file's name need not be Unicode
    return f"./{text}" if FORMULA.match(text) or text.startswith("-") else text


def escape_name(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if FORMULA.match(text) else text


def _headings(class_names: list[str], heading: str, top: int | None) -> list[str]:
    if top is None:
        names = unique_names(class_names, taken=(heading, "predicted"))
        return ["predicted", *map(escape_name, names)]
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    return [f"{column}{rank}" for rank in ranks for column in ("predicted", "probability")]


def _cells(probabilities: np.ndarray | None, class_names: list[str], top: int | None) -> list[str]:
    if probabilities is None:
        return [""] * (1 + len(class_names) if top is None else 2 * top)
    if top is None:
        predicted = escape_name(class_names[int(probabilities.argmax())])
        return [predicted, *(f"{share:.6g}" for share in probabilities.tolist())]
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [cell for k in order for cell in (escape_name(class_names[k]), f"{probabilities[k]:.6g}")]


class _UnixLines:
    """Ends the lines of `csv.writer` with a newline alone. With a `lineterminator` of its own, it would not quote a
    carriage return within a cell (Python 3.11), and readers take that for the end of the row."""

    def __init__(self, file: IO[str]):
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


@contextmanager
def _open(path: Path | None) -> Iterator[IO[str]]:
    """A file to write to that goes to `path`, or to stdout, when the block ends without an error."""
    if path is not None:
        with replace_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            yield file
        return
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as file:
        yield file
        file.seek(0)
        if sys.stdout.isatty():  # whose state no name may change; a program gets the names as they are
            sys.stdout.writelines(f"{printable(line.rstrip())}\n" for line in file)
        else:
            shutil.copyfileobj(file, sys.stdout)
