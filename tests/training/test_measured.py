"""The numbers in training/README.md are those of the results in training/measured."""

import json
from pathlib import Path

import pytest

from concat_ensemble.experiments.budget_curve import Point, table_of

MEASURED = Path(__file__).parents[2] / "training" / "measured"
README = (MEASURED.parent / "README.md").read_text()


@pytest.mark.parametrize("study", ["scattered_digits", "scattered_mnist"])
def test_the_curve_shows_its_points(study):
    folder = MEASURED / f"{study}_budget"
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    points = [Point(*content["point"], folder, smoke=False) for content in contents]
    assert len({point.seed for point in points}) >= 3 and {point.study for point in points} == {study}
    budgets = {point.budget for point in points}
    assert len(budgets) >= 5 and max(budgets) >= 30 * min(budgets)
    assert table_of(points, [content["top1"] for content in contents]) in README


@pytest.mark.parametrize(
    "study", ["scattered_digits", "scattered_mnist", "scattered_digits_ntk", "scattered_mnist_ntk"]
)
def test_the_table_is_in_the_readme(study):
    assert (MEASURED / f"{study}.md").read_text() in README
