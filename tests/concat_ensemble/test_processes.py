"""What the processes of `accelerate launch` share when they run one command, and what the main one does alone."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import DatasetDict
from torch import distributed

from concat_ensemble import extract_features, load_data
from concat_ensemble.commands.app import COMMANDS, SHARED
from concat_ensemble.data import images as data_images
from concat_ensemble.data.audit import audit_splits
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.features import extraction, reading
from concat_ensemble.processes import VARIABLES, continue_alone, process_state, share_rows
from concat_ensemble.studies.compare_study import run_compare_study
from concat_ensemble.studies.options import ProbeOptions, SelectOptions
from concat_ensemble.studies.probe_study import run_probe_studies, run_probe_study
from concat_ensemble.studies.select_study import run_select_study

DIGITS, QUIET = DatasetOptions(name="digits", classes="0-1", limit=16), ExtractionOptions(quiet=True)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes cannot use CUDA")


def run_processes(number: int, work, *arguments) -> list:
    """What `work` returns in each of several processes that know each other as those of `accelerate launch` do; of one
    that ends, its exit code. Forked, since they would take seconds to import everything."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    for rank, (_, sender) in enumerate(pipes):
        variables = dict(zip(VARIABLES, map(str, (rank, number, rank, number)), strict=True)) | place
        context.Process(target=_run_process, args=(variables, sender, work, arguments), daemon=True).start()
    results = []
    for receiver, _ in pipes:
        assert receiver.poll(120), "a process hangs"
        results.append(receiver.recv())
    return results


def _run_process(variables, sender, work, arguments) -> None:
    os.environ |= variables
    PartialState._reset_state()
    try:
        sender.send(work(*arguments))
    except SystemExit as end:
        sender.send(end.code)


def test_rows_are_shared_out_and_come_back_in_order():
    assert share_rows(5, list) == list(range(5)), "without a launch"
    for count in (0, 1, 5):
        assert run_processes(3, share_rows, count, list) == [list(range(count))] * 3


def alone() -> tuple[int, int, list[str]]:
    before = process_state().num_processes
    continue_alone()
    return before, process_state().num_processes, [name for name in VARIABLES if name in os.environ]


def test_the_main_process_continues_alone_and_the_others_end():
    assert run_processes(3, alone) == [(3, 1, []), 0, 0]
    assert run_processes(1, alone)[0][:2] == (1, 1)


# --- reading ---------------------------------------------------------------------------------------------------------


def count_reads(ensemble, data, store) -> dict[str, int]:
    """Images that this process hashes and decodes where a command loads, audits and extracts."""
    counts = {"hashed": 0, "decoded": 0}
    read_encoded, processor_input = data_images.read_encoded, reading.processor_input

    def count_hashed(*args):
        counts["hashed"] += 1
        return read_encoded(*args)

    def count_decoded(*args):
        counts["decoded"] += 1
        return processor_input(*args)

    extraction.SHARD_IMAGES = 32  # shares are of whole files
    data_images.read_encoded, reading.processor_input = count_hashed, count_decoded
    reading.read_encoded = lambda *_: pytest.fail("extraction hashes an image again")
    audited = audit_splits(load_data(data, hash_images=True))
    extract_features(ensemble, audited.data, store=store, batch_size=16, quiet=True)
    return counts


@pytest.mark.parametrize("splits", [["train"], ["train", "validation", "test"]])
def test_each_process_hashes_and_decodes_its_share(splits, ensemble, tmp_path):
    whole = load_data("digits", classes=range(5))
    data = DatasetDict({split: whole[split] for split in splits})
    total = sum(map(len, data.values()))
    [one] = run_processes(1, count_reads, ensemble.export_active([0]), data, tmp_path / "1")
    two = run_processes(2, count_reads, ensemble.export_active([0]), data, tmp_path / "2")
    compared = one["hashed"] - total  # a few images of a split, whenever its column of hashes is used
    assert one["decoded"] == sum(each["decoded"] for each in two) == total and compared < 200
    for each in two:
        assert abs(each["hashed"] - compared - total / 2) < 3 and abs(each["decoded"] - total / 2) <= 32


def load_hashes(data, settings) -> dict[str, list[bytes]]:
    return {
        str(split): list(rows["image_hash"]) for split, rows in load_data(data, hash_images=True, **settings).items()
    }


@pytest.mark.parametrize(
    "settings", [{}, {"limit": 9}, {"shots": 4}, {"group_column": "group"}, {"hold_out": False, "for_training": True}]
)
@pytest.mark.parametrize("splits", [["train"], ["train", "test"]])
def test_several_processes_load_the_rows_and_hashes_of_one(splits, settings, damaged):
    """Also of images that are missing, whose hashes depend on their places."""
    data = damaged(train=["null", "missing", "empty.png"], test=["null"])
    data["test"] = data["test"].select([3])  # fewer than there are processes
    data = DatasetDict({split: data[split] for split in splits})
    assert run_processes(2, load_hashes, data, settings) == [load_hashes(data, settings)] * 2


def load_in_turn() -> int:
    with process_state().main_process_first():
        return len(load_data("digits")["train"])


def test_a_process_that_loads_without_hashes_waits_for_no_other():
    first, second = run_processes(2, load_in_turn)
    assert first == second > 0


# --- commands --------------------------------------------------------------------------------------------------------


def probe(model: str) -> list[str]:
    return [str(run_probe_study(model, DIGITS, ProbeOptions(controls="none"), QUIET).path)]


def probe_with_controls(model: str) -> list[str]:
    """Two datasets in two repeats, which draw other images, beside a baseline and with pages of errors."""
    datasets = [dataclasses.replace(DIGITS, classes=classes) for classes in ("0-1", "2-3")]
    options = ProbeOptions(repeats=2, baselines=["random:test_resnet"], errors=2)
    studies = run_probe_studies(model, datasets, options, QUIET)
    return [str(study.path) for study in studies.finished.values()]


def compare(model: str) -> list[str]:
    return [str(run_compare_study([model], DIGITS, QUIET, output=Path(model, "overlap")).path)]


def select(model: str) -> list[str]:
    study = run_select_study(model, DIGITS, SelectOptions(output=Path(model, "chosen")), QUIET)
    return [str(study.path), *map(str, Path(model, "chosen", "results").glob("*.json"))]


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key != "seconds"}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def run_study(study, ensemble, number: int, folder: Path, monkeypatch) -> list:
    """The results of a study by several processes with a store of their own, of which only the first goes on."""
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder / f"assets-{number}"))
    ensemble.save_pretrained(folder / str(number) / "model")
    paths, *others = run_processes(number, study, str(folder / str(number) / "model"))
    assert others == [0] * (number - 1)
    return [without_times(json.loads(Path(path).read_text())) for path in paths]


@pytest.mark.parametrize(
    ("study", "files"),
    [
        (probe, 1),
        pytest.param(probe_with_controls, 2, marks=pytest.mark.slow),
        pytest.param(compare, 1, marks=pytest.mark.slow),
        pytest.param(select, 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_measure_what_one_does(study, files, ensemble, tmp_path, monkeypatch):
    model = ensemble.export_active([0]) if study is probe else ensemble
    one, two = (run_study(study, model, number, tmp_path, monkeypatch) for number in (1, 2))
    assert one == two and len(one) == files
    if study is probe:
        assert run_study(study, model, 2, tmp_path, monkeypatch) == two, "which are only read"


def test_each_other_command_takes_one_process(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    names = [command.__name__ for command in COMMANDS if command.__name__ not in SHARED]
    assert len(names) == len(COMMANDS) - 3
    for name in names:
        code, out, err = run(name)
        assert (code, out) == (2, "")
        assert err == f"error: {name} takes one process and was started in 4; leave accelerate launch out.\n"


# --- the launcher ----------------------------------------------------------------------------------------------------

# Of two processes, one fails while the other waits for its share.
FAILING = """
import os, sys
from concat_ensemble.commands.app import main
from concat_ensemble.data import images
def fail(*_):
    raise OSError("the disk is broken")
if os.environ["RANK"] == sys.argv.pop(1):
    images.hash_image = fail
main()
"""


def launch(*words: str) -> subprocess.CompletedProcess:
    """Two processes, as `accelerate launch` starts them; none may hang."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.run([*command, "--main_process_port", "0", *words], capture_output=True, text=True, timeout=200)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_the_launcher_starts_a_probe(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HF_ASSETS_CACHE", str(folder.parent / "assets"))  # without what other tests have extracted
    words = ["probe", "pair", "--dataset", "digits", "--limit", "12", "--classes", "0-1", "--controls", "none"]
    done = launch("-m", "concat_ensemble.commands.app", *words, "--save-head", "--errors", "3")
    assert done.returncode == 0 and not errors(done), done.stderr
    assert done.stdout.count("results: ") == 1 and "features (process 1 of 2): " in done.stderr
    results = json.loads((folder / "results/digits-classes-0-1-limit-12.json").read_text())
    assert results["command"].startswith("concat-ensemble probe pair --dataset digits")
    assert (folder / "head.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_one_process_fails_all_end_with_its_line(rank, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("failing.py").write_text(FAILING)
    done = launch("failing.py", rank, "probe", "pair", "--dataset", "digits", "--limit", "12", "--quiet")
    assert done.returncode == 1 and errors(done) == ["error: the disk is broken"], done.stderr
    assert done.stdout == "" and not (folder / "results").exists()


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch("-m", "concat_ensemble.commands.app", "compare", "random:test_resnet", "--dataset", "nothing-here")
    assert done.returncode == 1 and len(errors(done)) == 1 and "nothing-here" in errors(done)[0], done.stderr
