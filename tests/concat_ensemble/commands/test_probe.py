"""What `probe` prints, and its options for metrics, controls and errors."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from concat_ensemble.commands import probe as command
from concat_ensemble.console import PlainConsole
from concat_ensemble.studies.results import Results, Row, Run, pack_bits

WIDTH = 80
KINDS = ("first_members", "member", "projected", "baseline", "control")


def printed(results: Results, monkeypatch, **options) -> list[str]:
    """The lines that a screen of 80 characters shows."""
    screen = PlainConsole(file=io.StringIO(), width=WIDTH)
    monkeypatch.setattr(command, "out", screen)
    command.print_results(results, **options)
    return screen.file.getvalue().splitlines()


def make_results(names: list[str], shares: list[list[float]], metric: str = "top1", **settings) -> Results:
    """Results on 1,000 test images; the first name is the ensemble's."""
    rows = []
    for place, (name, values) in enumerate(zip(names, shares, strict=True)):
        runs = []
        for seed, share in enumerate(values):
            correct = np.random.default_rng(place).permutation(1_000) < round(1_000 * share)
            metrics = {"top1": share, "mean_per_class": share, metric: share}
            intervals = {metric: [max(share - 0.1, 0), min(share + 0.1, 1)]}
            runs.append(Run(seed, metrics, 0.1, 50, 1_000, intervals, correct=pack_bits(correct)))
        kind = "ensemble" if place == 0 else KINDS[place % len(KINDS)]
        rows.append(Row(name, kind, 2_560, 2, 2_000_000, runs=runs))
    dataset = {"name": "some/dataset", "test_images": 1_000, "seed": 0}
    return Results(names[0], dataset, {"kind": "linear", "metric": metric}, rows, **settings)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    names=st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=150),
                   min_size=2, max_size=9, unique=True),
    share=st.floats(0, 1),
    repeats=st.integers(1, 5),
    metric=st.sampled_from(["top1", "mean_per_class", "average_precision"]),
)  # fmt: skip
def test_no_line_is_longer_than_80_and_no_number_is_cut(names, share, repeats, metric, monkeypatch):
    shares = [[max(share - 0.01 * (place + seed), 0.0) for seed in range(repeats)] for place in range(len(names))]
    results = make_results(names, shares, metric)
    lines = printed(results, monkeypatch)
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for row in results.rows:
        low, high = row.interval
        assert f"{100 * row.mean:.1f}" in text and f"{100 * low:.1f} to {100 * high:.1f}" in text
    assert "..." in text or max(map(len, names)) <= command.NAME_LENGTH


def test_the_screen_has_name_metric_recall_interval_and_difference(monkeypatch):
    results = make_results(["pair", "pair, member 0 alone", "untrained members"], [[0.9], [0.8], [0.5]])
    lines = printed(results, monkeypatch)
    start = next(number for number, line in enumerate(lines) if line.startswith("pair"))
    heading = " ".join(" ".join(lines[start - 2 : start]).split())
    assert heading == "mean 95% ensemble top-1 per class interval minus it"
    low, high = (100 * bound for bound in results["pair"].interval)
    assert lines[start].split() == ["pair", "90.0", "90.0", f"{low:.1f}", "to", f"{high:.1f}"]
    assert re.search(
        r"^member 0 alone +80\.0 +80\.0 +77\.4 to 82\.4 +\+10\.0 \[\+\d\.\d, \+1\d\.\d\]$", lines[start + 1]
    )
    assert not any("2,560" in line for line in lines), "the number of features is for --wide"
    assert any("2,560" in line for line in wide_lines(results))


def wide_lines(results: Results) -> list[str]:
    screen = PlainConsole(file=io.StringIO(), width=250)
    screen.print(command.probe_table(results, wide=True))
    return screen.file.getvalue().splitlines()


def test_rows_are_ordered_by_the_metric_below_the_ensemble(monkeypatch):
    results = make_results(["pair", "low", "high", "middle"], [[0.5], [0.1], [0.9], [0.6]])
    lines = printed(results, monkeypatch)
    assert [line.split()[0] for line in lines if re.match("(pair|low|high|middle) +[0-9]", line)] == [
        "pair",
        "high",
        "middle",
        "low",
    ]


def test_the_metric_that_was_chosen_comes_first_and_top1_beside_it(monkeypatch):
    results = make_results(["pair", "one"], [[0.9], [0.8]], "auroc")
    for row in results.rows:
        row.runs[0].metrics["top1"] = 0.97
    lines = printed(results, monkeypatch)
    assert next(line for line in lines if line.startswith("pair")).split()[:3] == ["pair", "90.0", "97.0"]
    assert "In AUROC, pair is 10.0 points above its best member, one" in " ".join(lines)
    assert " ".join(wide_lines(results)[1].split()).startswith("┃ ┃ AUROC ┃ top-1 ┃ 95% interval")


def test_what_the_audit_found_stands_between_the_table_and_the_verdict(monkeypatch):
    classes = {"sick": {"train": 3, "test": 3}, "well": {"train": 97, "test": 97}}
    audit = {"num_images": {"train": 100, "test": 100}, "classes": classes, "duplicates_across": {"train/test": 4}}
    results = make_results(["pair", "one"], [[0.9], [0.8]], audit=audit | {"removed_from_test": 4})
    text = " ".join(" ".join(printed(results, monkeypatch)).split())
    leak = text.index("4 of 104 test images are also in training; they are left out of the score.")
    assert leak < text.index("Class 'well' has 97.0% of the training images") < text.index("top-1 misleads")
    assert text.index("top-1 misleads") < text.index("pair is 10.0 points above its best member, one")


def test_names_with_brackets_are_shown_as_they_are(monkeypatch):
    results = make_results(["pair", "[bold]x[/bold]", "[/]"], [[0.9], [0.8], [0.7]])
    text = "\n".join(printed(results, monkeypatch))
    assert "[bold]x[/bold]" in text and "[/]" in text


@pytest.mark.parametrize(
    ("text", "length", "expected"), [("abc", 3, "abc"), ("abcdefghij", 9, "abc...hij"), ("abcdefghij", 8, "abc...ij")]
)
def test_long_names_are_shortened_in_the_middle(text, length, expected):
    assert command.shorten_middle(text, length) == expected


# --- the command

DIGITS = ["--dataset", "digits", "--classes", "0-2", "--limit", "30"]


@pytest.fixture
def rare(tmp_path):
    """A folder of 8x8 images: 152 dark ones and 8 bright ones for training, as many for testing."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, count, level in (("well", 152, 90), ("sick", 8, 130)):
            (tmp_path / "rare" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(level, 12, (8, 8)) + rng.normal(0, 15), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "rare" / split / name / f"{number}.png")
    return ["--dataset", "imagefolder:rare"]


def test_a_rare_class_is_not_hidden_behind_top1(run, folder, rare):
    """Before, all rows were 95.0 and the ensemble was "level with raw pixels"."""
    code, out, _ = run("probe", "pair", *rare)
    text = " ".join(out.split())
    assert code == 0 and max(map(len, out.splitlines())) <= WIDTH
    assert re.search(r"majority class 50\.0 95\.0", text), "mean per class, and top-1 beside it"
    assert "In mean per-class recall, pair is" in text and "top-1 misleads; read mean-per-class recall" in text
    results = Results.load(next((folder / "results").glob("*.json")))
    assert results.metric == "mean_per_class" and results.rows[0].mean > 0.6
    card = (folder / "README.md").read_text()
    assert "mean per-class recall on imagefolder:rare" in card and "## Data" in card


def test_a_metric_of_the_command_line_is_recorded_and_remembered(run, refused, folder, rare):
    code, out, _ = run("probe", "pair", *rare, "--metric", "auroc", "--controls", "none", "--output", "x.json")
    assert code == 0 and "AUROC" in out
    for same in ([], ["--metric", "auroc"]):
        assert run("probe", "pair", *rare, *same, "--controls", "none", "--output", "x.json")[1] == out
    refused(["probe", "pair", *rare, "--metric", "top1", "--controls", "none", "--output", "x.json"], "--overwrite")
    other = ["--class-weight", "balanced", "--controls", "none", "--output", "x.json"]
    refused(["probe", "pair", *rare, *other], "--overwrite")
    assert run("verify", "pair")[0] == 2, "no results in the folder"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metric", "accuracy"], "--metric accuracy must be one of top1, mean_per_class, macro_f1, auroc"),
        (["--controls", "some"], "--controls some must be one of none, quick, all"),
        (["--class-weight", "rare"], "--class-weight rare must be one of balanced"),
    ],
)
def test_unknown_choices_are_named(words, said, folder, refused):
    refused(["probe", "pair", *DIGITS, *words], said)


def test_controls_are_left_out_on_the_screen_and_on_the_card(run, refused, folder):
    code, out, _ = run("probe", "pair", *DIGITS, "--controls", "quick")
    assert code == 0 and "raw pixels" in out and not re.search("^untrained members", out, re.MULTILINE)
    note = "Untrained members were left out, so nothing here shows"
    assert note in " ".join(out.split()) and note in (folder / "README.md").read_text()
    assert "Untrained members were not measured." in (folder / "README.md").read_text()
    refused(["probe", "pair", *DIGITS], "lacks", "controls", "--overwrite")
    assert run("probe", "pair", *DIGITS, "--controls", "none")[1] == out, "there are more controls than asked for"


def test_errors_are_a_page_outside_of_the_folder_that_is_published(run, refused, folder, tmp_path):
    code, out, _ = run("probe", "pair", *DIGITS, "--controls", "none", "--errors", "2")
    page = tmp_path / "pair-digits-classes-0-2-limit-30-errors.html"
    assert code == 0 and f"errors: {page.name}" in out and not list(folder.rglob("*.html"))
    text = page.read_text()
    assert 1 <= text.count("data:image/png") <= 2, "two mistakes with their images"
    assert run("probe", "pair", *DIGITS, "--controls", "none", "--errors", "2")[0] == 0
    page.unlink()
    refused(["probe", "pair", *DIGITS, "--controls", "none", "--errors", "2"], "the page of errors", "--overwrite")
    words = ["probe", "pair", *DIGITS, "--controls", "none", "--errors", "2", "--output", "found/x.json"]
    assert run(*words)[0] == 0 and (tmp_path / "found" / "x-errors.html").is_file()


def test_the_card_shows_each_class_and_the_confusions(run, folder):
    assert run("probe", "pair", *DIGITS, "--controls", "none", "-q")[0] == 0
    names = [f"digits-classes-0-2-limit-30{kind}.png" for kind in ("", ".recall", ".confusion")]
    card = (folder / "README.md").read_text()
    assert re.findall(r"!\[[^]]*\]\(figures/([^)]*)\)", card) == names
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(names)
    (folder / "figures" / names[1]).unlink()
    code, _, err = run("card", "pair", "--check")
    assert code == 2 and f"{names[1]} is not there" in err


def test_several_recipes_are_compared_each_in_its_own_metric():
    results = make_results(["pair", "pair, member 0 alone", "other"], [[0.9], [0.8], [0.7]], "macro_f1")
    results.rows[1] = dataclasses.replace(results.rows[1], kind="member")
    results.rows[2] = dataclasses.replace(results.rows[2], kind="baseline")
    column = command.metric_column(dataclasses.replace(results))
    assert column == {
        "pair": "90.0 [80.0, 100.0]",
        "its best member, by test": "80.0 [70.0, 90.0]",
        "other": "70.0 [60.0, 80.0]",
    }


def test_results_as_json_have_the_audit_and_all_metrics(run, folder):
    out = run("probe", "pair", *DIGITS, "--json", "-q", "--controls", "none")[1]
    content = json.loads(out)
    assert content["audit"]["num_images"] == {"train": 30, "validation": 30, "test": 30}
    run_ = content["rows"][0]["runs"][0]
    assert {"top1", "mean_per_class", "macro_f1"} <= set(run_["metrics"]) and set(run_["intervals"]) <= set(
        run_["metrics"]
    )
