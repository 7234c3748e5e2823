import numpy as np
import pytest
from PIL import Image

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.reporting.figures import equal_steps, plot_accuracy_against_members
from concat_ensemble.studies.results import Row, Run


def draw(results, path):
    plot_accuracy_against_members(results, path)
    return Image.open(path)


def test_writes_a_png_of_1050_by_630_with_something_on_it(study, tmp_path):
    results = study(
        **{"pair": [0.8, 0.82], "one": [0.7, 0.75], "untrained members": [0.5, 0.52], "raw pixels": [0.4, 0.41]}
    )
    image = draw(results, tmp_path / "figures" / "x.png")
    assert (image.format, image.size) == ("PNG", (1050, 630))
    blue = (np.abs(np.asarray(image.convert("RGB")).astype(int) - (0x1F, 0x5F, 0xA8)).max(-1) < 20).sum()
    assert blue > 100, "the line of the ensembles at equal steps"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("images", [1, 2, 10, 50, 100, 1000])
def test_draws_any_accuracy_of_one_repeat(share, images, study, tmp_path):
    """At 0 and 1 the interval ends at the share itself, up to rounding; matplotlib refuses negative lengths."""
    results = study(pair=[share], one=[share])
    for row in results.rows:
        row.runs[0].n_test = images
    projected = Row("pair, PCA to 16", "projected", 16, 2, 20, runs=[Run(0, {"top1": share}, 0.1, 50, images)])
    results.rows.append(projected)
    assert draw(results, tmp_path / "x.png").size == (1050, 630)


def test_draws_an_ensemble_of_one_member_alone(study, tmp_path):
    assert draw(study(pair=[0.5]), tmp_path / "x.png").size == (1050, 630)


def test_the_line_joins_those_trained_for_about_as_long(study):
    """Of 20 steps, 22 counts as equal, since CAT1 has an eighth more; 40 does not, and becomes a level of its own."""
    results = study(pair=[0.8], one=[0.7], long=[0.9], **{"raw pixels": [0.3]})
    results["one"].steps, results["long"].steps, results["raw pixels"].steps = 22, 40, 0
    line, levels = equal_steps(results)
    assert [row.name for row in line] == ["one", "pair"] and [row.name for row in levels] == ["long"]


def test_of_two_with_as_many_members_the_first_is_on_the_line(study):
    line, levels = equal_steps(study(pair=[0.8], one=[0.7], other=[0.6]))
    assert [row.name for row in line] == ["one", "pair"] and [row.name for row in levels] == ["other"]


def test_without_known_steps_nothing_is_joined(study):
    results = study(pair=[0.8], one=[0.7])
    for row in results.rows:
        row.steps = None
    assert [[row.name for row in part] for part in equal_steps(results)] == [[], ["one"]]


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ({"name": "digits"}, "digits"),
        ({"name": "digits", "classes": [5, 6], "test_images": 1234}, "digits, classes 5, 6, 1,234 test images"),
        ({"name": "org/x", "config": "plain", "test_images": 2}, "org/x (plain), 2 test images"),
    ],
)
def test_a_dataset_in_words(dataset, text):
    assert describe_dataset(dataset) == text
