"""The paper's figures as commands, and the page made of what they left."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concat_ensemble.experiments.ntk_gap import Gap, table_of
from concat_ensemble.experiments.reproduce import FAILED, FIGURES, HELD, OPEN, Conclusion, Desk, page, reproduced

ROOT = Path(__file__).parents[3]
MEASURED = ROOT / "docs" / "reproduction"


@pytest.mark.parametrize("differences, verdict", [([0.1, 0.11, 0.12], HELD), ([-0.1, -0.11, -0.12], FAILED), ([0.1, -0.1, 0.02], OPEN)])  # fmt: skip
def test_a_conclusion_holds_only_where_the_interval_says_so(differences, verdict):
    found = Conclusion.paired("more", np.array(differences))
    assert found.verdict == verdict
    assert found.found.startswith(f"{100 * np.mean(differences):+.1f} [")


def test_the_page_in_docs_is_made_of_the_outputs_beside_it():
    assert (ROOT / "docs" / "reproduction.md").read_text() == page(MEASURED)
    assert {path.stem for path in MEASURED.glob("*.json")} == set(FIGURES)
    for figure in FIGURES:
        content = json.loads((MEASURED / f"{figure}.json").read_text())
        assert content["asked"] == {"repeats": 4, "smoke": False} and content["conclusions"]
        assert Image.open(MEASURED / f"{figure}.png").size[0] >= 800


def test_a_proposition_in_seconds(script, tmp_path):
    printed = script(sys.executable, "training/reproduce.py", "proposition-2.1", "--output", tmp_path / "found")
    assert "0 cancellations in 1,000,000 draws" in " ".join(printed.split())
    assert (tmp_path / "found.md").read_text() == page(tmp_path / "found")
    assert re.search(r"!\[.*\]\(found/proposition-2.1.png\)", (tmp_path / "found.md").read_text())
    before = (tmp_path / "found" / "proposition-2.1.json").stat().st_mtime_ns
    reproduced("proposition-2.1", Desk(tmp_path, 4, smoke=False), tmp_path / "found")
    assert (tmp_path / "found" / "proposition-2.1.json").stat().st_mtime_ns == before


def test_gradients_are_probed_where_there_are_networks(tmp_path):
    with pytest.raises(RuntimeError, match=r"no networks of seed 0; train them with training/compare.py"):
        Gap("scattered_digits", "digits", tmp_path, tmp_path).run(2)
    top1 = {"cat1": np.array([0.7, 0.8]), "cat4": np.array([0.8, 0.9])}
    assert table_of(top1).splitlines()[2].startswith("| cat1 | 75.0 [")
    assert "| +10.0 [+10.0, +10.0] |  |" in table_of(top1).splitlines()[3]


@pytest.mark.slow
def test_all_of_it_on_a_few_steps(script, tmp_path):
    program = str(Path(sys.executable).with_name("concat-ensemble"))
    script(program, "reproduce", "all", "--smoke", "--repeats", "2", "--output", tmp_path)
    assert {path.stem for path in (tmp_path / "smoke").glob("*.png")} == set(FIGURES)
    text = (tmp_path / "smoke.md").read_text()
    assert "numbers mean nothing" in text and text.count("\n## ") == len(FIGURES)
