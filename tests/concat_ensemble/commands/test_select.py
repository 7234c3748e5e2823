"""`concat-ensemble select`, and `build --dtype`: what makes an ensemble smaller."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.studies.results import Results


def advice(out):
    """The rows of the table of members."""
    row = r"^(?P<name>\d .+?) +[\d,]+ +[\d.e-]+ +[\d.]+ +-?[\d.]+ +\[.+?\] +(?P<advice>\w[\w ]*?) *$"
    return [match.groupdict() for match in re.finditer(row, out, flags=re.MULTILINE)]


def test_select_writes_the_subset_it_recommends(run, folder):
    """These untrained members differ little on the digits, but what is printed, written and probed agrees."""
    words = ["select", "pair", "--dataset", "digits", "--limit", "200", "--output", "chosen"]
    code, out, err = run(*words)
    assert code == 0, err
    content = json.loads((folder / "selection" / "digits-limit-200.json").read_text())
    assert [s["members"] for s in content["subsets"]] and len(content["subsets"]) == 3
    assert (folder / "selection" / "digits-limit-200.png").stat().st_size > 10_000
    chosen = ConcatEnsembleConfig.from_pretrained("chosen")
    assert len(chosen.members) == len(content["best"])
    results = Results.load(Path("chosen/results/digits-limit-200.json"))
    assert results.rows[0].name == "chosen" and "untrained members" in results and "raw pixels" in results
    assert "without it" in out and "written: chosen" in out and content["margin"] == 0.01
    screen = out[: out.index("all subsets:")].splitlines()
    assert max(map(len, screen)) <= 80, screen
    assert {part["advice"] for part in advice(out)} <= {"keep", "drop", "cannot tell"} and len(advice(out)) == 2
    assert "digits" in Path("chosen/README.md").read_text()


def test_select_quick_looks_at_no_test_image_and_projects_on_request(run, folder):
    code, out, err = run("select", "pair", "--dataset", "digits", "--quick")
    assert code == 0, err
    assert "Stop at K = " in out or "cannot tell whether member" in out or "Each member is needed" in out
    assert not (folder / "results").exists()
    code, _, err = run("select", "pair", "--dataset", "digits", "--quick", "--output", "chosen")
    assert code == 2 and "--quick only looks" in err
    code, out, _ = run(
        "select", "pair", "--dataset", "digits", "--limit", "200", "--columns", "6", "--output", "small"
    )
    assert code == 0 and ConcatEnsembleConfig.from_pretrained("small").num_features == 6
    assert re.search("^not projected ", out, re.MULTILINE)
    code, out, _ = run("probe", "small", "--dataset", "digits", "--limit", "100", "--wide")
    assert code == 0 and re.search(r"│ small +│.*│ +6 │", out), "a projected ensemble is probed as it is"


def test_select_drops_within_a_margin_and_keeps_without_one(run, folder):
    """The untrained members differ by a few points on the digits: within 60 one of them is dropped, within 1 none."""
    words = ["select", "pair", "--dataset", "digits", "--limit", "100", "--json", "--quiet"]
    code, out, err = run(*words, "--margin", "60", "--metric", "macro_f1")
    assert code == 0, err
    content = json.loads(out)
    assert len(content["best"]) == 1 and content["probe"]["metric"] == "macro_f1" and content["margin"] == 0.6
    code, out, err = run(*words)
    assert code == 0 and json.loads(out)["best"] == [0, 1], err


def test_select_says_what_is_wrong_with_the_data(run, folder, tmp_path):
    """A tenth of the images is of one class of two: recall is compared, and the screen says why."""
    rng, rows = np.random.default_rng(0), []
    for number in range(120):
        buffer = io.BytesIO()
        label = int(number % 10 == 0)
        Image.fromarray((rng.random((8, 8)) * 120 + 100 * label).astype(np.uint8)).save(buffer, "png")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    Dataset.from_list(rows).to_parquet(tmp_path / "rare.parquet")
    code, out, err = run("select", "pair", "--dataset", str(tmp_path / "rare.parquet"), "--quick")
    assert code == 0, err
    assert "mean_per_class in %" in out
    assert "top-1\nmisleads" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-gflops", "0.0000001"], "no subset is within the budget; the cheapest member has"),
        (["--recipe", "cifar10", "--recipe", "mnist"], "select chooses for one dataset"),
        (["--margin", "0"], "--margin 0 must be between 0 and 100 points"),
        (["--margin", "nan"], "--margin nan must be between 0 and 100 points"),
        (["--metric", "f2"], "--metric f2 must be one of top1, mean_per_class"),
    ],
)
def test_select_refuses_in_one_line(words, said, run, folder):
    dataset = [] if "--recipe" in words else ["--dataset", "digits", "--limit", "100"]
    code, _, err = run("select", "pair", *dataset, *words)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_build_keeps_weights_in_half_precision_and_they_are_probed(run, folder):
    code, _, err = run("build", "pair", "--dtype", "float16", "--output", "half")
    assert code == 0, err
    sizes = [sum(p.stat().st_size for p in Path(name).glob("member-*")) for name in ("pair", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    code, _, err = run("probe", "half", "--dataset", "digits", "--limit", "100", "--baseline", "pair", "--quiet")
    assert code == 0, err
    code, _, err = run("build", "pair", "--dtype", "int8", "--output", "other")
    assert code == 2 and "--dtype int8: give float32, float16, bfloat16" in err


def test_select_refuses_a_taken_output_before_any_work(run, folder, contents):
    before = contents(folder.parent)
    code, _, err = run("select", "pair", "--dataset", "digits", "--output", "pair")
    assert code == 2 and "pair holds something already; add --overwrite" in err
    assert contents(folder.parent) == before
