"""`concat-ensemble select`, and `build --dtype`: what makes an ensemble smaller."""

import json
import re
from pathlib import Path

import pytest

from concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.studies.results import Results


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
    assert "added to the chosen" in out and "written: chosen" in out
    assert "digits" in Path("chosen/README.md").read_text()


def test_select_quick_looks_at_no_test_image_and_projects_on_request(run, folder):
    code, out, err = run("select", "pair", "--dataset", "digits", "--quick")
    assert code == 0 and "Stop at K = " in out, err
    assert not (folder / "results").exists()
    code, _, err = run("select", "pair", "--dataset", "digits", "--quick", "--output", "chosen")
    assert code == 2 and "--quick only looks" in err
    code, out, _ = run(
        "select", "pair", "--dataset", "digits", "--limit", "200", "--columns", "6", "--output", "small"
    )
    assert code == 0 and ConcatEnsembleConfig.from_pretrained("small").num_features == 6
    assert "│ not projected " in out
    code, out, _ = run("probe", "small", "--dataset", "digits", "--limit", "100")
    assert code == 0 and re.search(r"│ small +│.*│ +6 │", out), "a projected ensemble is probed as it is"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-gflops", "0.0000001"], "no subset is within the budget; the cheapest member has"),
        (["--recipe", "cifar10", "--recipe", "mnist"], "select chooses for one dataset"),
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
