"""The table of benchmarks in docs/performance.md is complete, and every benchmark runs to its end at a small size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "benchmarks"
ROWS = re.findall(r"^\| `(python tests/benchmarks/.*?)` \|(.*)\|$", (ROOT / "docs/performance.md").read_text(), re.M)
FILES = {path.name for path in FOLDER.glob("*.py")}
# Options of a trial, which takes seconds. PAIR is a folder with two small networks.
SMALL = {
    "ensemble_forward.py": "--architectures test_resnet --batches 1 --members 2 --repeats 1 --calls 1",
    "extraction.py": "--images 8 --batch-size 4 --repeats 1",
    "extraction_at_scale.py": "--rows 400 --processes 1 2",
    "feature_storage.py": "--rows 500",
    "half_precision.py": "PAIR --dataset digits --limit 60",
    "larger_than_memory.py": "--rows 2000 --num-features 16 --classes 3",
    "linear_probe.py": "--sizes 200x8x3 --repeats 1",
    "loading.py": "--repeats 1",
    "lora.py": "PAIR --layers conv1 conv2 --images 24 --test 20 --epochs 1 --repeats 1",
    "many_classes.py": "--rows 2000 --num-features 16 --classes 20",
    "ntk_cost.py": "test_resnet --images 2 --repeats 1 --dim 16",
    "probe_memory.py": "--small",
    "quantized.py": "PAIR --dataset digits --limit 40 --repeats 1",
    "reference_protocol.py": "random:test_resnet --dataset digits --limit 60 --repeats 1",
    "select_margin.py": "random:test_resnet random:test_resnet --dataset digits --limit 200 --draws 1",
    "shared_decoding.py": "--images 16 --batch-size 4 --repeats 1",
    "subsets.py": "--rows 300 --validation-rows 100 --feature-dim 8 --classes 3 --repeats 1",
    "training_step.py": "--small",
}
ELSEWHERE = {"gpu.py": "tests/test_gpu.py", "difficult_cuts.py": "needs MNIST, and measures nothing"}


def test_every_benchmark_has_a_row_and_every_command_is_a_benchmark():
    programs = [shlex.split(command)[1] for command, _ in ROWS]
    assert sorted(Path(program).name for program in programs) == sorted(FILES)
    assert all((ROOT / program).is_file() for program in programs)
    assert set(SMALL) | set(ELSEWHERE) == FILES, "a trial of each"


def test_a_result_has_its_date_and_what_was_not_measured_says_so():
    for command, cells in ROWS:
        _, machine, ratio, date = (cell.strip() for cell in cells.rsplit("|", 3)[-4:])
        measured = ratio not in ("not measured yet", "no ratio")
        assert ratio and bool(re.fullmatch(r"\d{4}-\d\d-\d\d", date)) == measured, command
        assert machine or not measured, command


def test_options_of_the_tables_commands_exist():
    for command, _ in ROWS:
        _, program, *words = shlex.split(command)
        text = (ROOT / program).read_text()
        for word in words:
            # Some programs add an option for each of several names.
            assert not word.startswith("--") or f'"{word}"' in text or f'("{word[2:]}", ' in text, command


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "pair"
    program = "from concat_ensemble.commands.app import main; main()"
    words = ["build", "random:test_resnet", "random:test_resnet", "--output", str(folder)]
    subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_to_its_end(name, pair, tmp_path):
    words = [str(pair) if word == "PAIR" else word for word in shlex.split(SMALL[name])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(FOLDER / name), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
