"""The number of repeats and images that a difference needs, against scipy and simulated studies."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from concat_ensemble.probes.repeats import estimate_over_repeats, estimate_over_repeats_and_images
from concat_ensemble.studies.power import Spread, plan_repeats
from concat_ensemble.studies.results import Results, Row, Run, pack_bits

RESULTS = Path(__file__).parents[3] / "model_cards/digits-cat4/results/unseen.json"


def draw(rng, difference, repeats, images, *, between_repeats, between_images, shared):
    """(repeats, images) bits of two systems whose accuracies differ by `difference` in the mean."""
    gains = difference + rng.normal(0, between_repeats, (repeats, 1))
    gains = gains + rng.normal(0, between_images, (1, images) if shared else (repeats, images))
    uniform = rng.random((2, repeats, images))
    return uniform < np.stack([np.clip(0.5 + gains, 0, 1), np.full((repeats, images), 0.5)])


def as_results(bits, *, shared):
    rows = [
        Row(
            name,
            "ensemble",
            4,
            runs=[Run(k, {"top1": b.mean()}, 0.1, 50, len(b), correct=pack_bits(b)) for k, b in runs],
        )
        for name, runs in (("a", enumerate(bits[0])), ("b", enumerate(bits[1])))
    ]
    return Results("a", {}, {}, rows, audit={"test_sha256": "abc" if shared else ""})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_the_power_is_the_share_of_simulated_studies_that_find_the_difference(difference, shared):
    rng, spreads = np.random.default_rng(0), {"between_repeats": 0.02, "between_images": 0.15, "shared": shared}
    pilot = as_results(draw(rng, difference, 300, 4_000, **spreads), shared=shared)
    expected = Spread.of(pilot, "a", "b").power(difference, 6, 300)
    found = []
    for _ in range(400):
        a, b = draw(rng, difference, 6, 300, **spreads).astype(float)
        estimate = estimate_over_repeats_and_images(a - b) if shared else estimate_over_repeats((a - b).mean(1))
        found.append(estimate.p_value() < 0.05)
    assert np.mean(found) == pytest.approx(expected, abs=0.07)


def test_one_repeat_is_a_paired_t_test_over_images():
    rng = np.random.default_rng(1)
    bits = draw(rng, 0.05, 1, 500, between_repeats=0.0, between_images=0.0, shared=False)
    spread = Spread.of(as_results(bits, shared=False), "a", "b")
    error = np.sqrt((bits[0].astype(float) - bits[1]).var(ddof=1) / 500)
    bound = stats.t.ppf(0.975, 499)
    expected = stats.nct.sf(bound, 499, 0.05 / error) + stats.nct.cdf(-bound, 499, 0.05 / error)
    assert spread.repeats is None and spread.power(0.05, 1, 500) == pytest.approx(expected)


def test_more_of_anything_finds_more():
    spread = Spread(0.02**2, 0.1, 0.2)
    powers = [spread.power(0.03, repeats, 500) for repeats in (2, 4, 8, 16)]
    assert powers == sorted(powers) and spread.power(0.03, 8, 5_000) > spread.power(0.03, 8, 500)
    assert (
        spread.power(0.05, 8, 500)
        > spread.power(0.03, 8, 500)
        > spread.power(0.0, 8, 500)
        == pytest.approx(0.05, abs=0.01)
    )


def test_shared_images_limit_what_repeats_can_find():
    results = as_results(
        draw(np.random.default_rng(0), 0.0, 8, 200, between_repeats=0.01, between_images=0.5, shared=True), shared=True
    )
    plan = plan_repeats(results, 0.01, "b")
    assert plan.designs[0].repeats_needed is None and plan.shares_images


def test_the_command_prints_the_plan(run):
    code, out, err = run("power", str(RESULTS), "--difference", "4", "--versus", "cat1")
    assert (code, err) == (0, "") and "cat4 minus cat1: +4.7 [+1.4, +8.0] points; 5 repeats" in out
    code, out, _ = run("power", str(RESULTS), "--difference", "4", "--json")
    plan = json.loads(out)
    assert plan["other"] == "cat1" and [design["images"] for design in plan["designs"]] == [448, 896, 1_792, 4_480]
    study = Results.load(RESULTS)
    differences = study["cat4"].top1 - study["cat1"].top1
    # With the same repeats and images, the standard error is that of the study itself.
    spread = Spread.of(study, "cat4", "cat1")
    assert spread.repeats / 5 + spread.rest / (5 * 448) == pytest.approx(differences.var(ddof=1) / 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--versus", "nobody"], "other='nobody' must be one of"),
        (["--difference", "0"], "0"),
        (["--difference", "nan"], "difference"),
    ],
)
def test_the_command_names_what_is_wrong(run, words, message):
    code, out, err = run("power", str(RESULTS), *words)
    assert code == 2 and message in out + err


def test_results_without_outcomes_by_image_are_refused():
    study = Results.load(RESULTS)
    for each in study["cat1"].runs:
        each.correct = ""
    with pytest.raises(ValueError, match="do not tell which images are correct"):
        plan_repeats(study, 0.02, "cat1")
