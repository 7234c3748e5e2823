"""Files and folders are replaced whole, also by several writers at once and after kills."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest

from concat_ensemble.files import replace_file, replace_folder
from concat_ensemble.modeling.weights_concat_ensemble import replace_files


def write_file(path, text, during=lambda: None):
    with replace_file(path) as aside:
        during()
        aside.write_text(text)
        during()


def write_files(replace, path, text, during=lambda: None):
    """Write two files into a folder with one of the functions that replace them."""
    with replace(path) as aside:
        (aside / "first").write_text(text)
        during()
        (aside / "second").write_text(text)
        during()


WRITERS = {
    "a file": write_file,
    "a folder": partial(write_files, replace_folder),
    "the files of save_pretrained": partial(write_files, replace_files),
}


def read(path):
    return {file.read_text() for file in ([path] if path.is_file() else path.glob("[!.]*"))}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
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


def fork(work):
    """The number of a new process that does this work; it exits with 0 if that does not fail."""
    process = os.fork()
    if not process:
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(2)
    return process


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(write, tmp_path):
    path = tmp_path / "results"
    write(path, "old")
    killed = fork(lambda: write(path, "half", lambda: os._exit(1)))
    os.waitpid(killed, 0)
    assert list(tmp_path.rglob(".*")), "a kill leaves something"
    write(path, "new")
    assert read(path) == {"new"} and not list(tmp_path.rglob(".*"))

    started, go_on = os.pipe(), os.pipe()
    living = fork(lambda: write(path, "living", lambda: (os.write(started[1], b"."), os.read(go_on[0], 1))))
    os.read(started[0], 1)
    write(path, "newer")
    assert list(tmp_path.rglob(".*")), "it is still being written"
    os.write(go_on[1], b"..")
    assert os.waitpid(living, 0)[1] == 0
    assert read(path) == {"living"} and not list(tmp_path.rglob(".*"))
    for end in (*started, *go_on):
        os.close(end)
