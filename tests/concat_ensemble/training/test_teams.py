"""Several processes, launched as a user would: how many there are, and what they share."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from concat_ensemble.training import pretraining
from concat_ensemble.training.saving import check_processes
from concat_ensemble.training.sharing import Sharing, share_networks
from concat_ensemble.training.teams import FAILED, Team, _wait_for_teams, count_processes

ROOT = Path(__file__).parents[3]
ACCELERATE = Path(sys.executable).with_name("accelerate")
ONE_PROCESS = ["--mixed_precision", "no", "--dynamo_backend", "no"]
SMOKE = ["training/pretrain_members.py", "training/recipes/scattered_digits_timecat.yaml", "--smoke", "--cpu"]
SMOKE += ["--members", "[3]", "--snapshots", "0", "--wide-steps", "0"]


@pytest.fixture(scope="module")
def launched(script, tmp_path_factory):
    """`launched(processes, *arguments)`: launch a run; the output folder and the printed text."""

    def launched(processes: int, *words: str, launcher: tuple[str, ...] = ("--multi_gpu",)) -> tuple[Path, str]:
        output = tmp_path_factory.mktemp("launched")
        many = [
            ACCELERATE,
            "launch",
            *launcher,
            "--num_processes",
            processes,
            "--num_machines",
            1,
            "--main_process_port",
            0,
        ]
        return output, script(*many, *ONE_PROCESS, *SMOKE, *words, "--output", output)

    return launched


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    pretraining.main([str(ROOT / SMOKE[1]), *SMOKE[2:], "--output", str(output)])
    return output


def weights(output: Path) -> list[bytes]:
    return [(output / "members" / f"cat3-{k}" / "model.safetensors").read_bytes() for k in range(3)]


def configs(output: Path, count: int) -> list[Path]:
    return [output / "members" / f"cat{count}-{k}" / "config.json" for k in range(count)]


def read_compute(output: Path) -> list[dict]:
    return [json.loads(config.read_text())["provenance"]["compute"] for config in configs(output, 3)]


@pytest.mark.slow
def test_members_in_separate_teams_are_those_of_single_runs(launched, alone):
    output, printed = launched(2, "--parallelism", "members")
    assert "2 processes, 3 networks: 3 on teams of 2 x 1, parallelism=members" in printed
    assert weights(output) == weights(alone), "bit for bit"
    assert [compute["processes"] for compute in read_compute(output)] == [1, 1, 1], "each trained by one process"
    assert len(json.loads((output / "cat3" / "config.json").read_text())["members"]) == 3


def test_auto_trains_one_network_on_both_processes_and_then_two_apart(launched, alone):
    output, printed = launched(2, "--parallelism", "auto")
    assert "2 processes, 3 networks: 1 on all, then 2 on teams of 2 x 1, parallelism=auto" in printed
    assert [compute["processes"] for compute in read_compute(output)] == [2, 1, 1]
    images, images_alone = ([compute["images"] for compute in read_compute(run)] for run in (output, alone))
    assert images == images_alone
    shared, *apart = weights(output)
    assert apart == weights(alone)[1:], "bit for bit"
    assert shared != weights(alone)[0], "BatchNorm and augmentation see the batch in two parts"


@pytest.mark.slow
def test_data_trains_every_network_on_all_processes(launched):
    output, printed = launched(2, "--parallelism", "data")
    assert "2 processes, 3 networks: 3 on all, parallelism=data" in printed
    assert [compute["processes"] for compute in read_compute(output)] == [2, 2, 2]


@pytest.mark.slow
def test_three_processes_share_two_networks(launched):
    output, printed = launched(3, "--parallelism", "members", "--members", "[2]", "--batch-size", "16")
    assert "3 processes, 2 networks: 2 on teams of 2 + 1" in printed
    processes = [json.loads(path.read_text())["provenance"]["compute"]["processes"] for path in configs(output, 2)]
    assert processes == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_team_that_fails_ends_the_run_at_once(launcher, alone, tmp_path):
    """Network 1 is of another training, which only its own team finds out."""
    shutil.copytree(alone / "members" / "cat3-1", tmp_path / "members" / "cat3-1")
    state = tmp_path / "members" / "cat3-1" / "training.json"
    state.write_text(json.dumps({"identity": {"learning_rate": 7}}))
    launch = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2"]
    if launcher == "accelerate":
        launch = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", *ONE_PROCESS]
        launch += ["--main_process_port", "0"]
    words = [*launch, *SMOKE, "--parallelism", "members", "--total-steps", "90000", "--output", tmp_path]
    begun = time.monotonic()
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "is of another training" in done.stderr
    assert time.monotonic() - begun < 240, "the other team would train for an hour"


def test_the_main_process_does_not_wait_for_a_team_that_has_failed():
    store = distributed.HashStore()
    store.set("job 0 is done", "yes")
    _wait_for_teams(store, ["job 0 is done"])
    store.set(FAILED, "the loss is nan at step 7.")
    with pytest.raises(OSError, match="another team has failed: the loss is nan at step 7"):
        _wait_for_teams(store, ["job 0 is done", "job 1 is done"])


@pytest.mark.slow
def test_accelerates_own_cpu_option_gives_a_warning(tmp_path):
    launch = [ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", *ONE_PROCESS]
    done = subprocess.run(
        [*launch, *SMOKE, "--plan", "--output", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Hours on one device" in done.stdout
    assert re.search("warning: accelerate launch was asked for several processes.*--multi_gpu", done.stderr)
    assert not (tmp_path / "none").exists(), "a plan writes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["data", "members"])
def test_two_machines_on_loopback(parallelism, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank in range(2):
        launch = [
            ACCELERATE,
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "2",
            "--machine_rank",
            rank,
        ]
        launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, *ONE_PROCESS, *SMOKE]
        words = [*launch, "--parallelism", parallelism, "--output", tmp_path / "out"]
        machines.append(
            subprocess.Popen(
                list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    printed = [machine.communicate(timeout=180)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert "2 processes, 3 networks" in printed[0]
    assert (weights(tmp_path / "out") == weights(alone)) == (parallelism == "members")


def alone_with(jobs: int) -> Sharing:
    return share_networks("auto", [1.0] * jobs, 1, batch_size=16)[0]


def test_a_single_process_has_all_jobs_and_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    team, trained = Team(alone_with(3), cpu=True), []
    team.run(trained.append)
    assert trained == [0, 1, 2] and team.is_main_process and str(team) == "one process, 3 networks"
    assert not distributed.is_initialized() and count_processes() == 1


def test_a_network_is_continued_on_as_many_processes_as_it_began_on(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "cat5-0" / "step-00000100"
    checkpoint.mkdir(parents=True)
    for rank in range(2):
        (checkpoint / f"random_states_{rank}.pkl").touch()
    check_processes(checkpoint, 2)
    with pytest.raises(ValueError, match=r"step-00000100 was saved by 2 processes, and now there would be 1\. Launch"):
        check_processes(checkpoint, 1)


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    """Else each would train everything and write into the same folders."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match=r"srun started 4 processes without a launcher.*slurm.sh"):
        count_processes()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert count_processes() == 4


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """As with --num_processes 8 on four GPUs, or if CUDA_VISIBLE_DEVICES leaves one for each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own, there are 1"):
        Team(alone_with(1), cpu=False)
    Team(alone_with(1), cpu=True)


def test_no_warning_without_a_launcher(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Team(alone_with(1), cpu=True)
    assert not capsys.readouterr().err
