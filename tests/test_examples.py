"""The examples run as a reader would run them, on smaller settings."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel

import concat_ensemble  # noqa: F401 (registers the ensemble with AutoModel)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_members.py"


def test_the_training_script_is_launched_and_its_ensemble_loads(tmp_path):
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options = ["--members", "2", "--steps", "6", "--batch-size", "8", "--limit", "60", "--output", "trained"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | home | {"PYTHONPATH": str(ROOT)}
    command = list(map(str, [*launch, SCRIPT, *options]))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "member 1, step 3: loss" in done.stdout and "2 members concatenated:" in done.stdout

    folder = tmp_path / "trained"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "preprocessor_config.json", "member-00.safetensors", "member-01.safetensors"} <= names
    model = AutoModel.from_pretrained(folder)
    first, second = (member["preprocessing"] for member in model.config.members)
    assert first == second and first["input_size"] == [3, 32, 32] and first["crop_pct"] == 1.0
    features = model(torch.rand(2, 3, 32, 32)).pooler_output
    assert features.shape == (2, 128) and not torch.equal(features[:, :64], features[:, 64:])


def test_the_training_script_stays_short():
    assert len(SCRIPT.read_text().splitlines()) <= 150
