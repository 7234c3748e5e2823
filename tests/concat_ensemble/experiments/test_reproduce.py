"""The paper's figures as commands, and the page made of their files."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concat_ensemble import LinearProbe, assemble, extract_features
from concat_ensemble.experiments.names import FIGURES, MINUTES
from concat_ensemble.experiments.ntk_gap import NUM_FEATURES, format_table, logit_gradients
from concat_ensemble.experiments.reproduce import (
    FAILED,
    HELD,
    OPEN,
    RUNS,
    Workplace,
    describe_figure,
    format_page,
    judge_above_zero,
    judge_below_a_point,
    judge_level,
    reproduce,
)
from concat_ensemble.features.ntk import NTK

ROOT = Path(__file__).parents[3]
MEASURED = ROOT / "docs" / "reproduction"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.1, 0.11, 0.12], HELD), ([-0.1, -0.11, -0.12], FAILED), ([0.1, -0.1, 0.02], OPEN)],
)
def test_a_conclusion_holds_only_where_the_interval_says_so(differences, verdict):
    conclusion = judge_above_zero("more", np.array(differences))
    assert conclusion.verdict == verdict
    assert conclusion.result.startswith(f"{100 * np.mean(differences):+.1f} [")


@pytest.mark.parametrize(
    ("differences", "level", "below"),
    [
        ([0.001, -0.001, 0.002], HELD, HELD),
        ([-0.4, -0.41, -0.42], FAILED, HELD),  # far below is no parity
        ([0.4, 0.41, 0.42], FAILED, FAILED),
        ([0.1, -0.1, 0.02], OPEN, OPEN),
    ],
)
def test_parity_has_two_sides(differences, level, below):
    assert judge_level("level", np.array(differences)).verdict == level
    assert judge_below_a_point("below", np.array(differences)).verdict == below


def test_the_page_of_fresh_seeds_has_the_same_claims():
    fresh = MEASURED.with_name("reproduction-fresh")
    assert fresh.with_suffix(".md").read_text() == format_page(fresh)
    first, second = (json.loads((folder / "figure-6.json").read_text()) for folder in (MEASURED, fresh))
    claims = [[each["claim"] for each in content["conclusions"]] for content in (first, second)]
    assert claims[0] == claims[1] and first["asked"] | {"first_seed": 200} == second["asked"]


def test_the_page_in_docs_is_made_of_the_files_beside_it():
    assert (ROOT / "docs" / "reproduction.md").read_text() == format_page(MEASURED)
    assert {path.stem for path in MEASURED.glob("*.json")} == set(FIGURES) == set(RUNS)
    for figure in FIGURES:
        content = json.loads((MEASURED / f"{figure}.json").read_text())
        assert content["asked"] == {"repeats": 4, "smoke": False} and content["conclusions"]
        assert Image.open(MEASURED / f"{figure}.png").size[0] >= 800


@pytest.mark.parametrize("figure", FIGURES)
def test_the_texts_of_a_figure_have_their_numbers(figure, tmp_path):
    texts = describe_figure(figure, Workplace(tmp_path, 4, smoke=False))
    assert {"title", "setting", "paper"} <= set(texts)
    assert not [text for text in texts.values() if "{" in text or "}" in text]
    if figure == "domains":
        assert "each in full (1,200 steps)" in texts["setting"]


def test_the_time_that_is_stated_covers_what_was_measured():
    measured = sum(json.loads(path.read_text())["minutes"] for path in MEASURED.glob("*.json"))
    assert 0.5 * MINUTES < measured <= MINUTES
    assert f"about {MINUTES} minutes on 2 cores" in (ROOT / "README.md").read_text()


def test_a_figure_is_reproduced_once(script, tmp_path):
    output, page = tmp_path / "figures", tmp_path / "figures.md"
    command = [sys.executable, "-m", "concat_ensemble.experiments.reproduce", "proposition-2.1", "--output", output]
    assert "falls in proportion to it" in " ".join(script(*command).split())
    assert page.read_text() == format_page(output)
    assert re.search(r"!\[.*\]\(figures/proposition-2.1.png\)", page.read_text())
    before = (output / "proposition-2.1.json").stat().st_mtime_ns
    assert reproduce("proposition-2.1", output=output, repeats=4, smoke=False) == page
    assert (output / "proposition-2.1.json").stat().st_mtime_ns == before
    reproduce("proposition-2.1", output=output, repeats=4, first_seed=5)
    assert (output / "proposition-2.1.json").stat().st_mtime_ns > before
    assert "`concat-ensemble reproduce proposition-2.1 --first-seed 5`" in page.read_text()


def test_the_table_of_gradients_is_paired_with_both_networks():
    top1 = {"cat1": np.array([0.7, 0.8]), "cat4": np.array([0.8, 0.91])}
    assert format_table(top1).splitlines()[2].startswith("| cat1 | 75.0 [")
    assert "| +10.5 [+4.1, +16.9] |  |" in format_table(top1).splitlines()[3]


def test_gradients_of_the_logits_have_the_sum_of_the_kernels(backbone, digits):
    """Inner products of the summed rows are near those of the gradients of each class, summed over the classes."""
    model = assemble(backbone(0))
    table = extract_features(model, digits, quiet=True)
    estimated = logit_gradients(model, digits, table, seed=0)["test"].features
    probe = LinearProbe(seed=0).fit(table["train"], validation=table["validation"])
    kernel = 0.0
    for head in probe.coef_ / probe.scale_:
        rows = extract_features(model, digits, ntk=NTK(100_000, head=head), quiet=True)["test"].features
        kernel = kernel + rows @ rows.T
    error = np.linalg.norm(estimated @ estimated.T - kernel) / np.linalg.norm(kernel)
    assert error < 3 * np.sqrt(2 / NUM_FEATURES)


def test_every_published_row_names_a_command_that_there_is():
    rows = [line for line in (ROOT / "docs" / "evidence.md").read_text().splitlines() if line.startswith("| ")]
    nearest = [row.rstrip(" |").rpartition("|")[2] for row in rows if not row.endswith("| here |")]
    assert len(nearest) > 35
    known = {"demo", "full", "budget", "finetune", "distill", "theory", "mixture", "compare", "probe", "select"}
    known |= {f"reproduce {figure}" for figure in FIGURES}
    named = [re.findall("`(.+?)`", cell) for cell in nearest]
    assert {command for commands in named for command in commands} <= known
    assert [cell.strip() for cell, commands in zip(nearest, named, strict=True) if not commands] == ["none"]


@pytest.mark.slow
def test_all_figures_with_a_few_steps(script, tmp_path):
    program = str(Path(sys.executable).with_name("concat-ensemble"))
    script(program, "reproduce", "all", "--smoke", "--repeats", "2", "--output", tmp_path)
    assert {path.stem for path in (tmp_path / "smoke").glob("*.png")} == set(FIGURES)
    text = (tmp_path / "smoke.md").read_text()
    assert "numbers mean nothing" in text and text.count("\n## ") == len(FIGURES)
