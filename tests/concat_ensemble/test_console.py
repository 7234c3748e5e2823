"""What a stage says while it runs: in a process of its own, since it depends on where stderr goes."""

import os
import pty
import subprocess
import sys

import pytest

from concat_ensemble.console import describe_progress, describe_seconds

STAGE = """
import sys
from concat_ensemble import console
console.LINE_SECONDS = float(sys.argv[1])
with console.show_progress("features", 2_000, quiet=sys.argv[2] == "quiet") as advance:
    for _ in range(4):
        advance(500)
        if sys.argv[2] == "fail":
            raise ValueError("no more")
print("result")
"""


def run_stage(seconds, how="", **environment):
    command = [sys.executable, "-c", STAGE, str(seconds), how]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end():
    done = run_stage(1e9)
    first, last = done.stderr.splitlines()
    assert first == "features: 2,000 images" and last.startswith("features: 2,000 of 2,000 images in ")
    assert done.stdout == "result\n", "results stay apart from progress"


def test_a_log_gets_lines_in_between_with_speed_and_time_left():
    lines = run_stage(0).stderr.splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["features: 500 of 2", "features: 1"]
    assert len(lines) == 5 and all("images/s, about" in line and line.endswith(" left") for line in lines[1:4])


def test_quiet_stages_and_all_processes_but_the_first_say_nothing():
    assert run_stage(0, "quiet").stderr == run_stage(0, RANK="1").stderr == ""
    assert run_stage(0, RANK="0").stderr.startswith("features: 2,000 images\n")


def test_a_stage_that_fails_does_not_claim_to_have_ended():
    lines = run_stage(1e9, "fail").stderr.splitlines()
    assert lines[0] == "features: 2,000 images" and lines[1].startswith("Traceback") and " of 2,000" not in lines[-1]


def test_a_terminal_gets_a_bar_and_stdout_stays_clean():
    terminal, side = pty.openpty()
    command, environment = [sys.executable, "-c", STAGE, "0", ""], os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, text=True, env=environment)
    os.close(side)
    out, shown = process.communicate()[0], b""
    try:
        while more := os.read(terminal, 4096):
            shown += more
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(terminal)
    assert process.returncode == 0 and out == "result\n"
    assert b"2000/2000" in shown and b"\x1b[" in shown and b"left" not in shown


@pytest.mark.parametrize(
    ("done", "seconds", "expected"),
    [
        (0, 5.0, "features: 0 of 5,000 images"),
        (512, 12.5, "features: 512 of 5,000 images, 41 images/s, about 2 min left"),
        (512, 0.0, "features: 512 of 5,000 images"),
        (10, 10.0, "features: 10 of 5,000 images, 1.0 images/s, about 83 min left"),
        (1, 100.0, "features: 1 of 5,000 images, 0.6 images/min, about 138.9 h left"),
        (5000, 100.0, "features: 5,000 of 5,000 images in 2 min, 50 images/s"),
    ],
)
def test_progress_in_words(done, seconds, expected):
    assert describe_progress("features", done, 5000, unit="images", seconds=seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (89.9, "90 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations_in_words(seconds, expected):
    assert describe_seconds(seconds) == expected
