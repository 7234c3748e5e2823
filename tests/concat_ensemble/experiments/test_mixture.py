"""Components are as described, and the experiment runs end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from concat_ensemble import load_data
from concat_ensemble.experiments.desk import Setup
from concat_ensemble.experiments.mixture import (
    KINDS,
    Mixture,
    disputed_labels,
    format_recovered,
    format_table,
    pairs_of_classes,
)
from concat_ensemble.experiments.names import COMPONENTS

SYSTEMS = ("direct", "cat1", "cat2", "cat4", "cat8", "cat8 by PCA", "untrained members", "raw pixels")


@pytest.fixture(scope="module")
def four():
    return load_data("digits", classes=range(4), seed=0)


def images_by_label(split) -> dict[int, list[bytes]]:
    labels = split.with_format("numpy")["label"][:]
    images = [row["bytes"] for row in split["image"]]
    return {int(label): [images[n] for n in np.flatnonzero(labels == label)] for label in set(labels)}


def test_each_component_disputes_the_label_of_the_class_before_its_own(four):
    parts = list(disputed_labels(four).values())
    assert len(parts) == 4
    for name in ("train", "validation", "test"):
        of_class = images_by_label(four[name])
        mixed = {0: [], 1: []}
        for k, part in enumerate(parts):
            images = images_by_label(part[name])
            after, before, own = (k + 1) % 4, (k - 1) % 4, 1 - k % 2
            assert sorted(images[own]) == sorted(of_class[k] * 2 + of_class[before]), (
                "the class before has the label of the component's own class"
            )
            assert sorted(images[1 - own]) == sorted(of_class[after])
            mixed = {label: mixed[label] + images[label] for label in mixed}
        for k in range(4):  # in the mixture three of four agree on each image
            for image in of_class[k]:
                assert (mixed[1 - k % 2].count(image), mixed[k % 2].count(image)) == (3, 1)


def test_pairs_of_classes_are_the_dataset_in_pieces():
    data = load_data("digits", seed=0)
    parts = pairs_of_classes(data)
    assert list(parts) == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    assert sum(len(part["test"]) for part in parts.values()) == len(data["test"])
    assert set(images_by_label(parts["4, 5"]["test"])) == {4, 5}
    assert set(KINDS) == set(COMPONENTS)


def test_the_recovered_share_of_the_gap_is_that_of_means_if_there_is_a_gap():
    def repeat(direct, single, eight):
        top1 = dict.fromkeys(SYSTEMS, 0.5) | {"direct": direct, "cat1": single, "cat8": eight}
        return {"a": top1, "b": {system: value + 0.02 for system, value in top1.items()}}

    measured = [repeat(0.9, 0.7, 0.8), repeat(0.92, 0.7, 0.82), repeat(0.94, 0.72, 0.84)]
    assert format_recovered(measured, "cat8") == "53%"  # (0.1 + 0.12 + 0.12) / (0.2 + 0.22 + 0.22)
    row = "| cat8 | 82.0 [77.0, 87.0] | 84.0 [79.0, 89.0] | 83.0 [78.0, 88.0] | +11.3 [+8.5, +14.2] | 53% |"
    assert row in format_table(measured)
    assert format_recovered([repeat(0.7, 0.9, 0.8), repeat(0.92, 0.7, 0.82)], "cat8") == "no gap"


def test_a_file_of_other_settings_is_refused(tmp_path):
    mixture = Mixture(Setup("scattered_digits", "digits", tmp_path), "labels", 400)
    content = {"asked": ["scattered_digits", "labels", "digits", 300, 3], "top1": {}}
    (tmp_path / "seed-3.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"300.*400.*name another --output"):
        mixture.measure_repeat(3)


@pytest.mark.slow
def test_it_runs_end_to_end_and_once(script, tmp_path):
    command = [Path(sys.executable).with_name("concat-ensemble"), "mixture", "scattered_digits", "--smoke"]
    options = ["--repeats", "2", "--components", "classes", "--output", tmp_path]
    printed = script(*command, *options)
    folder = tmp_path / "smoke"
    assert (folder / "table.md").read_text() in printed and (folder / "mixture.png").stat().st_size > 10_000
    top1 = json.loads((folder / "seed-1.json").read_text())["top1"]
    assert list(top1) == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"] and set(top1["0, 1"]) == set(SYSTEMS)
    assert not list((folder / "members").iterdir())
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    script(*command, *options)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
