"""`make demo SMOKE=1` and the table of every system, end to end, with trainings of a few steps."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from concat_ensemble.studies.results import Results

STEPS = {
    "cat4": ("256", "16"),
    "cat1": ("64", "18"),
    "cat2": ("128", "16"),
    "w2": ("128", "4"),
    "cat4, PCA to 64": ("64", "16"),
    "cat4, random projection to 64": ("64", "16"),
    "untrained members": ("256", "0"),
    "raw pixels": ("1,024", "0"),
    "majority class": ("0", "0"),
}
MORE = {
    "cat5": ("320", "15"),
    "cat4-s": ("256", "16"),
    "cat4-together": ("256", "16"),
    "distilled": ("64", "16"),
    "two-stage": ("256", "80"),
    "cat4, fine-tuned at once": ("256", "80"),
    "cat1, fine-tuned": ("64", "34"),
}


ERROR_FIGURES = (".recall", ".confusion")
COMMAND = [sys.executable, "-m", "concat_ensemble.experiments.compare", "scattered_digits", "--smoke"]


@pytest.fixture(scope="module")
def demo(script, tmp_path_factory):
    """The output folder, and the printed text."""
    output = tmp_path_factory.mktemp("demo")
    return output / "smoke", script(*COMMAND, "--output", output)


def read_rows(folder: Path) -> dict[str, list[str]]:
    lines = (folder / "table.md").read_text().splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_table_has_every_system_and_control_once(demo):
    folder, printed = demo
    rows = read_rows(folder)
    assert {name: (columns, steps) for name, (columns, steps, *_) in rows.items()} == STEPS
    accuracies = [float(cells[2].split(" ")[0]) for cells in rows.values()]
    assert accuracies == sorted(accuracies)
    assert "SMOKE" in printed, "nobody should take these numbers for results"
    for cells in rows.values():
        assert cells[2] in printed and cells[3] in printed


def test_the_table_matches_the_results_files(demo):
    folder, printed = demo
    results = Results.load(folder / "cat4" / "results" / "unseen.json")
    assert results.repeats == 2 and [run.seed for run in results["cat4"].runs] == [0, 1]
    assert results.dataset["classes"] == [5, 6, 7, 8, 9] and results.dataset["name"] == "scattered:digits"
    for name, cells in read_rows(folder).items():
        assert cells[2].startswith(f"{100 * results[name].mean:.1f} [")
    repeats = [Results.load(folder / f"seed-{seed}" / "unseen.json") for seed in (0, 1)]
    assert Results.merged(repeats).rows == results.rows
    gains = ", ".join(f"{100 * (r['cat4'].mean - r['cat1'].mean):+.1f}" for r in repeats)
    assert f"repeat by repeat: {gains}" in printed


def test_the_printed_folder_is_complete_and_the_printed_lines_load_it(demo):
    folder, printed = demo
    assert {path.name for path in folder.iterdir()} == {"cat4", "seed-0", "seed-1", "table.md"}
    named = Path(re.search(r"complete Hub folder, with card and figures: (\S+)", printed)[1])
    assert named == folder / "cat4"
    namespace = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[-3:]), namespace)
    pixels = namespace["processor"](Image.new("L", (32, 32)))
    assert namespace["model"](**pixels).pooler_output.shape == (1, 256)
    card = (named / "README.md").read_text()
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    expected = [f"figures/{stem}{part}.png" for stem in ("in-distribution", "unseen") for part in ERROR_FIGURES]
    assert sorted(figures) == sorted(["figures/in-distribution.png", "figures/unseen.png", *expected])
    assert all(Image.open(named / figure).size == (1050, 630) for figure in figures if figure not in expected)
    assert "# cat4\n" in card and "mean over 2 repeats" in card and "concat-ensemble probe" in card
    assert re.search(
        r"Training cat4 took [\d,]+ GFLOP; cat1 took [\d,]+ GFLOP, 1\.12 times as much; "
        r"cat2 took [\d,]+ GFLOP, equal compute",
        card,
    )


def test_the_folder_has_a_head_for_the_unseen_digits(demo):
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


@pytest.mark.slow
def test_the_full_table_has_every_system_of_the_paper(script, tmp_path):
    command = [*COMMAND, "--full", "--output", tmp_path]
    script(*command)
    rows = read_rows(tmp_path / "smoke")
    assert {name: (columns, steps) for name, (columns, steps, *_) in rows.items()} == STEPS | MORE
    tuned = ("two-stage", "cat4, fine-tuned at once", "cat1, fine-tuned")
    assert all(bool(cells[4]) == (name not in tuned) for name, cells in rows.items()), (
        "fine-tuned on all labels, so not in the task with few"
    )
    before = (tmp_path / "smoke" / "table.md").read_text()
    script(*command)
    assert (tmp_path / "smoke" / "table.md").read_text() == before
