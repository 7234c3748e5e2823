"""Write docs/api.md and the list of files in CONTRIBUTING.md from docstrings.

python docs/make_api.py
"""

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

import concat_ensemble
from concat_ensemble.features.ntk import NTK

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by `python docs/make_api.py`. -->"
FIRST = ["assemble", "load_data", "extract_features"]  # in the order in which a reader meets them
ROOMS = [
    *("modeling", "members", "data", "features", "probes", "studies", "reporting"),
    *("inference", "training", "experiments", "commands"),
]


def api_page() -> str:
    """docs/api.md."""
    names = [*FIRST, *(name for name in concat_ensemble.__all__ if name not in FIRST)]
    public = {name: getattr(concat_ensemble, name) for name in names} | {"features.ntk.NTK": NTK}
    sections, documented = (
        [f"{NOTE}\n\n# API\n\nImport these from `concat_ensemble`, and `NTK` from `concat_ensemble.features.ntk`."],
        set(),
    )
    for name, item in public.items():
        sections.append(f"## `{name}`\n\n{document(name, item)}")
        for method, function in public_methods(item).items():
            if function not in documented:  # two classes can share a method
                sections.append(f"### `{name}.{method}`\n\n{document(method, function)}")
                documented.add(function)
    return "\n\n".join(sections) + "\n"


def public_methods(item) -> dict:
    """The public methods with a docstring that a class of ours defines or inherits from a class of ours."""
    if not inspect.isclass(item):
        return {}
    bases = [base for base in inspect.getmro(item) if base.__module__.startswith("concat_ensemble")]
    methods = {
        name: value for base in reversed(bases) for name, value in vars(base).items() if not name.startswith("_")
    }
    return {name: value for name, value in methods.items() if inspect.isfunction(value) and value.__doc__}


def document(name: str, item) -> str:
    """Signature and docstring as a block of text."""
    signature = inspect.signature(item)
    if dataclasses.is_dataclass(item):  # leave out the fields that a config inherits from transformers
        own = [value for key, value in signature.parameters.items() if key in vars(item)["__annotations__"]]
        signature = signature.replace(parameters=own)
    # Annotations that are strings, and names of modules, differ between versions.
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature))
    text = re.sub(r"\b(?:[A-Za-z_]+\.)+([A-Za-z])", r"\1", text)
    return f"```text\n{name}{text}\n\n{inspect.getdoc(item) or ''}\n```"


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
    text = (ROOT / "CONTRIBUTING.md").read_text()
    before, rest = text.split("<!-- files: begin -->")
    return f"{before}<!-- files: begin -->\n{file_list()}\n<!-- files: end -->{rest.split('<!-- files: end -->')[1]}"


if __name__ == "__main__":
    pages = {"docs/api.md": api_page(), "CONTRIBUTING.md": contributing_page()}
    outdated = [name for name, text in pages.items() if (ROOT / name).read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"run python docs/make_api.py: {', '.join(outdated)} would change" if outdated else 0)
    for name in outdated:
        (ROOT / name).write_text(pages[name])
