"""Several processes, launched as a user would, on 2 cores: how many there really are, and what they share."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from concat_ensemble.training.teams import Team, processes_asked_for

ROOT = Path(__file__).parents[3]
ACCELERATE = Path(sys.executable).with_name("accelerate")
ONE_PROCESS = ["--mixed_precision", "no", "--dynamo_backend", "no"]
SMOKE = ["training/pretrain_members.py", "training/recipes/scattered_digits_timecat.yaml", "--smoke", "--cpu"]
SMOKE += ["--members", "[2]", "--snapshots", "0", "--wide-steps", "0"]


@pytest.fixture(scope="module")
def launched(script, tmp_path_factory):
    """`launched(processes, *words)`: the output folder, and what was printed."""

    def launched(processes: int, *words: str, by: tuple[str, ...] = ("--multi_gpu",)) -> tuple[Path, str]:
        output = tmp_path_factory.mktemp("launched")
        many = [ACCELERATE, "launch", *by, "--num_processes", processes, "--num_machines", 1, "--main_process_port", 0]
        return output, script(*many, *ONE_PROCESS, *SMOKE, *words, "--output", output)

    return launched


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    script(sys.executable, *SMOKE, "--output", output)
    return output


def weights(output: Path) -> list[bytes]:
    return [(output / "members" / f"cat2-{k}" / "model.safetensors").read_bytes() for k in range(2)]


def spent(output: Path) -> list[dict]:
    configs = (output / "members" / f"cat2-{k}" / "config.json" for k in range(2))
    return [json.loads(config.read_text())["provenance"]["compute"] for config in configs]


def test_members_apart_are_those_of_single_runs(launched, alone):
    output, printed = launched(2, "--parallelism", "members")
    assert "2 processes in 2 teams, parallelism=members" in printed
    assert weights(output) == weights(alone), "bit for bit"
    assert [compute["processes"] for compute in spent(output)] == [1, 1], "each trained in a world of one"
    assert len(json.loads((output / "cat2" / "config.json").read_text())["members"]) == 2


def test_a_network_on_two_processes_sees_the_same_images(launched, alone):
    output, printed = launched(2, "--parallelism", "data")
    assert "2 processes in 1 team, parallelism=data" in printed
    assert [compute["processes"] for compute in spent(output)] == [2, 2]
    assert [compute["images"] for compute in spent(output)] == [compute["images"] for compute in spent(alone)]
    assert weights(output) != weights(alone), "BatchNorm and noise see the batch in two parts"


@pytest.mark.slow
def test_three_processes_share_two_networks(launched, alone):
    output, printed = launched(3, "--parallelism", "members", "--batch-size", "16")
    assert "3 processes in 2 teams" in printed
    assert sorted(compute["processes"] for compute in spent(output)) == [1, 2]
    single = weights(output)
    assert any(a == b for a, b in zip(single, weights(alone), strict=True)), "the one that was trained alone"


def test_accelerates_own_cpu_option_is_warned_of(tmp_path):
    launch = [ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", *ONE_PROCESS]
    done = subprocess.run(
        [*launch, *SMOKE, "--plan", "--output", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "one process, parallelism=data" in done.stdout
    assert re.search(
        r"warning: accelerate was asked for 2 processes and started 1\. On the CPU give it --multi_gpu", done.stderr
    )
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


def test_a_process_alone_has_all_jobs_and_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for parallelism in ("data", "members"):
        team = Team(parallelism, 3, cpu=True)
        assert list(team.jobs()) == [0, 1, 2] and team.leads_all and str(team) == "one process"
        team.wait_for_all()
    assert not distributed.is_initialized()


@pytest.mark.parametrize(("world", "jobs", "sizes"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (2, 5, [1, 1]), (8, 4, [2] * 4)])
def test_teams_are_as_even_as_can_be(world, jobs, sizes, monkeypatch):
    monkeypatch.setattr(Team, "_meet", lambda self: None)
    monkeypatch.setattr(Team, "_secede", lambda self, cpu: None)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    teams = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        teams.append(Team("members", jobs, cpu=True))
    assert [len(ranks) for ranks in {team.number: team.ranks for team in teams}.values()] == sizes
    assert all(team.rank in team.ranks for team in teams)


def test_nobody_was_asked_without_a_launcher():
    assert processes_asked_for() is None
