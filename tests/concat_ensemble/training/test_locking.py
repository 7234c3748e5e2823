"""The lock on an output folder, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from concat_ensemble.training import locking, pretraining
from concat_ensemble.training.locking import lock_output

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "training" / "recipes" / "scattered_digits_timecat.yaml"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 0.2)


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock on `tmp_path / "out"`, and its id."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        with lock_output(tmp_path / "out"):
            os.write(writes, b"x")
            signal.pause()
        os._exit(0)
    os.read(reads, 1)
    yield process
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    os.waitpid(process, 0)


def test_a_second_start_is_told_which_process_writes_there(other, tmp_path):
    with (
        pytest.raises(
            ValueError, match=rf"out is in use by process {other} on \S+ since 20\d\d-.*; wait for it, end it"
        ),
        lock_output(tmp_path / "out"),
    ):
        pass
    with lock_output(tmp_path / "elsewhere"):
        pass
    assert not (tmp_path / "elsewhere").exists(), "an empty folder that it made is removed"


def test_a_second_start_of_the_script_ends_with_one_line(other, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretraining.main([str(RECIPE), "--smoke", "--cpu", "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 1 and f"in use by process {other}" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_killed_process_leaves_no_lock(other, tmp_path):
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    with lock_output(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").is_file()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; name a folder"), lock_output(tmp_path / "file"):
        pass


def test_processes_of_one_start_share_the_lock(monkeypatch, tmp_path):
    """Another process of the start joins; and after both have left, the file is gone."""
    monkeypatch.setattr("uuid.uuid4", lambda: type("One", (), {"hex": "one"}))  # what the store shares
    with lock_output(tmp_path / "out"):
        process = os.fork()
        if not process:
            with lock_output(tmp_path / "out"):
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end_and_the_same_command_continues(tmp_path):
    """In the meantime another start is told; and the two processes of one start share the lock."""
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", 2]
    launch += ["--num_machines", 1, "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
    train = ["training/pretrain_members.py", RECIPE, "--cpu", "--members", "[1]", "--wide-steps", 0, "--snapshots", 0]
    command = [*map(str, [*launch, *train, "--total-steps", 100, "--checkpoint-every", 5, "--output", tmp_path])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "printed").open("w") as printed:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ValueError, match=r"in use by process \d+ and 1 more on"), lock_output(tmp_path):
            pass
        launcher.kill()
        launcher.wait()
        while (tmp_path / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    text = (tmp_path / "printed").read_text()
    assert "ended by SIGHUP after step" in text and list(tmp_path.glob("checkpoints/*/step-*")), text
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert (tmp_path / "cat1").is_dir() and not (tmp_path / ".lock").exists()
