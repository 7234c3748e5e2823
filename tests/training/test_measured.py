"""The tables in training/README.md are those of the results stored beside it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from concat_ensemble.experiments.budget_curve import format_curve, select_top1
from concat_ensemble.experiments.desk import format_difference

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


@pytest.mark.parametrize(
    ("study", "first", "expected"),
    [
        (
            "scattered_digits",
            1_200,
            {"cat1": "-3.4 [-10.0, +3.2]", "cat8": "+5.1 [-5.5, +15.6]", "gap": "+8.5 [+3.7, +13.3]"},
        ),
        ("scattered_mnist", 1_600, {"cat1": "+3.5 [-0.9, +7.8]", "gap": "+2.3 [-1.3, +5.8]"}),
    ],
)
def test_what_is_said_of_saturation_is_in_the_stored_points(study, first, expected):
    def unseen(system, steps):
        paths = sorted((MEASURED / f"{study}_budget").glob(f"seed-*-steps-{steps}.json"))
        return np.array([json.loads(path.read_text())["top1"]["unseen"][system] for path in paths])

    gains = {system: unseen(system, 6_000) - unseen(system, first) for system in ("cat1", "cat8")}
    gains["gap"] = gains["cat8"] - gains["cat1"]
    assert {name: format_difference(gains[name]) for name in expected} == expected
    assert all(text in " ".join(README.split()) for text in expected.values())
