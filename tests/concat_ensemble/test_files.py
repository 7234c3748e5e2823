"""Files and folders are replaced whole, also by several writers at once and after kills."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from concat_ensemble.files import replace_file, replace_folder
from concat_ensemble.modeling.weights_concat_ensemble import replace_files


def write_file(path, text, during=lambda: None):
    with replace_file(path) as aside:
        during()
        aside.write_text(text)
        during()


def write_folder(path, text, during=lambda: None):
    with replace_folder(path) as aside:
        (aside / "first").write_text(text)
        during()
        (aside / "second").write_text(text)
        during()


def save(path, text, during=lambda: None):
    """As `save_pretrained` writes: into a folder that stays."""
    with replace_files(path) as aside:
        (aside / "first").write_text(text)
        during()
        (aside / "second").write_text(text)
        during()


def read(path):
    return {file.read_text() for file in ([path] if path.is_file() else path.glob("[!.]*"))}


@pytest.mark.parametrize("write", [write_file, write_folder, save])
def test_of_two_writers_at_once_the_last_one_wins_and_is_whole(write, tmp_path):
    """The second begins and ends while the first one writes, and again before the first has its place."""
    path = tmp_path / "results"
    write(path, "old")
    with ThreadPoolExecutor() as pool:

        def meanwhile():
            pool.submit(write, path, "second").result()
            assert read(path) == {"second"}

        write(path, "first", meanwhile)
    assert read(path) == {"first"}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("write", [write_file, write_folder, save])
def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(write, tmp_path):
    path = tmp_path / "results"
    write(path, "old")
    name = f"from {__name__} import {write.__name__} as write; from pathlib import Path; import os, sys\n"
    script = "write(Path(sys.argv[1]), 'half', {{}})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(during, **options):
        command = [sys.executable, "-c", name + script.format(during), path]
        return subprocess.Popen(command, env=environment, **options)

    start("lambda: os._exit(1)").wait()
    assert list(tmp_path.rglob(".*")), "a kill leaves something"
    write(path, "new")
    assert read(path) == {"new"} and not list(tmp_path.rglob(".*"))

    waiting = "lambda: (print('writing', flush=True), sys.stdin.readline())"
    with start(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        write(path, "newer")
        assert list(tmp_path.rglob(".*")), "it is still being written"
        process.communicate("\n\n")
    assert process.returncode == 0
    assert read(path) == {"half"} and not list(tmp_path.rglob(".*"))
