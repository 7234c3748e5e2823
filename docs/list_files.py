"""Write the list of files in CONTRIBUTING.md from the first lines of their docstrings.

python docs/list_files.py
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
ROOMS = [
    *("modeling", "members", "data", "features", "probes", "studies", "reporting"),
    *("inference", "training", "experiments", "commands"),
]


def file_list() -> str:
    """The files of the package, room by room, each with the first line of its docstring."""
    lines = ["```text", "concat_ensemble/"]
    lines += [f"  {path.name:<40}{first_line(path)}" for path in sorted((ROOT / "concat_ensemble").glob("*.py"))]
    for room in ROOMS:
        folder = ROOT / "modeling" if room == "modeling" else ROOT / "concat_ensemble" / room
        lines.append(f"  {room + '/':<40}{first_line(folder / '__init__.py')}")
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines += [f"    {path.name:<38}{first_line(path)}" for path in files]
    return "\n".join([*lines, "```"])


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    return re.split(r"(?<=[.?])\s", " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split()))[0]


def contributing_page() -> str:
    """CONTRIBUTING.md with the list of files renewed."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{file_list()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    page = contributing_page()
    if "--check" in sys.argv:
        sys.exit("run python docs/list_files.py: CONTRIBUTING.md would change" if page != PAGE.read_text() else 0)
    PAGE.write_text(page)
