"""What is made from absolute paths and published, cards, configs, results and exported files, names no folder of this
machine."""

import json
import os
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import concat_ensemble
from concat_ensemble import assemble
from concat_ensemble.commands.app import main
from concat_ensemble.commands.options import command_line
from concat_ensemble.data.options import DatasetOptions
from concat_ensemble.files import without_folders
from concat_ensemble.reporting.html_report import write_report
from concat_ensemble.studies.results import Results
from concat_ensemble.training import finetuning
from concat_ensemble.training.options import launch_command

SECRET = "clinic-of-doctor-x"


@pytest.fixture
def home(tmp_path_factory, monkeypatch, backbone):
    """A folder that nobody may learn of, with a checkpoint, images of two classes, and a place to write to."""
    home = tmp_path_factory.mktemp("user") / SECRET
    for split in ("train", "test"):
        for name, label in (("cat", 60), ("dog", 190)):
            (home / "photos" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.full((8, 8), label + 4 * number + (split == "test"), np.uint8)
                PIL.Image.fromarray(pixels).save(home / "photos" / split / name / f"{number}.png")
    save_file(backbone.state_dict(), home / "weights.safetensors")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    return home


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return printed.out

    return run


def contents(path: Path) -> bytes:
    """The bytes of a file, and those of the files in it if it is an archive."""
    if path.suffix != ".pt2":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def leaks(*folders: Path) -> list[str]:
    """Files that say where something lies on this machine: the folder of the user, or of the installed packages."""
    secrets = (
        SECRET.encode(),
        os.fsencode(Path(torch.__file__).parents[1]),
        os.fsencode(Path(concat_ensemble.__path__[0])),
    )
    files = [
        path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*")) if path.is_file()
    ]
    assert files
    return [f"{path.name}: {secret!r}" for path in files for secret in secrets if secret in contents(path)]


SMALL = ["--model-arg", "in_chans=1", "--model-arg", "channels=[8,8,16,16]", "--model-arg", "stem_width=8", "--quiet"]


def test_what_the_commands_write_names_no_folder(home, run):
    """Build, probe, card, index, report and export, all by absolute paths."""
    one = home / "made" / "one"
    run("build", f"resnet10t={home}/weights.safetensors", "-o", one, *SMALL)
    run("probe", one, "--dataset", f"imagefolder:{home}/photos", "--controls", "quick", "--errors", "1", "--quiet")
    run("card", one, "--quiet")
    run("card", home / "made", "--index", "--quiet")
    run("report", one, "--output", home / "made" / "report.html")
    run("export", one, "--output", home / "made" / "one.onnx", "--quiet")
    run("export", one, "--output", home / "made" / "one.pt2", "--quiet")
    assert leaks(home / "made") == []
    names = {path.name for path in (home / "made").rglob("*")}
    assert {
        "imagefolder-photos.json",
        "imagefolder-photos.png",
        "README.md",
        "one-imagefolder-photos-errors.html",
    } <= names
    card = (one / "README.md").read_text()
    assert "concat-ensemble build resnet10t=weights.safetensors -o one" in card
    assert "concat-ensemble probe one --dataset imagefolder:photos" in card
    study = Results.load(one / "results/imagefolder-photos.json")
    assert study.dataset["name"] == "imagefolder:photos" and study.ensemble == "one"


@pytest.mark.slow
def test_what_the_other_commands_write_names_no_folder(home, run):
    pair, photos = home / "made" / "pair", f"imagefolder:{home}/photos"
    run("build", f"resnet10t={home}/weights.safetensors", f"resnet10t={home}/weights.safetensors", "-o", pair, *SMALL)
    run("build", pair, "--output", home / "made" / "again", "--quiet")
    run("probe", pair, f"--dataset={photos}", "--baseline", home / "made" / "again", "--output", home / "other.json")
    run("select", pair, "--dataset", photos, "--output", home / "made" / "chosen", "--quiet")
    run("compare", pair, "--dataset", home / "photos", "--output", home / "made" / "overlap")
    run("export", pair, "--output", home / "made" / "pair.onnx", "--quiet")
    assert leaks(home / "made", home / "other.json") == []


def test_two_folders_of_one_name_are_two_datasets(home, run):
    """Results of the one are not taken for those of the other, though they record the same name."""
    shared = home / "made"
    run("build", "random:test_vit", "--output", shared, "--quiet")
    options = DatasetOptions(name=f"imagefolder:{home}/photos")
    run("probe", shared, "--dataset", options.name, "--controls", "none", "--quiet")
    recorded = json.loads((shared / "results/imagefolder-photos.json").read_text())["dataset"]
    assert options.is_recorded(recorded)
    for other in (f"imagefolder:{home.parent}/photos", "imagefolder:photos", f"imagefolder:{home}/other", "digits"):
        assert not DatasetOptions(name=other).is_recorded(recorded)
    assert not options.is_recorded(recorded | {"path_sha256": "0" * 8})


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/photos", "photos"),
        ("imagefolder:/home/me/photos/", "imagefolder:photos"),
        ("scattered:imagefolder:/home/me/my photos", "scattered:imagefolder:my photos"),
        ("resnet50=/home/me/x.pth", "resnet50=x.pth"),
        ("--output=/home/me/out", "--output=out"),
        ("parquet:/home/me/*.parquet", "parquet:*.parquet"),
        ("csv:/home/a,b/c.csv", "csv:c.csv"),
        ("~/photos/cats", "cats"),
        ("~you/photos", "photos"),
        ("//server/share/x", "x"),
        ("file:///home/me/x", "x"),
        ("zip://a.jpg::/home/me/x.zip", "zip://a.jpg::x.zip"),
        (r"C:\Users\me\photos", "photos"),
        (r"imagefolder:C:\Users\me\photos", "imagefolder:photos"),
        (r"\\server\share\x", "x"),
        ("C:/Users/me/photos", "photos"),
        ("[/home/me/a, '/home/me/b']", "[a, 'b']"),
        ("/home/me\n/photos", "photos"),
        ("/", ""),
        # no absolute path
        ("data/photos", "data/photos"),
        ("../photos", "../photos"),
        ("org/name@main", "org/name@main"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("https://host/a/b.parquet", "https://host/a/b.parquet"),
        ("parquet:https://host/a/b.parquet", "parquet:https://host/a/b.parquet"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
        ("train[:80%]", "train[:80%]"),
    ],
)
def test_what_may_be_published_of_an_argument(text, public, monkeypatch):
    assert without_folders(text) == public
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/concat-ensemble", "probe", text])
    assert shlex.split(command_line()) == ["concat-ensemble", "probe", public]
    monkeypatch.setattr(sys, "argv", [f"/home/{SECRET}/training/finetune.py", "recipe.yaml", text])
    assert shlex.split(launch_command()) == ["accelerate", "launch", "finetune.py", "recipe.yaml", public]


def test_the_report_tells_folders_apart_without_their_place(home, folder):
    content = (folder / "results/digits.json").read_text()
    for place in ("a/pair", "b/pair"):
        (home / place / "results").mkdir(parents=True)
        (home / place / "results/digits.json").write_text(content)
    folders = [home / "a/pair", home / "b/pair", Path(os.path.relpath(folder))]
    page = write_report(folders, home / "page.html")
    text = page.read_text()
    assert leaks(page) == [] and "a/pair: pair" in text and "b/pair: pair" in text


def test_what_a_training_records_names_no_folder(home, backbone, monkeypatch):
    recipe = home / "recipe.yaml"
    recipe.write_text((Path(__file__).parents[2] / "training/recipes/scattered_digits_finetune.yaml").read_text())
    assemble(backbone).save_pretrained(home / "single")
    words = [str(recipe), "--cpu", "--model", str(home / "single"), "--dataset", f"imagefolder:{home}/photos"]
    words += ["--output", str(home / "tuned"), "--stages", "one", "--steps", "2", "--batch-size", "4"]
    words += ["--augmentation", "none", "--classes", "null", "--limit", "null", "--evaluate-every", "0"]
    monkeypatch.setattr(sys, "argv", [f"{home}/training/finetune.py", *words])
    finetuning.main()
    made = home / "tuned" / "whole"
    assert {"config.json", "README.md", "training.json", "results"} <= {path.name for path in made.iterdir()}
    assert leaks(made) == []
    assert Results.load(made / "results/fine-tuned.json").dataset["name"] == "imagefolder:photos"
    finetuning.main()  # finished, and known again
    (home / "photos").rename(home.parent / "moved")
    monkeypatch.chdir(home.parent)
    (home.parent / "moved").rename(home.parent / "photos")
    finetuning.main([word.replace(f"imagefolder:{home}/photos", "imagefolder:photos") for word in words])
