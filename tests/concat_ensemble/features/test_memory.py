import json
import platform
import subprocess
import sys

import pytest

# In a process of its own: what a heap gives back depends on what else has come to lie in it.
PROGRAM = """
import json, resource
import psutil, torch
from concat_ensemble.features.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty({piece}, dtype=torch.uint8).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resident = psutil.Process().memory_info
faults()
alone, before = faults(), resident().rss
with keep_freed_memory():
    faults()
    within = faults()
print(json.dumps(dict(alone=alone, within=within, kept=resident().rss - before, after=faults())))
"""
PIECE = 64 << 20  # bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_pieces_are_used_again_within_and_given_back_after():
    program = [sys.executable, "-c", PROGRAM.format(piece=PIECE)]
    seen = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert seen["within"] < seen["alone"] / 10
    assert seen["kept"] < PIECE / 2, "what was kept has gone back"
    assert seen["after"] > seen["alone"] / 2, "and pieces are handed back at once again"
