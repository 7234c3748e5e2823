"""The table of SECURITY.md names tests that exist, with the number of their cases."""

from pathlib import Path

from tests.safety.count_cases import HERE, PAGE, TOTAL, collect, count, find_cases, read_rows


def test_the_table_of_promises_is_true():
    page = PAGE.read_text()
    rows = read_rows(page)
    names = collect(rows)
    counts, total = count(rows, names)
    assert [row.cases for row in rows] == counts, "write the table with python tests/safety/count_cases.py --write"
    assert TOTAL.search(page)[0] == f"| **all** | | {total} |"
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == len(lines) - 2, "a row is not read: it must have tests in backticks and a number"
    counted = set().union(*(find_cases(test, names) for row in rows for test in row.tests))
    files = {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert files == {Path(name.split("::")[0]).name for name in counted if name.startswith("tests/safety/")}
