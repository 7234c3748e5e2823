"""The console script, in a process of its own where that matters, else by its `main`: importing takes seconds."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import LinearProbe, assemble, extract_features, load_data
from concat_ensemble.studies.results import Results

PROGRAM = Path(sys.executable).with_name("concat-ensemble")
DIGITS = ["--dataset", "digits", "--classes", "0-2", "--limit", "30"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


# --- build -----------------------------------------------------------------------------------------------------------


def test_build_makes_a_whole_hub_folder(run, tmp_path):
    code, out, err = run("build", "random:test_vit", "random:test_resnet", "--output", "deep/two", "--seed", "3")
    assert (code, err) == (0, "")
    assert "160 features" in out and "test_vit" in out and "3x160x160" in out
    folder = tmp_path / "deep" / "two"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_concat_ensemble.py",
        "image_processing_concat_ensemble.py",
        "member-00.safetensors",
        "member-01.safetensors",
        "model.safetensors.index.json",
        "modeling_concat_ensemble.py",
        "preprocessor_config.json",
        "weights_concat_ensemble.py",
    ]
    model, expected = AutoModel.from_pretrained(folder), assemble(["random:test_vit", "random:test_resnet"], seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert [member["provenance"]["command"] for member in model.config.members] == [
        "concat-ensemble build random:test_vit random:test_resnet --output deep/two --seed 3"
    ] * 2
    assert "# two\n" in (folder / "README.md").read_text()


def test_quiet_prints_nothing_and_overwrite_replaces(run, tmp_path):
    assert run("build", "random:test_vit", "-o", "x", "-q") == (0, "", "")
    (tmp_path / "x" / "results").mkdir()
    (tmp_path / "x" / "results" / "old.json").write_text("{}")
    assert run("build", "random:test_resnet", "-o", "x", "-q", "--overwrite") == (0, "", "")
    assert AutoModel.from_pretrained(tmp_path / "x").config.members[0]["architecture"] == "test_resnet"
    assert not (tmp_path / "x" / "results").exists(), "what was measured on the weights before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_ensemble_can_grow_in_its_own_folder(run, tmp_path):
    run("build", "random:test_vit", "-o", "x", "-q")
    assert run("build", "x", "random:test_vit", "-o", "x", "-q", "--overwrite", "--seed", "5")[0] == 0
    hashes = [
        member["provenance"]["weights_sha256"] for member in AutoModel.from_pretrained(tmp_path / "x").config.members
    ]
    assert len(hashes) == 2 and hashes[0] != hashes[1]


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "x").mkdir()
    assert run("build", "random:test_vit", "-o", "x", "-q")[0] == 0
    assert run("build", "random:test_vit", "-o", tmp_path / "x" / "y", "-q")[0] == 0, "a folder within is another"


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.fixture
def files(tmp_path, backbone):
    """What a user may hand over by mistake."""
    weights = backbone().state_dict()
    save_file(weights, tmp_path / "resnet10t.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "resnet10t.safetensors").read_bytes()[:5000])
    torch.save({"state_dict": weights, "x": Mischief()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("hello")
    unpooled = backbone(global_pool="")
    args = {key: value for key, value in unpooled._model_args.items() if key != "num_classes"}
    save_for_hf(unpooled, tmp_path / "unpooled", model_args=args, safe_serialization=True)
    assemble([backbone()]).save_pretrained(tmp_path / "meddled")
    config = json.loads((tmp_path / "meddled" / "config.json").read_text())
    config["members"][0]["model_args"]["checkpoint_path"] = "/etc/passwd"
    (tmp_path / "meddled" / "config.json").write_text(json.dumps(config))


BAD_BUILDS = {
    "unknown architecture": (["random:resnet9000"], ["'resnet9000' is not one of timm", "did you mean resnet"]),
    "unknown architecture, pretrained": (["resnet9000"], ["'resnet9000' is not one of timm", "did you mean resnet"]),
    "unknown weights": (["resnet18.of_mine"], ["resnet18.of_mine"]),
    "no network": (["resnet18"], ["cannot reach the Hub for hf-hub:timm/resnet18", "give ARCHITECTURE=FILE"]),
    "no members": ([], ["member"]),
    "checkpoint for another architecture": (
        ["test_resnet=resnet10t.safetensors"],
        ["resnet10t.safetensors does not hold the weights of test_resnet", "missing:"],
    ),
    "truncated safetensors": (
        ["resnet10t=half.safetensors"],
        ["half.safetensors is not a whole safetensors file", "fetch or save it again"],
    ),
    "pickle that runs code": (["resnet10t=trap.pth"], ["trap.pth holds more than tensors", "or as .safetensors"]),
    "text for a checkpoint": (["resnet10t=text.pth"], ["text.pth"]),
    "missing file": (["resnet10t=none.pth"], ["no checkpoint file none.pth"]),
    "member without pooled features": (
        ["unpooled"],
        ["resnet10t) has no pooled features", "set its global_pool"],
    ),
    "refused model_args": (["meddled"], ["model_args may not hold 'checkpoint_path'"]),
    "bad preprocessing": (
        ["random:test_vit", "--preprocessing", "same"],
        ["--preprocessing same must be 'own' or 'shared'"],
    ),
}


@pytest.mark.parametrize("case", BAD_BUILDS)
def test_build_refuses(case, files, refused):
    words, said = BAD_BUILDS[case]
    refused(["build", *words, "--output", "new"], *said)


def test_a_failed_build_leaves_no_folders_on_the_way(refused):
    refused(["build", "random:nonesuch", "--output", "deep/down/new"], "'nonesuch' is not one of timm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "random:test_vit"], ["--output"]),
        (["build", "random:test_vit", "-o", "new", "--seed", "many"], ["--seed", "valid integer"]),
        (["build", "random:test_vit", "-o", "new", "--sead", "3"], ["--sead", "--seed"]),
        (["probe", "pair", "--batch-size", "0"], ["--batch-size"]),
        (["biuld", "random:test_vit"], ["biuld", "build"]),
    ],
)
def test_misused_options_are_named_by_typer(words, said, run, tmp_path):
    code, out, err = run(*words)
    assert code == 2 and out == "" and all(text in err for text in said)
    assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_leaves_what_was_there(run, refused):
    run("build", "random:test_vit", "-o", "x", "-q")
    refused(["build", "random:nonesuch", "-o", "x", "--overwrite"], "'nonesuch' is not one of timm")


def test_outputs_that_cannot_be_are_named(run, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    run("build", "random:test_vit", "-o", "x", "-q")
    build = ["build", "random:test_vit", "--output"]
    refused([*build, "file"], "file is a file; name a folder with --output")
    refused([*build, "file", "--overwrite"], "file is a file; name a folder with --output")
    refused([*build, "file/x"], "file")
    refused([*build, "full"], "full holds something already; add --overwrite or name another --output")
    refused(
        [*build, "full", "--overwrite"],
        "full holds something other than an ensemble, which --overwrite does not delete",
    )
    refused([*build, "x"], "x holds something already; add --overwrite")
    refused([*build, "."], "--output")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_an_output_that_cannot_be_written_is_named(refused):
    refused(["build", "random:test_vit", "--output", "/proc/nonesuch/x"], "/proc", "--output")


@pytest.mark.skipif(os.access("/", os.W_OK) and os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(["build", "random:test_vit", "--output", "locked/x"], "locked cannot be written to; name another --output")


# --- probe -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one(backbone, tmp_path):
    assemble([backbone(5)]).save_pretrained(tmp_path / "one")


def test_probe_writes_results_head_and_card(run, folder, one, digits, ensemble):
    code, out, err = run("probe", "pair", *DIGITS, "--baseline", "one", "--save-head", "--json")
    assert code == 0 and "probes: 9 of 9 probes" in err
    assert {line.partition(":")[0] for line in err.splitlines()} <= {"features", "raw pixels", "probes"}
    path = folder / "results" / "digits-classes-0-2-limit-30.json"
    assert out == path.read_text()
    results = Results.load(path)
    assert (
        results.command
        == "concat-ensemble probe pair --dataset digits --classes 0-2 --limit 30 --baseline one --save-head --json"
    )
    assert [row.name for row in results.rows][-4:] == ["one", "untrained members", "raw pixels", "majority class"]
    assert (
        results.dataset["classes"] == [0, 1, 2]
        and results.dataset["test_images"] == 30
        and not results.dataset["on_hub"]
    )
    table = extract_features(ensemble, digits, quiet=True)
    expected = LinearProbe().fit(table["train"], validation=table["validation"]).score(table["test"])
    assert results["pair"].mean == pytest.approx(expected)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert torch.equal(model.members["0"].conv1[0].weight, ensemble.members["0"].conv1[0].weight)
    assert results.protocol in (folder / "README.md").read_text()
    assert (folder / "figures" / "digits-classes-0-2-limit-30.png").is_file()


def test_probe_prints_a_table_and_is_not_done_twice(run, folder):
    code, out, err = run("probe", "pair", *DIGITS)
    assert code == 0 and "\nprobes: 8 of 8 probes in " in err  # a line for each stage where there is no terminal
    assert (
        "raw pixels" in out
        and "majority class" in out
        and "results: pair/results/digits-classes-0-2-limit-30.json" in out
    )
    path = folder / "results" / "digits-classes-0-2-limit-30.json"
    written = path.stat().st_mtime_ns
    code, again, err = run("probe", "pair", *DIGITS)
    assert code == 0 and again == out and path.stat().st_mtime_ns == written
    said = "pair/results/digits-classes-0-2-limit-30.json is there already; --overwrite probes again."
    assert " ".join(err.split()) == said
    code, out, err = run("probe", "pair", *DIGITS, "--json", "--quiet")
    assert code == 0 and err == "" and json.loads(out)["ensemble"] == "pair"
    assert run("probe", "pair", *DIGITS, "--overwrite", "-q")[0] == 0 and path.stat().st_mtime_ns > written


def test_probe_takes_what_build_takes(run, tmp_path):
    code, out, _ = run("probe", "random:test_resnet", *DIGITS, "--output", "found/x.json")
    assert code == 0 and "untrained members" in out
    assert Results.load(tmp_path / "found" / "x.json")["random:test_resnet"].num_features == 96
    assert [path.name for path in tmp_path.iterdir()] == ["found"], "no folder to write a card into"


def test_results_asked_for_on_other_terms_are_not_passed_off_as_these(run, refused, folder, tmp_path, backbone):
    run("probe", "pair", *DIGITS, "--output", "x.json")
    for other in (["--seed", "1"], ["--test-size", "0.3"], ["--label-column", "label"]):
        refused(
            ["probe", "pair", *DIGITS, "--output", "x.json", *other],
            "x.json holds the results of other",
            "--overwrite",
            "--output",
        )
    assemble([backbone(7), backbone(8)]).save_pretrained(tmp_path / "others")
    refused(["probe", "others", *DIGITS, "--output", "x.json"], "x.json holds the results of other", "--overwrite")


def test_repeats_draw_the_images_anew_and_are_kept_as_one(run, folder, refused):
    few = ["--dataset", "digits", "--classes", "0-2", "--shots", "4", "--limit", "30"]
    code, _, err = run("probe", "pair", *few, "--repeats", "3", "--seed", "7")
    assert code == 0 and "repeat 3 of 3" in err
    results = Results.load(folder / "results/digits-classes-0-2-limit-30-shots-4.json")
    assert [[run.seed for run in row.runs] for row in results.rows] == [[7, 8, 9]] * len(results.rows)
    assert len({run.correct for run in results["pair"].runs}) == 3
    alone = run("probe", "pair", *few, "--seed", "8", "--output", "alone.json", "--json", "-q")[1]
    for row in json.loads(alone)["rows"]:  # a repeat is what a probe with its seed gives
        if row["name"] != "untrained members":  # which have the seed of the first repeat
            assert row["runs"][0]["metrics"] == results[row["name"]].runs[1].metrics
    assert "mean over 3 repeats" in (folder / "README.md").read_text()
    assert run("verify", "pair")[0] == 0
    refused(["probe", "pair", *few, "--seed", "7"], "lacks a repeat", "--overwrite")


def test_repeats_that_would_draw_nothing_are_refused(run, folder, datasets, refused, tmp_path):
    load_data("digits", classes=range(3), limit=30).save_to_disk(tmp_path / "split")
    words = ["probe", "pair", "--dataset", "split", "--repeats", "2", "-q"]
    refused(words, "--repeats 2 would measure the same images each time", "--limit or --shots")
    assert run(*words, "--limit", "20")[0] == 0


def test_a_second_probe_with_another_baseline_has_it_in_the_table(run, folder, one):
    run("probe", "pair", *DIGITS, "--output", "x.json")
    code, _, err = run("probe", "pair", *DIGITS, "--output", "x.json", "--baseline", "one")
    assert (code == 2 and "--overwrite" in err) or "one" in Results.load(Path("x.json"))


def test_a_second_probe_that_is_to_save_the_head_saves_it(run, folder):
    run("probe", "pair", *DIGITS)
    code, out, err = run("probe", "pair", *DIGITS, "--save-head")
    assert code == 2 or "classification head: pair/head.safetensors\n" in out
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert (code == 2 and "--overwrite" in err) or architecture == "ConcatEnsembleForImageClassification"


def test_baselines_of_one_name_are_kept_apart_or_refused(run, folder, tmp_path, backbone):
    for place in ("a", "b"):
        assemble([backbone(5)]).save_pretrained(tmp_path / place / "cat1")
    code, _, err = run("probe", "pair", *DIGITS, "--output", "x.json", "--baseline", "a/cat1", "--baseline", "b/cat1")
    assert (code == 2 and "cat1" in err) or len(
        [row for row in Results.load(Path("x.json")).rows if row.kind == "baseline"]
    ) == 2


AB = ["a", "b"] * 20


@pytest.fixture
def datasets(tmp_path, images):
    """Datasets with one fault each, on disk."""
    good = images(AB)
    good.save_to_disk(tmp_path / "good")
    images(["a"] * 40).save_to_disk(tmp_path / "one-class")
    (tmp_path / "empty").mkdir()
    for kind, split in {"train": good, "test": good.select([])}.items():
        split.to_parquet(tmp_path / "empty" / f"{kind}.parquet")
    for kind in ("text", "dot", "nan"):
        for label in "ab":
            (tmp_path / kind / label).mkdir(parents=True)
            for n in range(10):
                PILImage.fromarray(np.full((8, 8), 10 * n, np.float32)).save(tmp_path / kind / label / f"{n}.tiff")
    (tmp_path / "text" / "a" / "3.png").write_text("only text")
    PILImage.new("L", (1, 1)).save(tmp_path / "dot" / "a" / "dot.png")
    PILImage.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan" / "b" / "nan.tiff")
    Dataset.from_dict({"image": [str(tmp_path / "text/a/3.png")] * 4, "label": [0.5] * 4}).cast_column(
        "image", Image()
    ).save_to_disk(tmp_path / "floats")


BAD_PROBES = {
    "missing label column": (
        ["--dataset", "good", "--label-column", "breed"],
        ["no column 'breed'", "it has image, label"],
    ),
    "missing image column": (
        ["--dataset", "good", "--image-column", "photo"],
        ["no column 'photo'", "it has image, label"],
    ),
    "one column for both": (["--dataset", "good", "--image-column", "label"], ["label"]),
    "missing split": (
        ["--dataset", "good", "--test-split", "holdout"],
        ["--test-split holdout does not exist", "the dataset has train"],
    ),
    "slice beyond the end": (["--dataset", "good", "--train-split", "train[900:]"], ["train"]),
    "empty split": (
        ["--dataset", "good", "--train-split", "train[:0]"],
        ["the train split is empty", "--train-split"],
    ),
    "empty test split": (["--dataset", "empty"], ["'empty'", "no data"]),
    "one class": (["--dataset", "one-class"], ["the one class 'a'; a probe needs two"]),
    "one class kept": (["--dataset", "digits", "--classes", "3"], ["the one class '3'; a probe needs two"]),
    "unknown class": (["--dataset", "digits", "--classes", "3,eleven"], ["--classes eleven", "the dataset has 10"]),
    "classes backwards": (["--dataset", "digits", "--classes", "9-5"], ["9-5"]),
    "float labels": (["--dataset", "floats"], ["class names or whole numbers"]),
    "text file named .png": (["--dataset", "text"], ["3.png", "remove or repair it"]),
    "text file named .png, by a worker": (["--dataset", "text", "--workers", "1"], ["3.png", "remove or repair it"]),
    "1x1 image": (["--dataset", "dot"], ["dot.png", "1x1", "remove it"]),
    "NaN pixels": (["--dataset", "nan"], ["nan.tiff", "NaN", "remove or repair it"]),
    "unknown dataset": (["--dataset", "nonesuch"], ["no dataset 'nonesuch'", "digits"]),
    "missing folder": (["--dataset", "imagefolder:nonesuch"], ["imagefolder:nonesuch"]),
    "no images": ([*DIGITS, "--limit", "0"], ["--limit 0 must be at least 1"]),
    "fewer than no images": ([*DIGITS, "--limit", "-5"], ["--limit -5"]),
    "share that is none": ([*DIGITS, "--test-size", "50"], ["--test-size 50 must be", "between 0 and 1"]),
    "output that is a folder": ([*DIGITS, "--output", "good"], ["good is a folder; name a results file"]),
    "output that cannot be written": ([*DIGITS, "--output", "/proc/nonesuch/x.json"], ["/proc", "--output"]),
    "missing baseline": ([*DIGITS, "--baseline", "nonesuch"], ["nonesuch"]),
    "baseline that is no model": ([*DIGITS, "--baseline", "good"], ["good"]),
    "results file of something else": (
        [*DIGITS, "--output", "good/state.json"],
        ["state.json is not a results file", "--overwrite"],
    ),
}


@pytest.mark.parametrize("case", BAD_PROBES)
def test_probe_refuses(case, folder, datasets, refused):
    words, said = BAD_PROBES[case]
    refused(["probe", "pair", *words], *said)


@pytest.mark.parametrize("model", ["nonesuch", "good", "none/such", "resnet9000"])
def test_probe_refuses_a_model_that_is_none(model, datasets, refused):
    refused(["probe", model, *DIGITS], model)


def test_a_head_without_a_folder_is_refused_before_the_work(refused):
    refused(
        ["probe", "random:test_vit", *DIGITS, "--save-head", "--output", "x.json"], "--save-head", "random:test_vit"
    )


def test_an_ensemble_that_gives_nan_is_named(folder, refused):
    weights = {
        key: tensor * float("nan")
        for key, tensor in assemble([folder]).state_dict().items()
        if key.startswith("members.1.")
    }
    save_file(weights, folder / "member-01.safetensors", metadata={"format": "pt"})
    refused(["probe", "pair", *DIGITS], "member 1 gives NaN or infinite features for image 0 of the train split")


@pytest.fixture
def photos(images, bad_images, tmp_path):
    """Class folders with three files that are no images."""
    for row, (label, encoded) in enumerate(zip("ab" * 15, images(["a", "b"] * 15)["image"], strict=True)):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        encoded.save(tmp_path / "photos" / label / f"{row:02}.png")
    for row, name in {4: "cut.jpg", 7: "text.png", 11: "empty.png"}.items():
        path = tmp_path / "photos" / "ab"[row % 2] / f"{row:02}.png"
        path.write_bytes(bad_images[name]["bytes"])
    return tmp_path / "photos"


def test_probe_names_all_bad_images_or_goes_on_without_them(run, folder, photos):
    words = ["probe", "pair", "--dataset", "imagefolder:photos", "--output", "probe.json"]
    code, out, err = run(*words)
    error = err.splitlines()[-1]
    assert code == 2 and out == "" and error.startswith("error: 3 of 30 images cannot be used: ")
    assert all(name in error for name in ("a/04.png", "b/07.png", "b/11.png", "--skip-bad"))
    code, out, err = run(*words, "--skip-bad")
    assert code == 0 and "raw pixels" in out, err
    runs = [row.runs[0] for row in Results.load(folder.parent / "probe.json").rows]
    assert {each.n_train + each.n_test for each in runs} == {27}, "all rows are of the same images"


def test_a_shard_cut_short_is_named(folder, refused):
    os.truncate(folder / "member-01.safetensors", 3000)
    refused(
        ["probe", "pair", *DIGITS], "member-01.safetensors is not a whole safetensors file", "fetch or save it again"
    )


def interrupted(place) -> tuple[int, str]:
    """Exit code and output of a probe that gets a Ctrl-C once its progress bar, which is there on a terminal alone,
    shows that images are being read.
    """
    terminal, side = pty.openpty()
    words = [PROGRAM, "probe", "pair", "--dataset", "scattered:digits", "--batch-size", "1"]
    environment = ONE_THREAD | {"TERM": "xterm", "HF_ASSETS_CACHE": str(place.parent / f"{place.name}-features")}
    # Where the tests run in the background, a shell has them ignore Ctrl-C, and what they start would inherit that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    program = subprocess.Popen(words, cwd=place, env=environment, stdout=side, stderr=side, preexec_fn=heeding)
    os.close(side)
    shown = b""
    try:
        while b"features" not in shown:
            shown += os.read(terminal, 4096)
        program.send_signal(signal.SIGINT)
        while more := os.read(terminal, 4096):
            shown += more
    except OSError:  # how Linux says that the other side has closed
        pass
    try:
        return program.wait(30), shown.decode()
    finally:
        program.kill()
        os.close(terminal)


def test_ctrl_c_ends_with_130_and_nothing_written(folder, tmp_path, contents):
    place = tmp_path / "place"
    shutil.copytree(folder, place / "pair")
    before = contents(place)
    code, shown = interrupted(place)
    assert code == 130, shown
    assert "Traceback" not in shown and "stopped; the same command goes on: features that were extracted" in shown
    assert contents(place) == before


# --- card ------------------------------------------------------------------------------------------------------------


def test_card_is_written_anew(run, folder):
    code, out, err = run("card", "pair", "--title", "me/pair")
    assert (code, out, err) == (0, "pair/README.md\n", "")
    assert "# me/pair\n" in (folder / "README.md").read_text()


def test_card_refuses(folder, refused, study, tmp_path):
    refused(["card", "nonesuch"], "no such folder: nonesuch")
    study(pair=[0.5]).save(folder / "results" / "old.json")
    refused(["card", "pair"], "old.json was measured on other weights", "--overwrite")
    (folder / "results" / "old.json").write_text("{")
    refused(["card", "pair"], "old.json is not a results file", "--overwrite")


def test_card_check_and_index(run, folder, refused, study, ensemble):
    hashes = [member["provenance"]["weights_sha256"] for member in ensemble.config.members]
    refused(["card", ".", "--index"], "no ensemble with results")
    study(None, hashes, pair=[0.5, 0.6]).save(folder / "results" / "digits.json")
    refused(["card", "pair", "--check"], "digits.png is not there")
    assert run("card", "pair")[0] == run("card", "pair", "--check")[0] == run("card", ".", "--index")[0] == 0
    assert run("card", ".", "--index", "--check")[0] == 0
    index = (folder.parent / "README.md").read_text()
    assert (
        "| [pair](pair/README.md) | digits, classes 5, 6, 100 test images | 55.0 [" in index
        and "`timecat-cat4`" in index
    )
    study(None, hashes, pair=[0.5, 0.7]).save(folder / "results" / "digits.json")
    refused(["card", "pair", "--check"], "README.md, line ", "where config and results give")
    refused(["card", ".", "--index", "--check"], "README.md, line ")


def test_verify_probes_again(run, folder, refused, monkeypatch):
    few = ["--dataset", "digits", "--classes", "0-2", "--limit", "60", "--controls", "none", "--quiet"]
    assert run("probe", "pair", *few)[0] == 0
    code, out, _ = run("verify", "pair", "--json")
    found = {check["name"]: check for check in json.loads(out)}
    assert code == 0 and {"pair", "pair, member 0 alone", "pair, PCA to 16"} <= set(found)
    assert all(check["holds"] and check["again"] == check["card"] for check in found.values())
    (path,) = (folder / "results").glob("*.json")
    results = Results.load(path)
    low = results["pair"].runs[0].metrics["top1"] / 4
    results["pair"].runs[0].metrics["top1"] = low  # nobody measured that
    results.save(path)
    refused(["verify", "pair"], "README.md, line ")
    run("card", "pair")
    code, _, err = run("verify", "pair")
    assert code == 2 and f"1 of {len(found)} numbers are not confirmed: pair on digits" in err
    refused(["verify", "no-such-ensemble"], "no such folder: no-such-ensemble")
    refused(["verify", "me/none"], "me/none is neither a folder nor on the Hub")


def test_what_writes_a_file_says_so_as_json(run, folder, study, ensemble, tmp_path):
    def told(*words):
        code, text, _ = run(*words, "--json")
        assert code == 0
        return json.loads(text)

    built = told("build", "random:test_resnet", "--output", "built")
    assert built["folder"] == "built" and [member["num_features"] for member in built["members"]] == [
        built["num_features"]
    ]
    study(None, [member["provenance"]["weights_sha256"] for member in ensemble.config.members], pair=[0.5]).save(
        folder / "results" / "x.json"
    )
    assert told("card", "pair") == {"file": "pair/README.md"}
    assert told("report", "pair") == {"file": "report.html", "bytes": (tmp_path / "report.html").stat().st_size}
    program = told("export", "built", "--output", "built.pt2")
    assert program == {"file": "built.pt2", "bytes": (tmp_path / "built.pt2").stat().st_size}
