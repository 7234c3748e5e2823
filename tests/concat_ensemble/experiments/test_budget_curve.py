"""The budget curve on a few steps, end to end, and again."""

import json
import sys

import pytest
from PIL import Image

COMMAND = [sys.executable, "-m", "concat_ensemble.experiments.budget_curve", "scattered_digits", "--smoke"]
OPTIONS = ["--budgets", "8", "16", "--repeats", "2"]


@pytest.mark.slow
def test_a_curve_is_measured_once_and_plotted(script, tmp_path):
    printed = script(*COMMAND, *OPTIONS, "--output", tmp_path)
    folder = tmp_path / "smoke"
    points = sorted(folder.glob("*.json"))
    assert [path.name for path in points] == [f"seed-{s}-steps-{b}.json" for s in (0, 1) for b in (16, 8)]
    measured = json.loads(points[0].read_text())["top1"]
    assert set(measured) == {"unseen", "few labels", "in distribution"}
    assert set(measured["unseen"]) == {"cat1", "cat2", "cat4", "cat8", "untrained members", "raw pixels"}
    assert (folder / "table.md").read_text() in printed and "| cat8 | " in printed
    assert Image.open(folder / "budget.png").size[0] > 1_000
    assert not list((folder / "members").iterdir()), "the networks are deleted once they are measured"
    before = {path: path.stat().st_mtime_ns for path in points}
    assert script(*COMMAND, *OPTIONS, "--output", tmp_path) in printed, "no training is run again"
    assert {path: path.stat().st_mtime_ns for path in points} == before
