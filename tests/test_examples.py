"""The examples, launched as a user would, for a few steps on a few small images."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModel

import concat_ensemble

ROOT = Path(__file__).parents[1]
README = (ROOT / "examples/README.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)\n```", README, flags=re.DOTALL | re.MULTILINE)
SCRIPT = ROOT / "examples/train_members.py"
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ONE_PROCESS = ["--cpu", "--num_processes", "1", *PLAIN]
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *PLAIN]
SMALL = ["--cpu", "--members", "2", "--total-steps", "4", "--batch-size", "8", "--image-size", "16"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A saved dataset of 40 digits in each split."""
    folder = tmp_path_factory.mktemp("images") / "forty_digits"
    concat_ensemble.load_data("digits", limit=40).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def launched(images, tmp_path_factory):
    """`launched(launch options)`: run the command of the README; the output folder and the printed lines."""

    def launched(options: list[str]) -> tuple[Path, list[str]]:
        output = tmp_path_factory.mktemp("launched")
        program, launch, *words = shlex.split(COMMANDS[0])
        assert (program, launch) == ("accelerate", "launch")
        command = [str(Path(sys.executable).with_name(program)), launch, *options, *words, *SMALL]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment["HF_ASSETS_CACHE"] = str(tmp_path_factory.mktemp("assets"))
        command += ["--dataset", str(images), "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return output, done.stdout.splitlines()

    return launched


@pytest.fixture(scope="module")
def trained(launched) -> tuple[Path, list[str]]:
    return launched(ONE_PROCESS)


def weights(output: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(output / "members" / str(k) / "model.safetensors") for k in range(2)]


def without_numbers(lines: list[str]) -> list[str]:
    return sorted({re.sub(r"\d[\d,.]*", "N", line) for line in lines})


def test_the_ensemble_has_the_members_that_were_saved(trained):
    output, _ = trained
    assert {path.name for path in output.iterdir()} == {"members", "ensemble"}
    model = AutoModel.from_pretrained(output / "ensemble")
    assert len(model.members) == 2 and model.config.num_features == 2 * 512
    for k, saved in enumerate(weights(output)):
        assert all(torch.equal(tensor, saved[key]) for key, tensor in model.members[str(k)].state_dict().items())
        assert saved["bn1.num_batches_tracked"] == 2, "half of the steps"
        assert model.config.members[k]["preprocessing"]["input_size"] == [3, 16, 16]
        assert model.config.members[k]["provenance"]["pretraining_data"] == "forty_digits", "no folder of this machine"


def test_members_are_in_timms_layout_without_what_timm_says_of_its_own_weights(trained):
    for k in range(2):
        folder = trained[0] / "members" / str(k)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == "resnet10t" and config["label_names"] == [str(digit) for digit in range(10)]
        assert not {"license", "tag"} & config["pretrained_cfg"].keys()
        assert config["provenance"]["seed"] == k and config["provenance"]["steps"] == 2


def test_two_members_differ(trained):
    first, second = weights(trained[0])
    assert not torch.equal(first["layer1.0.conv1.weight"], second["layer1.0.conv1.weight"])


def test_it_prints_the_lines_of_the_readme(trained):
    (shown,) = re.findall(r"^```text\n(.*?)\n```", README, flags=re.DOTALL | re.MULTILINE)
    assert without_numbers(trained[1]) == without_numbers(shown.splitlines())


def test_the_same_seed_gives_the_same_weights_and_another_one_others(trained, images, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was launched
    try:
        for seed in (0, 5):
            output = tmp_path / str(seed)
            words = [*SMALL, "--dataset", str(images), "--output", str(output), "--seed", str(seed)]
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
            AcceleratorState._reset_state(reset_partial_state=True)
            runpy.run_path(str(SCRIPT), run_name="__main__")
            pairs = list(zip(weights(output), weights(trained[0]), strict=True))
            assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a) == (seed == 0)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_two_processes_share_the_batches(launched):
    output, lines = launched(TWO_PROCESSES)
    assert len(lines) == 4, "the main process alone prints"
    assert len(AutoModel.from_pretrained(output / "ensemble").members) == 2
    assert all(saved["bn1.num_batches_tracked"] == 2 for saved in weights(output))


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_each_script_is_one_page(script):
    assert len(script.read_text().splitlines()) <= 150
    assert script.name in README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_options_that_exist(command):
    program, launch, script, *words = shlex.split(command)
    assert (program, launch) == ("accelerate", "launch")
    text = (ROOT / script).read_text()
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))
