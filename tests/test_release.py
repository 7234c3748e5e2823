"""What a release needs: one version everywhere, a whole source distribution, and a workflow without a token."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import concat_ensemble

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def test_every_file_states_the_version_of_pyproject():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changes, re.MULTILINE)
    assert newest and newest[1] == PROJECT["version"]


def test_the_package_reads_its_version_from_its_metadata():
    assert concat_ensemble.__version__ == version("concat-ensemble") == PROJECT["version"]
    sources = [path.read_text() for path in ROOT.glob("concat_ensemble/**/*.py")]
    assert not [text for text in sources if f'"{PROJECT["version"]}"' in text]


def test_classifiers_and_workflows_name_the_same_pythons():
    ending = "Programming Language :: Python :: "
    named = [line.removeprefix(ending) for line in PROJECT["classifiers"] if line.startswith(ending)]
    assert PROJECT["requires-python"] == f">={named[0]}"
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    setup = next(step for step in read_jobs()["build"]["steps"] if "setup-python" in step.get("uses", ""))
    assert sorted(setup["with"]["python-version"].split()) == named
    assert f"DIST_PYTHONS ?= {' '.join(named)}\n" in (ROOT / "Makefile").read_text()


def read_jobs() -> dict:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def test_a_tag_is_published_by_trusted_publishing_after_it_was_checked():
    workflow, jobs = yaml.safe_load(WORKFLOW.read_text()), read_jobs()
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 takes the key `on` for true
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in jobs["build"]
    assert any(step.get("run") == "make dist" for step in jobs["build"]["steps"])
    publish = jobs["publish"]
    assert publish["needs"] == "build" and publish["environment"]["name"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    *_, last = publish["steps"]
    assert last["uses"].startswith("pypa/gh-action-pypi-publish@") and "with" not in last
    assert not re.search(r"secrets\.|password|token:(?! write)", WORKFLOW.read_text(), re.IGNORECASE)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> dict[str, tarfile.TarInfo]:
    """The files of a source distribution by their names in it, built from a copy, since setuptools leaves its working
    files beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    for name in ("concat_ensemble", "modeling", "training", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    words = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.tar.gz")
    assert built.name == f"concat_ensemble-{PROJECT['version']}.tar.gz"
    with tarfile.open(built) as archive:
        return {member.name.partition("/")[2]: member for member in archive if not member.isdir()}


def test_the_source_distribution_has_all_sources_and_the_licence(sdist):
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml"} <= sdist.keys()
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("concat_ensemble/**/*.py")}
    expected |= {f"concat_ensemble/modeling/{path.name}" for path in ROOT.glob("modeling/*.py")}
    expected |= {f"concat_ensemble/training/recipes/{path.name}" for path in ROOT.glob("training/recipes/*.yaml")}
    assert {name for name in sdist if name.startswith("concat_ensemble/")} >= expected
    assert all(member.isfile() for member in sdist.values()), "links would not work where they are unpacked"


def test_the_source_distribution_has_no_tests_and_nothing_large(sdist):
    assert {name.partition("/")[0] for name in sdist if "/" in name} == {"concat_ensemble", "concat_ensemble.egg-info"}
    assert sum(member.size for member in sdist.values()) < 3_000_000


def test_the_page_on_compatibility_names_the_tested_versions():
    """The lowest ones are those of pyproject.toml, the others those of constraints.txt."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    lowest = dict(line.split(">=") for line in PROJECT["dependencies"])
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name in ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "huggingface_hub"):
        assert f"| {name} | {lowest[name]} | {pinned[name]} |" in page, name
