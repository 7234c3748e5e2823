"""A tiny ensemble to be tampered with, and a world around it that must stay as it is."""

# ruff: noqa: E402 (the environment comes before the imports that read it)

import atexit
import os
import resource
import shutil
import sys
import tempfile
import time

# Before anything of Hugging Face is imported: no network, and no traces in the user's own cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="concat-ensemble-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import timm
import torch

from concat_ensemble import assemble
from concat_ensemble.commands.app import main
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import Results, Row, Run

torch.set_num_threads(1)
MODEL_ARGS = {"in_chans": 1, "channels": (8, 8, 16, 16), "stem_width": 8}


def contents(folder):
    """Every file below and its bytes, links by where they point to."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def backbone():
    sees = {"input_size": (1, 32, 32), "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)}
    torch.manual_seed(0)  # the card shows a digest of the weights, and tests look for other digits in it
    return timm.create_model("resnet10t", pretrained_cfg_overlay=sees, num_classes=0, **MODEL_ARGS).eval()


@pytest.fixture(scope="session")
def made(backbone, tmp_path_factory):
    """An ensemble of two members with one results file, saved; no test changes it."""
    path, model = tmp_path_factory.mktemp("made"), assemble([backbone, backbone])
    model.save_pretrained(path)
    rows = [
        Row(n, kind, 32, 2, runs=[Run(0, {"top1": 0.5}, 0.1, 10, 10)])
        for n, kind in (("pair", "ensemble"), ("raw pixels", "control"))
    ]
    Results("pair", {"name": "digits"}, {}, rows, members_sha256(model.config)).save(path / "results/digits.json")
    return path


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder to attack from, which is where the process stands; `canary`, which running code would make; and
    `outside`, with something precious. Afterwards both are as before, and no attack took much memory or time.
    """
    world = tmp_path / "world"
    world.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious.txt").write_text("mine")
    monkeypatch.chdir(world)
    before = {path: contents(path) for path in (tmp_path / "outside",)}
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield world
    assert not (tmp_path / "canary").exists(), "it was executed"
    assert {path: contents(path) for path in before} == before, "something was written outside"
    assert {path.name for path in tmp_path.iterdir()} == {"world", "outside"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1e6, "it took a gigabyte"
    assert time.process_time() - started < 15, "it took long"


@pytest.fixture
def folder(made, world):
    """A copy of the ensemble, to be changed at will."""
    return shutil.copytree(made, world / "pair")


@pytest.fixture
def refused(monkeypatch, capsys, world):
    """A command that must exit with 2, say one line with `said` on stderr, and leave every file as it was."""

    def refused(*words, said):
        before = contents(world)
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
        assert said in err, err
        assert contents(world) == before, "something was written"

    return refused


def pytest_terminal_summary(terminalreporter):
    """How many inputs the fuzz tried, of each kind."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, ())]
    for report in reports:
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "inputs":
                terminalreporter.write_line(f"fuzz: {text}")
