"""Several processes, launched as a user would: how many there are, and what they share."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from concat_ensemble.training import pretraining
from concat_ensemble.training.teams import Team, split_processes

ROOT = Path(__file__).parents[3]
ACCELERATE = Path(sys.executable).with_name("accelerate")
ONE_PROCESS = ["--mixed_precision", "no", "--dynamo_backend", "no"]
SMOKE = ["training/pretrain_members.py", "training/recipes/scattered_digits_timecat.yaml", "--smoke", "--cpu"]
SMOKE += ["--members", "[2]", "--snapshots", "0", "--wide-steps", "0"]


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
    return [(output / "members" / f"cat2-{k}" / "model.safetensors").read_bytes() for k in range(2)]


def read_compute(output: Path) -> list[dict]:
    configs = (output / "members" / f"cat2-{k}" / "config.json" for k in range(2))
    return [json.loads(config.read_text())["provenance"]["compute"] for config in configs]


def test_members_in_separate_teams_are_those_of_single_runs(launched, alone):
    output, printed = launched(2, "--parallelism", "members")
    assert "2 processes in 2 teams, parallelism=members" in printed
    assert weights(output) == weights(alone), "bit for bit"
    assert [compute["processes"] for compute in read_compute(output)] == [1, 1], "each trained by one process"
    assert len(json.loads((output / "cat2" / "config.json").read_text())["members"]) == 2


def test_a_network_on_two_processes_sees_as_many_images(launched, alone):
    output, printed = launched(2, "--parallelism", "data")
    assert "2 processes in 1 team, parallelism=data" in printed
    assert [compute["processes"] for compute in read_compute(output)] == [2, 2]
    assert [compute["images"] for compute in read_compute(output)] == [
        compute["images"] for compute in read_compute(alone)
    ]
    assert weights(output) != weights(alone), "BatchNorm and augmentation see the batch in two parts"


@pytest.mark.slow
def test_three_processes_share_two_networks(launched, alone):
    output, printed = launched(3, "--parallelism", "members", "--batch-size", "16")
    assert "3 processes in 2 teams" in printed
    assert sorted(compute["processes"] for compute in read_compute(output)) == [1, 2]
    single = weights(output)
    assert any(a == b for a, b in zip(single, weights(alone), strict=True)), "the network that one process trained"


def test_accelerates_own_cpu_option_gives_a_warning(tmp_path):
    launch = [ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", *ONE_PROCESS]
    done = subprocess.run(
        [*launch, *SMOKE, "--plan", "--output", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "one process, parallelism=data" in done.stdout
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
    assert "2 processes in" in printed[0]
    assert (weights(tmp_path / "out") == weights(alone)) == (parallelism == "members")


def test_a_single_process_has_all_jobs_and_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for parallelism in ("data", "members"):
        team = Team(parallelism, 3, cpu=True)
        assert list(team.jobs()) == [0, 1, 2] and team.is_main_process and str(team) == "one process"
        team.wait_for_all()
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("processes", "jobs", "teams"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (2, 5, [[0], [1]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (3, 1, [[0, 1, 2]]),
    ],
)
def test_team_sizes_differ_by_one_at_most(processes, jobs, teams):
    assert split_processes(processes, jobs) == teams


def test_no_warning_without_a_launcher(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Team("data", 1, cpu=True)
    assert not capsys.readouterr().err
