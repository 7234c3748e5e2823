"""The gains over the best member are those of the results files, and the page has what the command writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from concat_ensemble.experiments import gains
from concat_ensemble.studies.results import Results

ROOT = Path(__file__).parents[3]
CARDS, CUTS = ROOT / "model_cards", ROOT / "docs" / "difficult_cuts"
REPRODUCTION, PAGE = ROOT / "docs" / "reproduction", ROOT / "docs" / "choosing_members.md"
UNSEEN = CARDS / "digits-cat4" / "results" / "unseen.json"


def test_the_page_has_what_the_command_writes(tmp_path):
    page = Path(shutil.copy(PAGE, tmp_path))
    gains.write_page([CARDS, CUTS], REPRODUCTION, page)
    assert page.read_text() == PAGE.read_text()
    assert (tmp_path / gains.FIGURE).stat().st_size > 10_000


def test_values_are_those_of_the_results_file():
    rows = json.loads(UNSEEN.read_text())["rows"]
    top1 = {row["name"]: np.array([run["metrics"]["top1"] for run in row["runs"]]) for row in rows}
    best = np.max([values for name, values in top1.items() if name.endswith(" alone")], axis=0)
    found = gains.read_results(UNSEEN)
    assert found.members == 4 and found.gain == pytest.approx((top1["cat4"] - best).mean())
    assert found.pretraining == pytest.approx(1 - (1 - best.mean()) / (1 - top1["untrained members"].mean()))
    assert found.control[0] == pytest.approx((top1["cat4"] - top1["untrained members"]).mean())
    assert found.interval[0] < found.gain < found.interval[1]


def test_kappa_is_that_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    members = [row for row in Results.load(UNSEEN).rows if row.kind == "member"][:2]
    pairs = zip(members[0].runs, members[1].runs, strict=True)
    expected = np.mean([cohen_kappa_score(a.correct_images, b.correct_images) for a, b in pairs])
    assert gains.error_consistency(members) == pytest.approx(expected)
    assert gains.error_consistency([members[0], members[0]]) == pytest.approx(1)
    members[0].runs[0].correct = ""
    assert gains.error_consistency(members) is None


def test_a_table_gives_its_best_member_and_files_without_members_are_named(tmp_path):
    text = "|  | steps | unseen | cat4 minus it, paired |\n|---|---|---|---|\n"
    text += "| untrained members | 0 | 50.0 [49.0, 51.0] | +35.0 [+30.0, +40.0] |\n"
    text += "| cat4, member 0 alone | 9 | 90.0 [89.0, 91.0] | -5.0 [-6.0, -4.0] |\n"
    text += "| cat4, member 1 alone | 9 | 80.0 [79.0, 81.0] | +5.0 [+4.0, +6.0] |\n"
    (tmp_path / "one.json").write_text(json.dumps({"table": text}))
    (tmp_path / "two.json").write_text(json.dumps({"table": "| a | b |\n|---|---|\n| 1 | 2 |\n"}))
    (found,), left_out = gains.read_gains([tmp_path / "none"], tmp_path)
    assert (found.gain, found.interval, found.helps) == (-0.05, (-0.06, -0.04), "no, it loses")
    assert found.pretraining == pytest.approx(0.8) and found.control[0] == 0.35
    assert left_out == [f"{tmp_path.name}/two.json"]
    assert "in 1 it loses" in gains.format_table([found], left_out)


def test_nothing_to_read_and_a_page_without_marks_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no results with members"):
        gains.read_gains([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="the page must have the lines"):
        gains.replace_table("# A page", "| a |")


def test_overlap_is_that_of_the_same_images():
    (forty,) = (gain for gain in gains.read_gains([CUTS], REPRODUCTION)[0] if gain.study.endswith("forty"))
    relations = json.loads((CUTS / "efficientnet-lite-0-1" / "overlap" / "forty.json").read_text())["relations"]
    assert forty.overlap == pytest.approx(np.mean([each["r2"] for each in relations if each["r2"] is not None]))


def test_a_gain_that_a_control_has_too_is_no_help():
    plain = gains.read_results(CARDS / "efficientnet-lite-0-1" / "results" / "digits.json")
    assert plain.interval[0] > 0 and plain.control[0] < 0  # raw pixels are better
    assert plain.helps == "a control is as good"
