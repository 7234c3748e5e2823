"""`make demo SMOKE=1`, end to end: the real scripts on a few steps."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from concat_ensemble.results import Results

ROWS = [
    "cat4",
    "cat1",
    "cat2",
    "w2",
    "cat4, PCA to 64",
    "cat4, random projection to 64",
    "untrained members",
    "raw pixels",
]


@pytest.fixture(scope="module")
def demo(script, tmp_path_factory):
    """Where it wrote, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    return output / "smoke", script(sys.executable, "training/demo.py", "--smoke", "--output", output)


def test_the_table_has_every_system_and_control_once(demo):
    _, printed = demo
    rows = re.findall(r"^│ (.+?) +│ +([\d,]+) │ +([\d,]+) │ +([\d.]+) \[", printed, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(ROWS)
    shown = {name: (columns, steps) for name, columns, steps, _ in rows}
    assert shown["cat4"] == ("256", "16") and shown["cat1"] == ("64", "18") and shown["cat2"] == ("128", "16")
    assert shown["w2"] == ("128", "4") and shown["cat4, PCA to 64"] == ("64", "16")
    assert shown["untrained members"] == ("256", "0") and shown["raw pixels"] == ("1,024", "0")
    accuracies = [float(accuracy) for *_, accuracy in rows]
    assert accuracies == sorted(accuracies)
    assert "SMOKE" in printed, "nobody should take these numbers for results"


def test_the_table_is_that_of_the_results_on_disk(demo):
    folder, printed = demo
    results = Results.load(folder / "cat4" / "results" / "unseen.json")
    assert results.repeats == 2 and [run.seed for run in results["cat4"].runs] == [0, 1]
    assert results.dataset["classes"] == [5, 6, 7, 8, 9] and results.dataset["name"] == "scattered:digits"
    for name in ROWS:
        assert re.search(rf"│ {re.escape(name)} +│.* {100 * results[name].mean:.1f} \[", printed)
    repeats = [Results.load(folder / f"seed-{seed}" / "unseen.json") for seed in (0, 1)]
    assert Results.merged(repeats).rows == results.rows
    assert (
        "repeat by repeat: " + ", ".join(f"{100 * (r['cat4'].mean - r['cat1'].mean):+.1f}" for r in repeats) in printed
    )


def test_the_folder_it_names_is_whole_and_its_three_lines_load_it(demo):
    folder, printed = demo
    assert {path.name for path in folder.iterdir()} == {"cat4", "seed-0", "seed-1"}
    named = Path(re.search(r"complete Hub folder, with card and figures: (\S+)", printed)[1])
    assert named == folder / "cat4"
    namespace = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[-3:]), namespace)
    pixels = namespace["processor"](Image.new("L", (32, 32)))
    assert namespace["model"](**pixels).pooler_output.shape == (1, 256)
    card = (named / "README.md").read_text()
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    assert figures == ["figures/in-distribution.png", "figures/unseen.png"]
    assert all(Image.open(named / figure).size == (1050, 630) for figure in figures)
    assert "# cat4\n" in card and "mean over 2 repeats" in card and "concat-ensemble probe" in card


def test_it_has_the_head_for_the_unseen_digits(demo):
    folder, _ = demo
    model = AutoModelForImageClassification.from_pretrained(folder / "cat4")
    assert list(model.config.id2label.values()) == ["5", "6", "7", "8", "9"]
    inputs = AutoImageProcessor.from_pretrained(folder / "cat4")(Image.new("L", (32, 32)))
    assert model(**inputs).logits.shape == (1, 5)
    assert AutoModel.from_pretrained(folder / "cat4", active_members=[3]).config.num_features == 64


def test_every_repeat_has_networks_and_images_of_its_own(demo):
    folder, _ = demo
    studies = [Results.load(folder / f"seed-{seed}" / "unseen.json") for seed in (0, 1)]
    hashes = [set(study.members_sha256) for study in studies]
    assert len(hashes[0]) == len(hashes[1]) == 4 and not hashes[0] & hashes[1]
    assert studies[0]["raw pixels"].mean != studies[1]["raw pixels"].mean
