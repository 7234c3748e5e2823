"""The script, launched as a user would, for a few steps; and the functions behind it."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Features, Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleForImageClassification, load_data
from concat_ensemble.training.planning import plan_jobs, plan_networks
from concat_ensemble.training.pretraining import main
from concat_ensemble.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
KILLS = 20
SCRIPT = "training/pretrain_members.py"
RECIPE = "training/recipes/scattered_digits_timecat.yaml"
SMOKE = [SCRIPT, RECIPE, "--smoke", "--cpu", "--members", "[1, 2]", "--snapshots", "2"]
# Steps: 16 in all, an eighth more for CAT1, four for W2; a snapshot's are those since the one before.
MEMBERS = {"cat1-0": 18, "cat2-0": 8, "cat2-1": 8, "w2-0": 4, "cat2-s-0": 11, "cat2-s-1": 5}


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script(*launch, *SMOKE, "--output", folder)
    return folder


def run(_script: str, recipe: str, *words) -> None:
    """Run a command of the script in this process, which saves the seconds that imports take."""
    main([str(ROOT / recipe), *map(str, words)])


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def hashes(folder) -> dict[str, list[str]]:
    """The sha256 of every member's weights, by ensemble."""
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("cat1", "cat2", "w2")}
    return {name: [m["provenance"]["weights_sha256"] for m in config["members"]] for name, config in configs.items()}


def written(folder) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_members_have_timms_layout_and_load_in_timm(trained):
    assert {path.name for path in (trained / "members").iterdir()} == set(MEMBERS)
    for name, steps in MEMBERS.items():
        folder = trained / "members" / name
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == "resnet10t" and config["label_names"] == ["0", "1", "2", "3", "4"]
        assert config["pretrained_cfg"]["input_size"] == [1, 32, 32] and config["pretrained_cfg"]["mean"] == [0.5]
        assert config["provenance"]["steps"] == steps and config["provenance"]["recipe"]["total_steps"] == 16
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        seen = 16 if name == "cat2-s-1" else steps  # the second one goes on from the first
        assert model.num_classes == 5 and model.bn1.num_batches_tracked == seen, "one for each step"
        compute = config["provenance"]["compute"]
        assert compute["images"] == 16 * steps and compute["processes"] == 1 and compute["gflops"] > 0


def test_ensembles_load_with_automodel_and_have_these_members(trained):
    for name, count, width in (("cat1", 1, 64), ("cat2", 2, 128), ("w2", 1, 128), ("cat2-s", 2, 128)):
        model = AutoModel.from_pretrained(trained / name)
        assert len(model.members) == count and model.config.num_features == width
        for k, member in model.members.items():
            weights = load_file(trained / "members" / f"{name}-{k}" / "model.safetensors")
            assert all(torch.equal(tensor, weights[key]) for key, tensor in member.state_dict().items())
            assert model.config.members[int(k)]["preprocessing"]["input_size"] == [1, 32, 32]


def test_every_network_has_its_own_seed_and_weights(trained):
    assert len({digest for group in hashes(trained).values() for digest in group}) == 4
    provenances = [
        json.loads((trained / "members" / name / "config.json").read_text())["provenance"] for name in MEMBERS
    ]
    assert len({provenance["seed"] for provenance in provenances}) == 5, "snapshots come from one run"
    assert {p["pretraining_data"] for p in provenances} == {"digits, classes 0, 1, 2, 3, 4 (scattered)"}
    assert all(p["command"].startswith("accelerate launch training/pretrain_members.py") for p in provenances)


def test_a_second_run_trains_what_is_missing_and_leaves_the_rest(copied, capsys):
    """One member is lost, another was killed while it was saved; the ensemble cat1 has a head by now."""
    before = hashes(copied)
    shutil.rmtree(copied / "members" / "cat2-1")
    (copied / "members" / ".cat2-1.tmp").mkdir()
    (copied / "members" / ".cat2-1.tmp" / "model.safetensors").write_bytes(b"half")
    config = AutoModel.from_pretrained(copied / "cat1").config
    config.num_labels = 3
    ConcatEnsembleForImageClassification(config).save_pretrained(copied / "cat1")
    untouched = {
        name: content
        for name, content in written(copied).items()
        if not name.startswith(("members/.cat2-1", "cat2/", "logs/cat2"))
    }
    run(*SMOKE, "--output", copied)
    printed = capsys.readouterr().out
    assert printed.count("is finished, skipped") == 5 and "cat2-1 is finished" not in printed
    assert hashes(copied) == before, "the lost member is trained again, to the same weights"
    assert not (copied / "members" / ".cat2-1.tmp").exists()
    after = written(copied)
    assert [name for name, content in untouched.items() if after.get(name) != content] == []
    assert (
        type(AutoModelForImageClassification.from_pretrained(copied / "cat1")).__name__
        == "ConcatEnsembleForImageClassification"
    )


def test_the_folder_of_another_recipe_is_refused(trained, capsys):
    """The message says what differs, and nothing is written."""
    before = written(trained)
    with pytest.raises(SystemExit) as stop:
        main(
            [str(Path(__file__).parents[2] / RECIPE), *SMOKE[2:], "--output", str(trained), "--learning-rate", "0.01"]
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert (
        "cat1-0 is of another training: its learning_rate is 0.002, here 0.01" in err and "name another output=" in err
    )
    assert written(trained) == before


def test_other_labels_are_refused(trained, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                str(Path(__file__).parents[2] / RECIPE),
                *SMOKE[2:],
                "--output",
                str(trained),
                "--classes",
                "[5, 6, 7, 8, 9]",
            ]
        )
    assert "is of another training: its " in capsys.readouterr().err


def test_another_ensemble_leaves_the_others(copied, capsys):
    """Seeds do not depend on which other ensembles are trained."""
    run(*SMOKE[:4], "--members", "[1, 2, 3]", "--snapshots", "0", "--output", copied)
    printed = capsys.readouterr().out
    assert printed.count("is finished, skipped") == 4 and (copied / "members" / "cat3-2").is_dir()


KILLED = [
    SCRIPT,
    RECIPE,
    "--cpu",
    "--members",
    "[2]",
    "--snapshots",
    "2",
    "--wide-steps",
    "0",
    "--total-steps",
    "240",
    "--batch-size",
    "16",
    "--checkpoint-every",
    "10",
]
# `datasets` waits 5 seconds after each epoch of a stream; the script, as a user starts it, without that.
WITHOUT_PAUSES = [
    "-c",
    "import datasets; datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0\n"
    "from concat_ensemble.training.pretraining import main; main()",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(*KILLED, "--output", folder)
    return members_in(folder)


def members_in(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("members/*/model.safetensors"))}


def killed_until_done(
    folder: Path, seed: int, kills: int, within: float = 3, command: Sequence[str] = tuple(KILLED)
) -> list[int]:
    """Run until it is done, killed `kills` times after up to `within` seconds; the signals that arrived in time."""
    rng, hits, started = random.Random(seed), [], 0
    while True:
        process = subprocess.Popen(
            [sys.executable, *command, "--output", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if started < kills:
            # The first seconds are imports: begin where something can be lost.
            while (
                process.poll() is None
                and not list(folder.glob("checkpoints/*"))
                and not list(folder.glob("members/*"))
            ):
                time.sleep(0.05)
            time.sleep(rng.uniform(0, within))
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            process.send_signal(number)
            started += 1
        _, errors = process.communicate(timeout=900)  # long, for a busy machine
        if process.returncode == 0:
            return hits
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM), errors
        hits.append(process.returncode)


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_weights(undisturbed, tmp_path):
    hits = []
    for seed in itertools.count():
        folder = tmp_path / str(seed)
        hits += killed_until_done(folder, seed, kills=4)
        assert members_in(folder) == undisturbed
        assert not list(folder.rglob("*step-*")) and not list(folder.rglob(".*")), (
            "no checkpoint is left, whole or half"
        )
        if len(hits) >= 20:
            break
    assert {-signal.SIGKILL, 128 + signal.SIGTERM} <= set(hits)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_of_a_stream_end_in_the_same_weights(workers, tmp_path, monkeypatch):
    """From two files, over several epochs, in two parts a step."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    columns = Features(image=Image(), label=ClassLabel(names=list("0123456789")))
    split = load_data("digits")["train"].cast(columns)
    for number in range(2):
        split.select(range(350 * number, 350 * number + 350)).to_parquet(tmp_path / f"train-{number}.parquet")
    stream = ["--dataset", f"parquet:{tmp_path}", "--streaming", "true", "--classes", "null", "--test-size", "null"]
    stream += ["--augmentation", "timm", "--num-workers", str(workers), "--gradient-accumulation", "2"]
    stream += ["--total-steps", "160", "--snapshots", "0"]
    run(*KILLED, *stream, "--output", tmp_path / "whole")
    whole, hits = members_in(tmp_path / "whole"), []
    for seed in itertools.count():
        folder = tmp_path / str(seed)
        hits += killed_until_done(
            folder, seed, kills=KILLS // 4, within=2, command=[*WITHOUT_PAUSES, *KILLED[1:], *stream]
        )
        assert members_in(folder) == whole and not list(folder.rglob("*step-*"))
        if len(hits) >= KILLS:
            break


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_in_the_same_weights(undisturbed, tmp_path):
    assert killed_until_done(tmp_path, seed=0, kills=2, within=0.5), (
        "where the machine is free, the run is over in seconds"
    )
    assert members_in(tmp_path) == undisturbed


def test_a_full_disk_leaves_the_last_checkpoint_intact(undisturbed, tmp_path, capsys):
    """On a file system that takes two checkpoints, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        command = [*KILLED, "--keep-checkpoints", "9", "--output", disk]
        with pytest.raises(SystemExit) as stop:
            run(*command)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.splitlines()[-1].startswith("error: cannot write a checkpoint into"), (
            error
        )
        assert "is there and intact" in error and not list(disk.rglob(".aside"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        run(*command)
        assert members_in(disk) == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_accelerate_launch_gives_the_same_weights(trained, tmp_path):
    run(*SMOKE, "--output", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(trained)


def load_recipe(**changes) -> Recipe:
    return Recipe(**yaml.safe_load(Path(__file__).parents[2].joinpath(RECIPE).read_text()) | changes)


def plan(**changes):
    return plan_networks(load_recipe(**changes))


def test_the_plan_spends_equal_steps():
    networks = plan()
    assert [(network.folders[0], network.steps) for network in networks] == [
        ("members/cat1-0", 1800),
        ("members/cat2-0", 800),
        ("members/cat2-1", 800),
        *[(f"members/cat4-{k}", 400) for k in range(4)],
        *[(f"members/cat5-{k}", 320) for k in range(5)],
        ("members/w2-0", 400),
        ("members/cat4-s-0", 1600),
    ]
    assert networks[-2].model_args == {"in_chans": 1, "channels": [16, 32, 64, 128], "stem_width": 16}
    assert networks[-1].folders == [f"members/cat4-s-{k}" for k in range(4)]
    assert len({network.seed for network in networks}) == len(networks)


def test_seeds_can_be_named():
    networks = plan(members=[2], seeds=[550, 23], wide_steps=0, snapshots=0)
    assert [network.seed for network in networks] == [550, 23]


def test_networks_of_one_kind_go_together():
    jobs = plan_jobs(load_recipe(members=[1, 5], members_per_process=2, wide_steps=0, snapshots=0))
    assert [[network.number for network in job] for job in jobs] == [[0], [0, 1], [2, 3], [4]]


def test_runs_of_two_seeds_share_no_seed():
    assert not {n.seed for n in plan(seed=0)} & {n.seed for n in plan(seed=1)}
    assert [n.seed for n in plan(seed=1)] == [n.seed for n in plan(seed=1)]


def test_no_wide_network_without_wide_steps():
    assert [network.name for network in plan(wide_steps=0, snapshots=0, members=[2])] == ["cat2", "cat2"]


# Arguments after the recipe, and what the one line on stderr must contain. In-process, since imports take seconds.
BAD = {
    "unknown field in the file": (["{typo}"], ["typo.yaml", "no field 'leraning_rate'; did you mean learning_rate?"]),
    "wrong type on the command line": (["--total-steps", "many"], ["total_steps='many' must be int"]),
    "broken YAML on the command line": (["--members", "[1, 2"], ["--members"]),
    "missing recipe": (["{none}"], ["none.yaml"]),
    "unknown architecture": (["--architecture", "resnet9000"], ["resnet9000"]),
    "unknown argument of the architecture": (["--model-args", "{in_chans: 1, colour: red}"], ["colour"]),
    "architecture for other channels": (["--model-args", "{channels: [8, 8, 8, 8]}"], ["channels"]),
    "unknown dataset": (["--dataset", "nonesuch"], ["no dataset 'nonesuch'"]),
    "unknown class": (["--classes", "[0, 11]"], ["classes=[11]"]),
    "one class": (["--classes", "[3]"], ["one class '3'"]),
    "unknown optimizer": (["--optimizer", "adamv"], ["optimizer='adamv' must be ", "did you mean adam"]),
    "unknown augmentation policy": (["--auto-augment", "rnd-m9"], ["auto_augment='rnd-m9' must be a policy of timm"]),
    "more snapshots than steps": (
        ["--snapshots", "9999"],
        ["snapshots=9999 must be 0, or from 2 to total_steps=1600"],
    ),
    "batches that cannot be shared": (["--gradient-accumulation", "3"], ["batch_size=16", "gradient_accumulation=3"]),
    "output that is a file": (["--output", "{file}"], ["file", "name a folder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_run_ends_with_2_and_one_line(case, tmp_path, capsys):
    words, expected = BAD[case]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "typo.yaml").write_text("leraning_rate: 1\n")
    places = {"{file}": tmp_path / "file", "{typo}": tmp_path / "typo.yaml", "{none}": tmp_path / "none.yaml"}
    words = [str(places.get(word, word)) for word in words]
    recipe = [] if words[0].endswith(".yaml") else [str(Path(__file__).parents[2] / RECIPE)]
    output = [] if "--output" in words else ["--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        main([*recipe, *words, "--cpu", "--smoke", *output])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert all(text in err.splitlines()[-1] for text in expected), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "typo.yaml"], "something was written"
