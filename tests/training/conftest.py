"""Fixtures for the training flows, run in this process or as the scripts of `training/`."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # as in the processes that `script` starts, so that both end in the same weights
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def script():
    """`script(*words)`: run it as a user would, from the repository's root, and return what it printed."""

    def script(*words) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return script


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate keeps one state for the process, with the first one's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
