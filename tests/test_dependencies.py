"""pyproject.toml declares every package that the code imports, each with the lowest version that was tried."""

import ast
import os
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {"concat_ensemble", "modeling", "tests", "training"}
DISTRIBUTIONS = packages_distributions()  # PIL: pillow, sklearn: scikit-learn, ...


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [Requirement(line) for line in lines]


def names(lines: list[Requirement]) -> set[str]:
    return {canonicalize_name(line.name) for line in lines}


def imported(node: ast.AST, *, inside_functions: bool) -> set[str]:
    """Top-level names of the modules that are imported in `node`, in functions too or only when it is imported."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and not child.level:
            found.add(child.module.split(".")[0])
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imported(child, inside_functions=inside_functions)
    return found - OWN - sys.stdlib_module_names


def undeclared(path: Path, *extras: str, inside_functions: bool = True) -> dict[str, list[str]]:
    """Imported modules and the distributions that bring them, where pyproject.toml with `extras` declares none."""
    declared = names(requirements(*(extra for extra in extras if extra in EXTRAS)))
    modules = imported(ast.parse(path.read_text()), inside_functions=inside_functions)
    modules -= {beside.stem for beside in path.parent.glob("*.py")}
    brought = {module: {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [])} for module in modules}
    return {module: sorted(by) for module, by in brought.items() if not declared & by}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("concat_ensemble", set(EXTRAS) - {"test"}),
        ("modeling", {"finetune", "multichannel"}),
        ("training", {"train"}),
        ("examples", set()),
        ("docs", {"docs"}),
        ("tests", EXTRAS),
    ],
)
def test_every_imported_package_is_declared(folder, extras):
    for path in sorted((ROOT / folder).rglob("*.py")):
        assert not undeclared(path, *extras), path


def test_everything_but_training_can_be_imported_without_extras():
    for path in [*ROOT.glob("concat_ensemble/**/*.py"), *ROOT.glob("modeling/*.py")]:
        extras = ["train"] if "training" in path.relative_to(ROOT).parts else []
        assert not undeclared(path, *extras, inside_functions=False), path


def test_every_dependency_is_imported():
    modules = set()
    for path in [*ROOT.glob("concat_ensemble/**/*.py"), *ROOT.glob("modeling/*.py")]:
        modules |= imported(ast.parse(path.read_text()), inside_functions=True)
    used = {canonicalize_name(name) for module in modules for name in DISTRIBUTIONS.get(module, [])}
    assert not names(requirements()) - used


def floor(line: Requirement) -> Version:
    (lowest,) = (Version(one.version) for one in line.specifier if one.operator in (">=", "=="))
    return lowest


def test_every_dependency_has_a_lowest_version_which_the_pinned_ones_meet():
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(name): Version(number) for name, number in (line.split("==") for line in lines)}
    for line in requirements(*EXTRAS):
        assert floor(line) <= pinned[canonicalize_name(line.name)], line


@pytest.mark.skipif("LOWEST_VERSIONS" not in os.environ, reason="`make lowest` sets it, in an environment of its own")
@pytest.mark.parametrize("line", requirements(*EXTRAS), ids=str)
def test_the_lowest_versions_are_what_is_installed(line):
    """Else another package asks for more, and the declared version was never tried."""
    assert Version(version(line.name)) == floor(line)
