"""`verify` believes nothing that a results file says: each number that a liar can choose is measured again, and of
local data only those are read that the user names."""

import copy
import dataclasses
import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest

from concat_ensemble import ConcatEnsembleModel, assemble
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.studies.claims import VERSION_1_SELECTION, compare_results
from concat_ensemble.studies.options import ProbeOptions
from concat_ensemble.studies.probe_study import run_probe_study
from concat_ensemble.studies.results import Results, pack_bits, pack_numbers
from concat_ensemble.studies.verification import measure_again, read_dataset, verify_ensemble

QUIET = ExtractionOptions(quiet=True)
DIGITS = {"name": "digits", "classes": "3,8,9", "limit": 160}


def probe(folder, options, **dataset):
    """The file of honest results, and what `verify` measures for them."""
    path = run_probe_study(str(folder), DatasetOptions(**DIGITS | dataset), options, QUIET).path
    return path, measure_again(Results.load(path), ConcatEnsembleModel.from_pretrained(folder), extraction=QUIET)


@pytest.fixture(scope="module")
def single(made, tmp_path_factory):
    """One repeat of an ensemble of two members, with all controls."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("single") / "pair")
    shutil.rmtree(folder / "results")
    return probe(folder, ProbeOptions())


@pytest.fixture(scope="module")
def one_member(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "one"
    assemble([backbone]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repeated(one_member):
    """Two repeats in another metric, with two controls."""
    return probe(one_member, ProbeOptions(repeats=2, metric="macro_f1", controls="quick"))


@pytest.fixture
def claim(tmp_path):
    """`claim(measured, lie)`: what is wrong with the honest results after a lie was written into their file."""

    def check(measured, lie):
        path, again = measured
        content = json.loads(path.read_text())
        lie(content)
        lied = tmp_path / "lied.json"
        lied.write_text(json.dumps(content))
        return [each for check in compare_results(Results.load(lied), again) for each in check.differences]

    return check


def row(content, name):
    return next(row for row in content["rows"] if row["name"].endswith(name))


def in_run(name, key, value):
    return lambda content: row(content, name)["runs"][0].__setitem__(key, value)


def in_row(name, key, value):
    return lambda content: row(content, name).__setitem__(key, value)


def in_metrics(name, **metrics):
    return lambda content: row(content, name)["runs"][0]["metrics"].update(metrics)


def in_dataset(**values):
    return lambda content: content["dataset"].update(values)


def in_probe(**values):
    return lambda content: content["probe"].update(values)


def in_audit(**values):
    return lambda content: content["audit"].update(values)


def as_version_1(content):
    content["probe"]["selection"], content["audit"] = VERSION_1_SELECTION, None
    content["rows"] = [each for each in content["rows"] if each["name"] != "majority class"]


def another_rounding(content):
    for metrics in (run["metrics"] for each in content["rows"] for run in each["runs"]):
        metrics |= {name: min(1.0, share + 1e-4) for name, share in metrics.items()}


def few_images(content):
    """95 of 100, on one image."""
    for run in (run for each in content["rows"] for run in each["runs"]):
        run |= {"n_test": 1, "correct": "", "confusion": ""}
        run["metrics"] |= {"top1": 0.95, "macro_f1": 0.95}


def without_rivals(content):
    content["rows"] = [each for each in content["rows"] if each["kind"] != "member"]


def another_first_row(content):
    content["rows"].insert(0, row(content, "member 0 alone") | {"name": "the best of all"})
    content["rows"][0]["kind"] = "ensemble"


def twice(content):
    content["rows"].append(dict(row(content, "majority class")))


def a_gain(content):
    """Each within what rounding may change, but not both."""
    for name, change in (("one", 0.009), ("raw pixels", -0.009)):
        for run in row(content, name)["runs"]:
            run["metrics"]["macro_f1"] += change


def one_repeat_ten_times(content):
    for each in content["rows"]:
        each["runs"] = each["runs"][:1] * 10


def baseline(content):
    content["rows"].append(
        row(content, "member 0 alone") | {"name": "a network ten times as large", "kind": "baseline"}
    )


LIES = {
    "of-one-image": (few_images, "n_test=1 where it is"),
    "top1": (in_metrics("pair", top1=0.1), "10.0 where"),
    "another-metric": (in_metrics("pair", mean_per_class=0.2), "metrics.mean_per_class differs"),
    "a-metric-of-its-own": (in_metrics("pair", difficulty=0.9), "metrics.difficulty was not measured"),
    "percent": (
        lambda content: in_metrics("pair", calibration_error=95.0)(content),
        "metrics.calibration_error differs",
    ),
    "member": (in_metrics("member 1 alone", top1=0.02), "2.0 where"),
    "projected": (in_metrics("PCA to 16", top1=0.02), "2.0 where"),
    "majority": (in_metrics("majority class", top1=0.02), "2.0 where"),
    "pixels": (in_metrics("raw pixels", top1=0.02), "2.0 where"),
    "untrained": (in_metrics("untrained members", top1=0.02), "2.0 where"),
    "baseline": (baseline, "it was not measured again: name it with baselines"),
    "fewer-rows": (without_rivals, "the results leave it out"),
    "another-first-row": (another_first_row, "the first row='the best of all'"),
    "a-row-twice": (twice, "rows that share a name"),
    "n_train": (in_run("pair", "n_train", 4), "n_train=4 where it is"),
    "seed-of-a-run": (in_run("pair", "seed", 17), "seed=17 where it is 0"),
    "interval": (in_run("pair", "intervals", {"mean_per_class": [0.2, 0.21]}), "intervals.mean_per_class[0] differs"),
    "spread": (in_run("pair", "resamples", [1.0] * 5), "resamples"),
    "more-resamples": (in_run("pair", "resamples", [0.5] * 500), "the length of resamples=500"),
    "bits": (in_run("pair", "correct", pack_bits(np.zeros(160, bool))), "correct differs by"),
    "resampled": (
        lambda c: [r["runs"][0].update(resampled=pack_numbers(np.ones(9), "<f4")) for r in c["rows"]],
        "resamp",
    ),
    "confusion": (
        in_run("pair", "confusion", pack_numbers(np.array([0, 160, *[0] * 7]), "<u4")),
        "confusion differs by",
    ),
    "strength": (in_run("pair", "l2_strength", 1e9), "l2_strength=1000000000.0"),
    "converged": (in_run("pair", "converged", False), "converged=False"),
    "at-edge": (in_run("pair", "at_edge", 7 > 6), "at_edge"),
    "num_features": (in_row("pair", "num_features", 3), "num_features=3 where it is"),
    "num_members": (in_row("pair", "num_members", 9), "num_members=9 where it is 2"),
    "steps": (in_row("pair", "steps", 1), "steps=1 where it is None"),
    "training-compute": (in_row("pair", "gflops", 0.1), "gflops=0.1 where it is None"),
    "kind": (in_row("member 0 alone", "kind", "control"), "kind='control'"),
    "cost": (lambda c: row(c, "pair")["cost"].update(gflops=1e-9), "cost.gflops=1e-09"),
    "cost-of-nothing": (
        in_row("majority class", "cost", {"gflops": 99.0, "million_parameters": 0.0}),
        "cost.gflops=99",
    ),
    "another-dataset": (
        in_dataset(name="ILSVRC/imagenet-1k"),
        "dataset.name='ILSVRC/imagenet-1k' where it is 'digits'",
    ),
    "on-the-hub": (in_dataset(on_hub=True), "dataset.on_hub=True where it is False"),
    "a-benchmark": (in_dataset(benchmark="imagenet"), "dataset.benchmark='imagenet' where it is None"),
    "test-images": (in_dataset(test_images=50_000), "dataset.test_images=50000 where"),
    "limit": (in_dataset(limit=None), "dataset.limit=None where it is 160"),
    "shots": (in_dataset(shots=2), "dataset.shots=2 where it is None"),
    "a-cut": (in_dataset(test_split="test[:5]"), "dataset.test_split='test[:5]'"),
    "test_size": (in_dataset(test_size=0.9), "dataset.test_size=0.9 where it is 0.5"),
    "classes": (in_dataset(classes=[7, 8]), "dataset.classes=[7, 8] where it is [3, 8, 9]"),
    "seed": (in_dataset(seed=3), "dataset.seed=3 where it is 0"),
    "selection": (in_probe(selection="on the test images"), "probe.selection='on the test images'"),
    "grid": (in_probe(l2_strengths=[1.0]), "probe.l2_strengths=[1.0]"),
    "num_resamples": (in_probe(num_resamples=10**9), "probe.num_resamples=1000000000 where it is 5"),
    "a-setting-of-its-own": (in_probe(augmented=True), "probe.augmented=True where it is None"),
    "label-counts": (in_audit(classes={"3": {"train": 1}, "8": {"train": 1}, "9": {"train": 1}}), "audit.classes"),
    "leaks": (in_audit(duplicates_across={"train/test": 9, "train/validation": 0, "validation/test": 0}), "audit.dup"),
    "share-of-the-largest": (in_audit(majority_share=0.01), "audit.majority_share=0.01 where"),
    "an-empty-audit": (lambda content: content.update(audit={}), "audit.num_images={}"),
    "no-audit": (lambda content: content.update(audit=None), "audit=None where it is"),
    "imbalance": (in_audit(imbalanced=True), "audit.imbalanced=True where it is False"),
    "class-names": (
        lambda content: content.update(class_names=["cat", "dog", "cow"]),
        "class_names=['cat', 'dog', 'cow']",
    ),
}
LIES_OF_REPEATS = {
    "a-gain": (a_gain, "for the ensemble against it"),
    "repeat": (lambda c: c["rows"][0]["runs"][1]["metrics"].update(macro_f1=0.3), "metrics.macro_f1 differs"),
    "mean": (in_metrics("one", macro_f1=0.01), " was measured"),
    "more-repeats": (one_repeat_ten_times, "repeats=10 where it is 2"),
    "interval": (in_run("one", "intervals", {"macro_f1": [0.0, 0.01]}), "intervals.macro_f1[1] differs"),
    "resampled": (
        lambda c: [
            run.update(resampled=pack_numbers(np.full(1000, 0.5), "<f4")) for r in c["rows"] for run in r["runs"]
        ],
        "resampled differs",
    ),
    "another-order": (lambda c: c["rows"][0].update(runs=c["rows"][0]["runs"][::-1]), "seed=1 where it is 0"),
}


def test_honest_results_are_confirmed(claim, single, repeated):
    for path, again in (single, repeated):
        checks = compare_results(Results.load(path), again)
        assert [check.name for check in checks if not check.holds] == []
        assert all(check.interval[0] <= check.again == check.card <= check.interval[1] for check in checks)
        assert claim((path, again), as_version_1) == [], "from before there were audits and the majority class"
        assert claim((path, again), another_rounding) == []


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_not_confirmed(lie, claim, single):
    tell, said = LIES[lie]
    try:
        differences = claim(single, tell)
    except ValueError as refusal:  # which is no results file in the first place
        differences, said = [str(refusal)], "is not a results file"
    assert any(said in each for each in differences), differences


@pytest.mark.parametrize("lie", LIES_OF_REPEATS)
def test_a_lie_about_repeats_is_not_confirmed(lie, claim, repeated):
    tell, said = LIES_OF_REPEATS[lie]
    differences = claim(repeated, tell)
    assert any(said in each for each in differences), differences


def test_repeats_do_not_agree_better_than_they_do(repeated):
    """Each number is within what rounding may change, but their interval is not."""
    path, again = repeated
    claimed, measured = Results.load(path), copy.deepcopy(again)
    for results, spread in ((claimed, 0.0), (measured, 0.009)):
        for run, sign in zip(results.rows[0].runs, (-1, 1), strict=True):
            run.metrics["macro_f1"] = 0.7 + sign * spread
    differences = [each for check in compare_results(claimed, measured) for each in check.differences]
    assert "the interval is 0.0 points wide where 22.9 were measured" in differences, differences


@pytest.mark.parametrize("metric", ["95.0", "-0.1", "NaN", "Infinity", "1e999", '"high"', "null"])
def test_shares_that_are_none_are_refused(metric, single, tmp_path):
    path, _ = single
    content = json.loads(path.read_text())
    content["rows"][0]["runs"][0]["metrics"]["top1"] = "HERE"
    (tmp_path / "odd.json").write_text(json.dumps(content).replace('"HERE"', metric))
    with pytest.raises(ValueError, match="is not a results file"):
        Results.load(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        *[
            ({"name": name}, "is not a dataset on the Hub")
            for name in (
                "",
                ".",
                "..",
                "../x",
                "~",
                "imagefolder",
                "csv",
                "imagefolder:/home",
                "imagefolder:.",
                "csv:/etc/passwd",
                "json:/etc/os-release",
                "parquet:hf://datasets/me/x/a.parquet",
                "webdataset:https://example.com/x.tar",
                "https://example.com/x.parquet",
                "scattered:",
                "scattered:imagefolder:photos",
                "scattered:scattered:digits",
                "digits/../photos",
                "me/photos",
                "me/photos/",
                "me/pho\ntos",
                "photos",
                "file:///etc/passwd",
                "me/x@main",
            )
        ],
        ({"name": "me/data", "revision": "refs/pr/7"}, "is a pull request"),
        ({"recipe": "../../recipes/mine"}, "no recipe"),
        ({"recipe": "/etc/passwd"}, "no recipe"),
        ({"recipe": 5}, "got `int`"),
        ({"name": "digits", "limit": "many"}, "got `str`"),
        ({"name": "digits", "seed": [0]}, "got `array`"),
        ({"name": ["digits"]}, "got `array`"),
    ],
)
def test_a_dataset_that_the_user_did_not_name_is_not_read(recorded, said, world):
    (world / "me/photos").mkdir(parents=True)
    (world / "photos").mkdir()
    with pytest.raises(ValueError, match=r".") as refusal:
        read_dataset(recorded)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "recorded",
    [
        {"name": "digits"},
        {"name": "scattered:digits"},
        {"name": "ylecun/mnist", "revision": "v1"},
        {"recipe": "mnist"},
    ],
)
def test_public_datasets_need_no_word_of_the_user(recorded, world):
    assert recorded.items() <= dataclasses.asdict(read_dataset(recorded)).items()


@pytest.fixture
def lied(repeated, world):
    """`lied(lie)`: a folder of the ensemble with honest results but for a lie."""

    def tell(lie):
        path, _ = repeated
        folder = shutil.copytree(path.parent.parent, world / "one")
        content = json.loads(path.read_text())
        lie(content)
        (folder / "results" / path.name).write_text(json.dumps(content))
        return folder

    return tell


def test_the_command_does_not_confirm_95_on_one_image(lied, refused):
    write_card(lied(few_images))
    refused("verify", "one", "--quiet", said="n_test=1 where it is 160")


def test_results_that_the_hub_shows_and_nobody_measured_are_refused(lied, world, refused):
    write_card(lied(lambda content: None))
    (world / "one/.eval_results").mkdir()
    (world / "one/.eval_results/imagenet.yaml").write_text("- value: 99.9\n")
    refused("verify", "one", "--quiet", said="imagenet.yaml is not from results")


@pytest.mark.parametrize("kind", ["fine-tuning", "k nearest neighbors", ""])
def test_only_a_linear_probe_is_confirmed(kind, lied):
    folder = lied(in_probe(kind=kind))
    (check,) = verify_ensemble(folder, ConcatEnsembleModel.from_pretrained(folder), quiet=True)
    assert not check.holds and f"{kind!r} is no linear probe" in check.differences[0]


@pytest.mark.parametrize("name", ["csv:{}", "imagefolder:{}", "parquet:{}", "{}"])
def test_no_local_file_is_opened(name, lied, world):
    """Whoever opens this pipe waits forever."""
    os.mkfifo(world / "private.parquet")
    folder = lied(in_dataset(name=name.format(world / "private.parquet")))
    (check,) = verify_ensemble(folder, ConcatEnsembleModel.from_pretrained(folder), quiet=True)
    assert not check.holds and "is not a dataset on the Hub" in check.differences[0]


def test_a_copy_that_the_user_names_must_hold_the_same_images(one_member, world):
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 6)):
        for label in ("dark", "bright"):
            (world / "mine" / split / label).mkdir(parents=True)
            for n in range(number):
                pixels = rng.integers(0, 100, (8, 8)) + 100 * (label == "bright")
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(world / "mine" / split / label / f"{n}.png")
    folder = shutil.copytree(one_member, world / "one", ignore=lambda *_: ["results"])
    dataset = DatasetOptions(name=f"imagefolder:{world / 'mine'}")
    run_probe_study(str(folder), dataset, ProbeOptions(controls="none"), QUIET)
    (world / "mine").rename(world / "moved")
    model = ConcatEnsembleModel.from_pretrained(folder)

    def differences(*names):
        return [check.differences for check in verify_ensemble(folder, model, datasets=names, quiet=True)]

    assert "is not a dataset on the Hub" in str(differences())
    assert "is not a dataset on the Hub" in str(differences("imagefolder:a", "imagefolder:b")), "which one is it?"
    assert not any(differences("imagefolder:moved"))
    image = world / "moved/test/dark/0.png"
    PIL.Image.fromarray(rng.integers(0, 100, (8, 8)).astype(np.uint8)).save(image)
    assert "audit.sha256=" in differences("imagefolder:moved")[0][0]
