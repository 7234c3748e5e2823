"""`tests/benchmarks/gpu.py`, which `make gpu` runs, with the CPU in place of a GPU and at small sizes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import own_accelerator  # noqa: F401

PARTS = ("training", "extraction", "probes", "forward")
SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("part", ["training", *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS[1:])])
def test_every_part_measures(part, gpu, tmp_path):
    gpu.run_part(part, small=True, repeats=1, path=tmp_path / "rows.jsonl")
    rows = [gpu.Row(**json.loads(line)) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows and {row.part for row in rows} == {part} and any(row.peer for row in rows)
    assert all(row.ours > 0 for row in rows), "a way that fails has NaN"


@pytest.mark.slow
def test_the_table_is_written_after_each_part(tmp_path):
    words = [sys.executable, SCRIPT, "--small", "--repeats", "1", "--output", tmp_path]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["failed"] and {row["part"] for row in report["rows"]} == {
        "training",
        "extraction",
        "probes",
        "forward",
    }
    assert len((tmp_path / "gpu.md").read_text().splitlines()) >= len(report["rows"]) + 4
