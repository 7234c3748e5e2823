"""Components are what their description says, and the study runs end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from concat_ensemble import load_data
from concat_ensemble.experiments.mixture import KINDS, Study, disputed_labels, pairs_of_classes, recovered, table_of

SYSTEMS = ("direct", "cat1", "cat2", "cat4", "cat8", "cat8 by PCA", "untrained members", "raw pixels")


@pytest.fixture(scope="module")
def four():
    return load_data("digits", classes=range(4), seed=0)


def images_of(split) -> dict[int, list[bytes]]:
    labels = split.with_format("numpy")["label"][:]
    return {int(label): [split[int(n)]["image"]["bytes"] for n in np.flatnonzero(labels == label)] for label in set(labels)}  # fmt: skip


def test_each_component_disputes_the_label_of_the_class_before_its_own(four):
    parts = list(disputed_labels(four).values())
    assert len(parts) == 4
    for name in ("train", "validation", "test"):
        of_class = images_of(four[name])
        mixed = {0: [], 1: []}
        for k, part in enumerate(parts):
            got = images_of(part[name])
            after, before, own = (k + 1) % 4, (k - 1) % 4, 1 - k % 2
            assert sorted(got[own]) == sorted(of_class[k] * 2 + of_class[before]), "the class before has the own label"
            assert sorted(got[1 - own]) == sorted(of_class[after])
            mixed = {label: mixed[label] + got[label] for label in mixed}
        for k in range(4):  # in the mixture three of four agree on each image
            for image in of_class[k]:
                assert (mixed[1 - k % 2].count(image), mixed[k % 2].count(image)) == (3, 1)


def test_pairs_of_classes_are_the_dataset_cut_in_pieces():
    data = load_data("digits", seed=0)
    parts = pairs_of_classes(data)
    assert list(parts) == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    assert sum(len(part["test"]) for part in parts.values()) == len(data["test"])
    assert set(images_of(parts["4, 5"]["test"])) == {4, 5}
    assert set(KINDS) == {"labels", "classes"}


def test_the_share_of_the_gap_is_that_of_means_and_where_there_is_no_gap_it_says_so():
    def repeat(direct, single, eight):
        top1 = dict.fromkeys(SYSTEMS, 0.5) | {"direct": direct, "cat1": single, "cat8": eight}
        return {"a": top1, "b": {system: value + 0.02 for system, value in top1.items()}}

    measured = [repeat(0.9, 0.7, 0.8), repeat(0.92, 0.7, 0.82), repeat(0.94, 0.72, 0.84)]
    assert recovered(measured, "cat8") == "53%"  # (0.1 + 0.12 + 0.12) / (0.2 + 0.22 + 0.22)
    assert "| cat8 | 82.0 [77.0, 87.0] | 84.0 [79.0, 89.0] | 83.0 [78.0, 88.0] | +11.3 [+8.5, +14.2] | 53% |" in table_of(measured)  # fmt: skip
    assert recovered([repeat(0.7, 0.9, 0.8), repeat(0.92, 0.7, 0.82)], "cat8") == "no gap"


def test_what_was_measured_otherwise_is_not_taken(tmp_path):
    study = Study("scattered_digits", "labels", "digits", 400, tmp_path, smoke=False)
    (tmp_path / "seed-3.json").write_text(json.dumps({"asked": ["scattered_digits", "labels", "digits", 300, 3], "top1": {}}))  # fmt: skip
    with pytest.raises(ValueError, match=r"300.*400.*name another --output"):
        study.measured(3)


@pytest.mark.slow
def test_it_runs_end_to_end_and_once(script, tmp_path):
    program = str(Path(sys.executable).with_name("concat-ensemble"))
    words = [program, "mixture", "scattered_digits", "--smoke", "--repeats", "2"]
    printed = script(*words, "--components", "classes", "--output", tmp_path)
    folder = tmp_path / "smoke"
    assert (folder / "table.md").read_text() in printed and (folder / "mixture.png").stat().st_size > 10_000
    top1 = json.loads((folder / "seed-1.json").read_text())["top1"]
    assert list(top1) == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"] and set(top1["0, 1"]) == set(SYSTEMS)
    assert not list((folder / "members").iterdir())
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    script(*words, "--components", "classes", "--output", tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
