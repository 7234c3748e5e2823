"""Rooms import from rooms below them only, anywhere in a file, and small things load nothing large."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top; rooms on one line do not know each other.
LAYERS = [
    {"errors"},
    {"console", "files", "processes", "schema"},
    {"recipe_files"},
    {"modeling"},
    {"members", "data"},
    {"features"},
    {"ntk"},  # a deprecated alias
    {"probes"},
    {"studies"},
    {"reporting"},
    {"hub", "inference"},
    {"training"},
    {"experiments"},
    {"commands"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Full names of the project's modules, and of what is imported from them, at any place in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "concat_ensemble"}


def room(name: str) -> str:
    return name.split(".")[1]


SOURCES = [
    path
    for path in sorted(ROOT.glob("concat_ensemble/**/*.py"))
    if path.parts[-2:] != ("concat_ensemble", "__init__.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "concat_ensemble")))
def test_no_import_goes_up(path):
    own = path.relative_to(ROOT / "concat_ensemble").parts[0].removesuffix(".py")
    for name in imports(path):
        assert room(name) in LEVEL, f"{name}: the package itself imports every room, so no room imports from it"
        assert room(name) == own or LEVEL[room(name)] < LEVEL[own], f"{path.name} in {own} imports {name}"


def test_the_payload_imports_nothing_of_the_package():
    assert not set().union(*map(imports, ROOT.glob("modeling/*.py")))


def test_no_module_takes_part_in_a_circle():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    edges = {}
    for name, path in zip(names, SOURCES, strict=True):
        imported = imports(path)  # `a.b.c` may be the module a.b.c, or the name c of the module a.b
        edges[name] = {
            other for other in names if imported & {other} or any(i.startswith(f"{other}.") for i in imported)
        }
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    assert not edges, f"these import each other: {sorted(edges)}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("concat_ensemble.reporting.card_metadata", {"matplotlib", "timm"}),
        ("concat_ensemble.data.naming", {"matplotlib", "torch", "datasets"}),
        ("concat_ensemble.studies.results", {"matplotlib", "timm", "datasets"}),
        ("concat_ensemble.studies.provenance", {"matplotlib", "timm", "torch"}),
        ("concat_ensemble.reporting.tables", {"matplotlib", "timm", "torch"}),
        ("concat_ensemble.reporting.html_report", {"timm", "torch", "datasets"}),
    ],
)
def test_small_things_load_nothing_large(module, unwanted):
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())
