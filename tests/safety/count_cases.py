"""The table of SECURITY.md: its promises, the tests that try to break them, and how many cases these have.

    python tests/safety/count_cases.py           print the number of cases of each promise
    python tests/safety/count_cases.py --write   and write it into SECURITY.md

A row names tests in this folder: whole files, as `test_fuzz.py`, and functions of any file, as `test_the_name` or
`test_the_*`. Tests elsewhere are named by their path, as `tests/test_golden.py` or `tests/test_golden.py::test_the_*`.
"""

import contextlib
import io
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PAGE = ROOT / "SECURITY.md"
ROW = re.compile(r"^\| (?P<promise>.+) \| (?P<tests>`.+`) \| (?P<cases>\d*) \|$", re.MULTILINE)
TOTAL = re.compile(r"^(\| \*\*all\*\* \| \| )\d*( \|)$", re.MULTILINE)


class Row(NamedTuple):
    promise: str
    tests: list[str]
    cases: int


class Collected:
    """A plugin that keeps the names of all cases."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


def read_rows(page: str) -> list[Row]:
    matches = ROW.finditer(page)
    return [Row(row["promise"], re.findall(r"`([^`]+)`", row["tests"]), int(row["cases"] or 0)) for row in matches]


def collect(rows: list[Row]) -> list[str]:
    """The names of all cases in this folder and in the files that rows name, the slow ones too."""
    elsewhere = {test.split("::")[0] for row in rows for test in row.tests if "/" in test}
    plugin, options = Collected(), ["--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        files = [str(ROOT / path) for path in sorted(elsewhere)]
        code = pytest.main([*options, f"--rootdir={ROOT}", str(HERE), *files], [plugin])
    if code != 0:
        raise SystemExit(f"the tests cannot be collected: {said.getvalue()[-2000:]}")
    return plugin.names


def find_cases(test: str, names: list[str]) -> set[str]:
    """The cases that a row means by a test."""
    here = HERE.relative_to(ROOT).as_posix()
    if "/" in test:
        path, _, function = test.partition("::")
    else:
        path, function = (f"{here}/{test}", "") if test.endswith(".py") else (f"{here}/*", test)
    pattern = f"{path}::{function or '*'}"
    return {name for name in names if fnmatchcase(name.split("[")[0], pattern)}


def count(rows: list[Row], names: list[str]) -> tuple[list[int], int]:
    """The number of cases of each row, and of all together. Raises ValueError for a test that is not there."""
    found = []
    for row in rows:
        cases = {test: find_cases(test, names) for test in row.tests}
        if missing := [test for test, each in cases.items() if not each]:
            raise ValueError(f"there is no test {', '.join(missing)}, which SECURITY.md names for: {row.promise}")
        found.append(set().union(*cases.values()))
    return [len(cases) for cases in found], len(set().union(*found))


def main() -> None:
    page = PAGE.read_text()
    rows = read_rows(page)
    counts, total = count(rows, collect(rows))
    for row, cases in zip(rows, counts, strict=True):
        sys.stdout.write(f"{cases:>6}  {row.promise[:100]}\n")
    sys.stdout.write(f"{total:>6}  all\n")
    if "--write" in sys.argv[1:]:
        numbers = iter(counts)
        page = ROW.sub(lambda row: f"| {row['promise']} | {row['tests']} | {next(numbers)} |", page)
        PAGE.write_text(TOTAL.sub(rf"\g<1>{total}\2", page))


if __name__ == "__main__":
    main()
