"""The scripts of `training/` are cloned, not installed: they are found beside each other, as when one of them is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "training"))


@pytest.fixture(scope="session")
def script():
    """`script(*words)`: run it as a user would, from the repository's root, and return what it printed."""

    def script(*words) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return script
