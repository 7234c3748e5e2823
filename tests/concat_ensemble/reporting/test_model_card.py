import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from concat_ensemble import ConcatEnsembleConfig, assemble
from concat_ensemble.reporting.model_card import check_card, write_card
from concat_ensemble.reporting.training_curves import plot_training
from concat_ensemble.reporting.verdicts import against, describe_compute, doubts, notes, verdict
from concat_ensemble.studies.probing import probe_ensemble, with_head
from concat_ensemble.studies.results import Cost

REPEATS = {"pair": [0.8, 0.9], "one": [0.7, 0.75], "untrained members": [0.5001, 0.5999], "raw pixels": [0.4, 0.45]}


@pytest.fixture
def card(folder, study):
    """`card(studies, provenance of each member)`: README.md of the pair's folder, as text and as the Hub reads it."""
    config = ConcatEnsembleConfig.from_pretrained(folder)
    hashes = [member["provenance"]["weights_sha256"] for member in config.members]

    def write(studies: dict | None = None, provenance: list[dict] | None = None, **how):
        for member, digest, own in zip(config.members, hashes, provenance or [{}, {}], strict=True):
            member["provenance"] = {"weights_sha256": digest, "source": "here"} | own
        config.save_pretrained(folder)
        for name, rows in (studies or {}).items():
            study(how.get("dataset"), hashes, **rows).save(folder / "results" / f"{name}.json")
        assert write_card(folder, how.get("title"), redraw=how.get("redraw", True)) == folder / "README.md"
        return (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data

    return write


def conclusions(results) -> str:
    return " ".join([verdict(results), *doubts(results)])


def tables(text):
    """The tables as a renderer parses them: lists of rows, each a list of cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    parsed = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            parsed.append([])
        elif token.type == "tr_open":
            parsed[-1].append([])
        elif token.type in ("th_open", "td_open"):
            parsed[-1][-1].append(following.content)
    return parsed


def test_metadata_is_what_the_hub_wants(card):
    _, data = card({"digits": REPEATS}, [{"license": "mit"}, {"license": "mit"}])
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-feature-extraction", "mit")
    assert data.model_name == "pair" and {"concat-ensemble", "timm"} <= set(data.tags)
    assert data.base_model is None and data.datasets is None, "neither members nor dataset came from the Hub"
    values = {result.metric_type: result for result in data.eval_results}
    assert set(values) == {"accuracy", "macro_f1"}
    assert values["accuracy"].metric_value == pytest.approx(0.85) and values["macro_f1"].metric_value == pytest.approx(
        0.425
    )
    assert values["accuracy"].task_type == "image-classification" and values["accuracy"].dataset_type == "digits"
    assert values["accuracy"].metric_args["repeats"] == 2 and values["accuracy"].metric_args["classes"] == [5, 6]


def test_hub_members_and_datasets_are_linked(card):
    provenance = [{"hub_id": "timm/resnet10t.c3_in1k", "revision": "abc"}, {"hub_id": "timm/resnet18.a1_in1k"}]
    text, data = card(
        {"x": REPEATS}, provenance, dataset={"name": "uoft-cs/cifar10", "on_hub": True, "revision": "r1"}
    )
    assert (
        data.base_model == ["timm/resnet10t.c3_in1k", "timm/resnet18.a1_in1k"] and data.base_model_relation == "merge"
    )
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {result.dataset_revision for result in data.eval_results} == {"r1"}
    assert "[timm/resnet10t.c3_in1k](https://huggingface.co/timm/resnet10t.c3_in1k/tree/abc)" in text


def test_a_hub_member_used_twice_is_one_base_model(card):
    _, data = card({}, [{"hub_id": "timm/resnet10t.c3_in1k"}] * 2)
    assert data.base_model in ("timm/resnet10t.c3_in1k", ["timm/resnet10t.c3_in1k"])


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (("mit", None), "other"),
        ((None, None), "other"),
    ],
)
def test_the_licence_is_the_most_restrictive_or_left_to_the_members(licenses, expected, card, folder):
    text, data = card({}, [{"license": name} if name else {} for name in licenses])
    assert data.license == expected
    is_other = expected == "other"
    assert (data.to_dict().get("license_link") == "LICENSE.md") == (folder / "LICENSE.md").is_file() == is_other
    assert [row[8] for row in tables(text)[-1][1:]] == [name or "not stated" for name in licenses]


def test_a_card_without_results_has_no_evaluation(card):
    text, data = card()
    assert data.eval_results is None and "## Results" not in text and "![" not in text
    assert len(tables(text)) == 1


@pytest.mark.parametrize("repeats", [1, 2])
def test_tables_are_whole_with_a_cell_for_every_column(repeats, card):
    rows = {name: shares[:repeats] for name, shares in REPEATS.items()}
    text, _ = card({"digits": rows, "more": rows})
    *studies, members = tables(text)
    assert [len(row) for row in members] == [10, 10, 10], "a heading and two members"
    assert len(studies) == 2
    for table in studies:
        assert [len(row) for row in table] == [8] * 5, "a heading and four rows"
    pipes = [line for line in text.splitlines() if line.startswith("|")]
    assert len(pipes) == 4 + 2 * 6, "no line of a table lies outside of it"


def test_the_numbers_of_the_table_are_those_of_the_results(card):
    """0.8, 0.9: 85.0, t(1) = 12.7062, half-width 12.7062 * 0.0707107 / sqrt 2 = 0.63531, on the logit scale 0.63531 /
    (0.85 * 0.15) = 4.98282 about 1.734601: 0.037375 and 0.998793. Minus 0.7, 0.75: differences 0.1, 0.15, mean 12.5,
    t = 5, p = 1 - 2 / pi * atan(5) = 0.126."""
    text, _ = card({"digits": REPEATS})
    _, first, second, *_ = tables(text)[0]
    assert first == ["**pair**", "85.0", "3.7 to 99.9", "", "", "32", "2", "20"]
    assert second == ["one", "72.5", "34.9 to 92.8", "+12.5 [-19.3, +44.3]", "0.126", "32", "1", "20"]


def test_the_hardest_dataset_comes_first_and_few_labels_last(card, folder):
    card({"few": {"pair": [0.1, 0.2]}}, dataset={"name": "digits", "shots": 10})
    text, _ = card({"easy": REPEATS, "hard": {"pair": [0.5, 0.6]}}, dataset={"name": "digits"})
    assert [table[1][1] for table in tables(text)[:3]] == ["55.0", "85.0", "15.0"]


def test_members_are_shown_with_their_provenance(card, ensemble):
    provenance = [{"pretraining_data": "digits, classes 0, 1", "steps": 400, "seed": 7}, {"source": "runs/x"}]
    text, _ = card({}, provenance)
    first, second = tables(text)[-1][1:]
    digest = ensemble.config.members[0]["provenance"]["weights_sha256"][:12]
    assert (
        first[0] == "0"
        and first[1].startswith("`resnet10t {")
        and first[2:8] == ["16", "1x32x32", "here", "digits, classes 0, 1", "400", "7"]
    )
    assert first[9] == f"`{digest}`"
    assert second[4:8] == ["runs/x", "not stated", "not stated", "not stated"]


def test_provenance_cannot_break_the_table(card):
    text, _ = card({}, [{"source": "a | b"}, {"pretraining_data": "one\ntwo"}])
    table = tables(text)[-1]
    assert [len(row) for row in table] == [10, 10, 10]
    assert table[2][8] == "not stated" and table[1][5] == "not stated", "nothing has moved to another cell"


def test_figures_are_drawn_and_linked(card, folder):
    text, _ = card({"digits": REPEATS, "more": REPEATS})
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert linked == ["figures/digits.png", "figures/more.png"]
    assert all((folder / name).stat().st_size > 10_000 for name in linked)


def test_the_card_has_the_commands_that_made_and_load_it(card):
    text, _ = card({"digits": REPEATS}, [{"command": "concat-ensemble build a b"}] * 2, title="me/pair")
    assert text.count("concat-ensemble build a b\n") == 1 and "concat-ensemble probe pair\n" in text
    assert 'AutoModel.from_pretrained("me/pair", trust_remote_code=True)' in text
    assert text.startswith("---\n") and "# me/pair\n" in text and text.count("```") % 2 == 0


def test_the_snippet_on_the_card_runs(card, folder):
    text, _ = card()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("path/to/pair", str(folder))
    namespace = {}
    exec(code, namespace)
    assert namespace["model"](**namespace["processor"](Image.new("L", (8, 8)))).pooler_output.shape == (1, 32)


def test_with_a_head_it_is_a_classifier(ensemble, folder, digits):
    with_head(ensemble, probe_ensemble(ensemble, digits, quiet=True)[1], ["0", "1", "2"]).save_pretrained(folder)
    text = write_card(folder).read_text()
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    assert "AutoModelForImageClassification.from_pretrained" in text


def test_results_of_other_weights_are_refused(folder, study):
    study(pair=[0.5]).save(folder / "results" / "old.json")
    with pytest.raises(ValueError, match=r"old\.json was measured on other weights than .*pair holds; probe again"):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_a_folder_without_an_ensemble_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds no ensemble .*concat-ensemble build"):
        write_card(tmp_path)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"pair": [0.9, 0.91], "one": [0.7001, 0.7099]}, "pair is 20.0 points above one."),
        ({"pair": [0.7, 0.71], "one": [0.9001, 0.9099]}, "pair is 20.0 points below one."),
        ({"pair": [0.8, 0.9], "one": [0.9, 0.7]}, "5.0 points above one (not beyond chance)"),
        ({"pair": [0.5], "one": [0.45]}, "5.0 points above one (not beyond chance)"),
        ({"pair": [1.0], "one": [0.95]}, "5.0 points above one (at the limit of chance, p = 0.062)."),
        ({"pair": [0.9], "one": [0.5]}, "40.0 points above one."),
        ({"pair": [0.9], "raw pixels": [0.86]}, "Raw pixels do about as well, so this dataset does not show"),
        ({"pair": [0.9], "untrained members": [0.95], "raw pixels": [0.2]}, "Untrained members do about as well"),
        ({"pair": [0.8, 0.81], "raw pixels": [0.9001, 0.9099]}, "Raw pixels do better, so this dataset"),
        ({"pair": [0.5], "untrained members": [0.9]}, "Untrained members do better, so"),
        ({"pair": [0.9, 0.9001], "raw pixels": [0.88, 0.8802]}, "Raw pixels come within 2.0 points, so"),
        ({"pair": [0.9], "majority class": [0.9]}, "Always guessing the largest class does about as well."),
        ({"pair": [0.5], "majority class": [0.9]}, "Always guessing the largest class does better."),
    ],
)
def test_the_verdict_speaks_for_and_against(rows, text, study):
    assert text in conclusions(study(**rows))


@pytest.mark.parametrize(
    ("controls", "rows", "left_out"),
    [
        ("quick", {"raw pixels": [0.4], "majority class": [0.2]}, "Untrained members were"),
        ("quick", {"majority class": [0.2]}, "Untrained members and raw pixels were"),  # of a table without images
        ("none", {}, "Untrained members, raw pixels and the majority class were"),
    ],
)
def test_controls_that_were_left_out_are_named_and_nothing_is_claimed_of_them(controls, rows, left_out, study):
    results = study(pair=[0.9], one=[0.5], **rows)
    results.controls = controls
    (note,) = notes(results)
    assert note == f"{left_out} left out, so nothing here shows that a gain comes from what the members learned."
    assert "ntrained" not in conclusions(results) and ("pixels" in conclusions(results)) == ("raw pixels" in rows)
    assert against(results) == f"{left_out} not measured."


def test_notes_say_what_a_number_rests_on(study):
    assert notes(study(pair=[0.9])) == [] == notes(study(pair=[0.9] * 5))
    few = study(pair=[0.8, 0.9])
    few.audit = {"groups": {"train": 8, "test": 3}}
    assert notes(few) == ["2 repeats are fewer than 5: the intervals are wide, and rough themselves."]
    grouped = study(pair=[0.9], one=[0.8], **{"majority class": [0.5]})
    grouped.audit = {"groups": {"train": 8, "test": 3}}
    grouped["pair"].runs[0].at_edge, grouped["one"].runs[0].at_edge = True, False
    grouped["one"].runs[0].converged = False
    assert notes(grouped) == [
        "Intervals and tests are over the 3 groups of test images.",
        "1 of 2 fits chose the edge of the grid of L2 strengths; a better one may lie beyond it.",
        "1 of 2 fits did not converge.",
    ]
    repeated = study(**{"pair": [0.9] * 5, "untrained members": [0.5] * 5})
    repeated.audit = {}
    assert notes(repeated) == ["The untrained members are the same in all repeats."]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=6), st.booleans())
def test_about_as_well_is_never_said_where_the_paired_test_tells_them_apart(study, shares, untrained):
    name = "untrained members" if untrained else "raw pixels"
    pair, control = zip(*shares, strict=True)
    results = study(pair=[n / 100 for n in pair], **{name: [n / 100 for n in control]})
    difference, (low, high), p = results.difference("pair", name)
    for words in ("about as well", "do better", "come within"):
        if words in conclusions(results):
            assert (words == "do better") == (high < 0 or (difference < 0 and p < 0.05))
            assert (words == "come within") == (low > 0 or (difference > 0 and p < 0.05))


def test_the_verdict_leaves_out_warnings_that_do_not_hold(study):
    assert "about as well" not in conclusions(study(**{"pair": [0.9], "raw pixels": [0.5], "majority class": [0.3]}))
    assert conclusions(study(pair=[0.9])) == ""


def test_a_title_may_hold_what_yaml_reserves(card):
    _, data = card({"digits": REPEATS}, title='pair: a "test" #1')
    assert data.model_name == 'pair: a "test" #1'


def test_the_card_of_a_freshly_assembled_ensemble_is_whole(tmp_path):
    assemble(["random:test_vit"]).save_pretrained(tmp_path / "solo")
    text = write_card(tmp_path / "solo").read_text()
    assert "One image backbone" in text or "1 image backbone (`test_vit`)" in text
    assert ModelCard(text).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("baseline", "text"),
    [
        (1_009.0, "one took 1,009 GFLOP, equal compute"),
        (1_125.0, "one took 1,125 GFLOP, 1.12 times as much"),
        (None, ""),
    ],
)
def test_compute_is_called_equal_within_one_percent_only(baseline, text, study):
    results = study(pair=[0.9], one=[0.8])
    results["pair"].gflops, results["one"].gflops = 1_000.0, baseline
    assert describe_compute(results) == (f"Training pair took 1,000 GFLOP; {text}." if text else "")


# --- what users write into a card, and what strangers write into a config


def test_sections_and_metadata_of_the_user_survive(card, folder):
    text, _ = card({"digits": REPEATS}, title="me/pair")
    own = "## Thanks\n\nTo all.\n\n```bash\n## no heading\n```"
    text = text.replace("## Limits and biases", f"{own}\n\n## Limits and biases").replace(
        "- timm\n", "- timm\n- cats\n"
    )
    (folder / "README.md").write_text(text.replace("---\n", "---\nco2_eq_emissions: 3\n", 1).replace("85.0", "99.9"))
    again, data = card({"digits": REPEATS | {"pair": [0.7, 0.8]}})
    before, thanks, after = again.partition(own)
    assert thanks and "## Training data" in before and after.startswith("\n\n## Limits and biases")
    assert data.to_dict()["co2_eq_emissions"] == 3 and data.tags[-1] == "cats" and "# me/pair\n" in again
    assert "99.9" not in again and "| 75.0 |" in again
    assert card()[0] == again, "once more changes nothing"


def test_check_names_the_first_line_that_differs_from_the_results(card, folder, study):
    text, _ = card({"digits": REPEATS})
    check_card(folder)
    (folder / "README.md").write_text(text.replace("| 85.0 |", "| 95.0 |"))
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "| 85.0 |" in line)
    with pytest.raises(
        ValueError, match=rf"README\.md, line {line}, says '.*95\.0.* give '.*85\.0.*concat-ensemble card"
    ):
        check_card(folder)
    (folder / "README.md").write_text(text)
    (folder / "figures" / "digits.png").unlink()
    with pytest.raises(ValueError, match=r"digits\.png is not there"):
        check_card(folder)


def test_names_from_strangers_are_shown_as_text(card):
    bad = "<script>alert(1)</script> ![x](javascript:1) `code` [l](http://a.b)"
    provenance = {"source": bad, "license": bad, "hub_id": bad, "command": "```\n<script>"}
    rows = {bad: [0.5, 0.6], "one": [0.4, 0.5]}
    text, data = card({"digits": rows}, [provenance, provenance], dataset={"name": bad}, title=bad)
    tokens = [
        t
        for block in MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
        for t in [block, *(block.children or [])]
    ]
    html = [token.content for token in tokens if token.type.startswith("html")]
    assert len(html) == 1 and html[0].startswith("<!-- Written by"), html
    assert {t.attrs["src"] for t in tokens if t.type == "image"} == {"figures/digits.png"}
    assert {t.attrs["href"] for t in tokens if t.type == "link_open"} <= {
        "LICENSE.md",
        "https://arxiv.org/abs/2506.18221",
    }
    assert data.base_model is None and text.count("```") % 2 == 0


def test_results_that_speak_against_the_ensemble_have_a_section(card, study):
    text, _ = card(
        {"digits": {"pair": [0.7, 0.71], "one": [0.9001, 0.9099], "two": [0.7, 0.72], "raw pixels": [0.1001, 0.1099]}}
    )
    assert (
        "## When it does not help\n\n- **digits, classes 5, 6, 100 test images.** "
        "Better than the ensemble: one. No difference beyond chance: two." in text
    )
    text = against(study(**{"pair": [0.9], "raw pixels": [0.3]}))
    assert text == "The ensemble is better than everything that it was compared with."


def test_costs_are_columns_where_they_were_measured(folder, study, ensemble):
    results = study(None, [m["provenance"]["weights_sha256"] for m in ensemble.config.members], **REPEATS)
    results["pair"].cost, results.hardware = Cost(1.5, 250.0, 0.002), "a <b>GPU</b>"
    results.save(folder / "results" / "digits.json")
    heading, first, second, *_ = tables(write_card(folder).read_text())[0]
    assert heading[8:] == ["M parameters", "GFLOPs", "images/s"]
    assert first[8:] == ["250", "1.5", "500"] and second[8:] == ["", "", ""]
    assert r"measured on a \<b\>GPU" in (folder / "README.md").read_text()


def test_a_benchmark_of_the_hub_has_an_eval_results_file_too(card, folder):
    dataset = {"name": "org/bench", "on_hub": True, "revision": "r1", "benchmark": "task", "classes": None}
    card({"part": REPEATS}, dataset=dataset | {"limit": 100})
    assert not (folder / ".eval_results").exists(), "a part of a benchmark is no result on it"
    card({"bench": REPEATS}, dataset=dataset)
    (entry,) = yaml.safe_load((folder / ".eval_results" / "bench.yaml").read_text())
    assert entry["dataset"] == {"id": "org/bench", "task_id": "task", "revision": "r1"} and entry["value"] == 85.0


def test_the_card_is_the_golden_one(card):
    """In golden_card.md, `<...>` stands for text that differs from run to run."""
    golden = (Path(__file__).parent / "golden_card.md").read_text()
    provenance = [{"license": "mit", "command": "concat-ensemble build a b"}, {"license": "apache-2.0"}]
    text, _ = card({"digits": REPEATS}, provenance)
    assert re.fullmatch(re.escape(golden).replace(re.escape("<...>"), r"[^\n|]*"), text)


def test_without_redraw_figures_newer_than_their_results_stay(card, folder):
    def drawn() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (folder / "figures").iterdir()}

    card({"digits": REPEATS, "more": REPEATS})
    before = drawn()
    card({"new": REPEATS}, redraw=False)
    assert drawn().keys() - before.keys() == {"new.png"} and before.items() <= drawn().items()
    card({"digits": REPEATS | {"pair": [0.1, 0.2]}}, redraw=False)
    assert {name for name in before if drawn()[name] > before[name]} == {"digits.png"}
    before = drawn()
    card()
    assert {name for name in before if drawn()[name] > before[name]} == {"digits.png", "more.png", "new.png"}


def test_the_training_curves_are_shown_where_they_lie_in_the_folder(card, folder):
    provenance = [{"command": "accelerate launch training/pretrain_members.py recipe.yaml"}] * 2
    assert "figures/training.png" not in card({}, provenance)[0]
    plot_training({"net-0": [{"step": 50.0, "loss": 1.5}]}, folder / "figures" / "training.png")
    text, _ = card({}, provenance)
    assert text.count("](figures/training.png)") == 1 and str(folder) not in text
    check_card(folder)
