"""The tables in training/README.md are those of the results stored beside it."""

import json
from functools import partial
from pathlib import Path

import pytest

from concat_ensemble.experiments.budget_curve import format_curve, select_top1

MEASURED = Path(__file__).parents[2] / "training" / "measured"
README = (MEASURED.parent / "README.md").read_text()


@pytest.mark.parametrize("study", ["scattered_digits", "scattered_mnist"])
def test_the_budget_tables_match_the_stored_points(study):
    curve, seeds = {}, set()
    for path in sorted((MEASURED / f"{study}_budget").glob("*.json")):
        content = json.loads(path.read_text())
        measured_study, _, seed, budget = content["point"]
        assert measured_study == study
        curve.setdefault(budget, []).append(content["top1"])
        seeds.add(seed)
    assert len(seeds) >= 3
    assert len(curve) >= 5 and max(curve) >= 30 * min(curve)
    assert format_curve(sorted(curve), partial(select_top1, curve)) in README


@pytest.mark.parametrize(
    "study", ["scattered_digits", "scattered_mnist", "scattered_digits_ntk", "scattered_mnist_ntk"]
)
def test_the_table_is_the_stored_one(study):
    assert (MEASURED / f"{study}.md").read_text() in README
