"""Files that claim to be large take little memory and time; `sizes.py` prints how much."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.safety.size_attacks import ATTACKS

SIZES = Path(__file__).with_name("sizes.py")
QUICK = (  # of files that are read without PyTorch
    "results that claim 10 to the 15 images",
    "results of a number of a million digits",
    "a report nested 100 000 times",
)


def measure(*names):
    done = subprocess.run([sys.executable, SIZES, *names], capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def test_some_files_that_claim_to_be_large():
    assert "3 attacks, 0 failed" in measure(*QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_claims_to_be_large(attack):
    assert " 0 failed" in measure(attack)
