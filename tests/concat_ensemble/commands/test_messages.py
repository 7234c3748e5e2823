"""What the commands say of mistakes that any of them may meet: folders, files, options and caches."""

from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _cache_assets

from concat_ensemble.commands.app import COMMANDS, describe_kept
from concat_ensemble.data.sources import load_digits
from concat_ensemble.experiments import desk
from concat_ensemble.files import read_yaml
from concat_ensemble.training.options import exit_on_error

DIGITS = ["--dataset", "digits", "--classes", "0-2", "--limit", "30"]
OF_A_FOLDER = {
    "build": ["build", "FOLDER", "--output", "new"],
    "probe": ["probe", "FOLDER", *DIGITS],
    "probe beside a baseline": ["probe", "pair", *DIGITS, "--baseline", "FOLDER"],
    "select": ["select", "FOLDER", *DIGITS],
    "compare": ["compare", "FOLDER", *DIGITS],
    "predict": ["predict", "FOLDER", "photo.png"],
    "card": ["card", "FOLDER"],
    "card of an index": ["card", "FOLDER", "--index"],
    "verify": ["verify", "FOLDER"],
    "report": ["report", "FOLDER"],
    "push": ["push", "FOLDER", "me/pair"],
    "export": ["export", "FOLDER", "--output", "x.onnx"],
}


@pytest.fixture
def photo(images, tmp_path):
    images(["a"])["image"][0].save(tmp_path / "photo.png")


@pytest.mark.parametrize("mistyped", ["nowhere", "./nowhere", "a/b/c"])
@pytest.mark.parametrize("command", OF_A_FOLDER)
def test_a_mistyped_folder_is_no_such_folder(command, mistyped, folder, photo, refused):
    words = [mistyped if word == "FOLDER" else word for word in OF_A_FOLDER[command]]
    refused(words, "no such folder: ", mistyped.removeprefix("./"))


@pytest.mark.parametrize("command", ["build", "probe", "card", "report", "push", "export", "predict", "verify"])
def test_a_folder_of_a_similar_name_is_suggested(command, folder, photo, refused):
    refused([{"FOLDER": "pairs"}.get(word, word) for word in OF_A_FOLDER[command]], "pairs; did you mean pair?")


def test_a_folder_that_reads_like_a_name_on_the_hub(refused):
    refused(["probe", "runs/nowhere", *DIGITS], "no such folder: runs/nowhere, and ", "hf-hub:runs/nowhere")


@pytest.mark.parametrize(
    ("mistyped", "similar"),
    [
        ("resnt18", "resnet18"),
        ("resnet18.a1_in1", "resnet18.a1_in1k"),
        ("vit_tiny_patch16_242", "vit_tiny_patch16_224"),
    ],
)
def test_a_mistyped_model_of_timm_still_suggests_a_similar_name(mistyped, similar, refused):
    refused(["probe", mistyped, *DIGITS], "did you mean ", similar)


def test_a_dataset_in_a_missing_folder(folder, refused):
    refused(["probe", "pair", "--dataset", "imagefolder:nowhere"], "no such folder: nowhere")
    Path("photo.png").write_bytes(b"")
    refused(["probe", "pair", "--dataset", "imagefolder:photo.png"], "photo.png is a file; name the folder")


def test_a_dataset_with_a_mistyped_name_may_be_a_folder_here(folder, tmp_path, refused):
    (tmp_path / "photos").mkdir()
    refused(["probe", "pair", "--dataset", "photo"], "no dataset 'photo'", "; did you mean photos?")


@pytest.mark.parametrize(
    "words",
    [
        ["power", "nowhere.json", "--difference", "2"],
        ["build", "resnet18=nowhere.pth", "--output", "new"],
        ["probe", "pair", "--dataset", "csv:nowhere.csv"],
    ],
)
def test_a_missing_file_is_named_without_a_number(words, folder, run):
    code, out, err = run(*words)
    assert code == 2 and out == "" and "nowhere." in err and "Errno" not in err, err
    if words[0] == "power":
        assert err == "error: no such file: nowhere.json\n"


def test_scripts_name_missing_files_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit), exit_on_error():
        read_yaml(Path("nowhere.yaml"))
    assert capsys.readouterr().err == "error: no such file: nowhere.yaml\n"
    with pytest.raises(SystemExit):
        desk.run_script(lambda: read_yaml(Path("nowhere.yaml")))
    assert capsys.readouterr().err == "error: no such file: nowhere.yaml\n"


@pytest.mark.parametrize("command", ["probe", "select", "compare"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "error: --limit 0 must be at least 1."),
        (["--shots", "1"], "error: --shots 1 must be at least 2: some are for validation."),
        (["--test-size", "2"], "error: --test-size 2 must be a fraction between 0 and 1."),
        (["--classes", "9-5"], "error: --classes 9-5 runs backwards; write 5-9."),
        (["--recipe", "cifar10", "--label-column", "x"], "--recipe cifar10 does not go with --label-column; leave"),
    ],
)
def test_options_are_named_as_they_were_typed_before_anything_is_loaded(command, words, message, refused):
    refused([command, "nowhere", *words], message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe", "pair", *DIGITS, "--train-split", "train[900"], "--train-split 'train[900' is not a slice"),
        (["probe", "pair", *DIGITS, "--image-column", "label"], "--image-column and --label-column are both 'label'"),
        (["probe", "pair", *DIGITS, "--group-column", "label"], "--label-column and --group-column are both 'label'"),
        (
            ["probe", "pair", "--save-head", "--recipe", "dtd", "--recipe", "cifar10"],
            "--recipe does not go with --save-head",
        ),
        (["predict", "pair", "photo.png", "--split", "test"], "--split go with a dataset"),
        (["push", "pair", "me/pair", "--include", "notes"], "--include notes: no file in pair"),
        (["build", "pair", "--model-arg", "img_size=64", "--output", "new"], "--model-arg img_size=64 cannot be"),
        (["build", "random:test_vit", "--preprocessing", "x", "--output", "new"], "--preprocessing x must be"),
        (["select", "pair", *DIGITS, "--quick", "--output", "new"], "--quick only looks; leave it out, or --output"),
        (["mixture", "scattered_digits", "--steps", "1"], "--steps 1 must be at least"),
        (["reproduce", "figure-1", "--repeats", "1"], "--repeats"),
    ],
)
def test_messages_name_options(words, message, folder, photo, run):
    code, _, err = run(*words)
    assert code == 2 and message in " ".join(err.split()), err


def test_a_features_cache_that_cannot_be_written_names_its_variable(folder, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for module in (constants, _cache_assets):
        monkeypatch.setattr(module, "HF_ASSETS_CACHE", str(tmp_path / "file" / "assets"))
    for words in (["cache"], ["probe", "pair", *DIGITS, "--quiet"]):
        code, out, err = run(*words)
        assert code == 2 and out == ""
        assert err.startswith(f"error: features cannot be stored in {tmp_path / 'file' / 'assets'} (")
        assert "; set HF_ASSETS_CACHE to a folder that can be written." in err


def test_a_cache_of_datasets_that_cannot_be_written_names_its_variable(folder, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    load_digits().select(range(40)).to_parquet(tmp_path / "digits.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    code, _, err = run("probe", "pair", "--dataset", "digits.parquet")
    assert code == 2 and "; set HF_DATASETS_CACHE, or HF_HOME for all caches, to a folder" in err, err


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_ctrl_c_says_whether_the_same_command_goes_on_and_with_what(command):
    said = describe_kept([command, "pair", "--quiet"])
    assert said.startswith("begins again: " if command == "predict" else "goes on: ")
    assert ("features that were extracted are kept" in said) == (command in ("probe", "select", "compare", "verify"))
