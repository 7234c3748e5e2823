import json
import os
import platform
import subprocess
import sys

import pytest

# In a process of its own, since what a heap returns to the system depends on what else lies in it. Inside the context,
# pieces come from the heap. If something else was allocated above them, a hole of their size is left there afterwards:
# its pages have gone back to the system, but malloc uses the hole for later pieces of the same size. Whether pieces
# are returned at once again is therefore measured on larger ones, which do not fit into the hole.
PROGRAM = """
import json, resource
import psutil, torch
from concat_ensemble.features.memory import keep_freed_memory

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(size, dtype=torch.uint8).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resident = psutil.Process().memory_info
faults({piece})
outside, outside_large, before = faults({piece}), faults(2 * {piece}), resident().rss
with keep_freed_memory():
    faults({piece})
    inside = faults({piece})
growth = resident().rss - before
after = faults(2 * {piece})
print(json.dumps(dict(outside=outside, outside_large=outside_large, inside=inside, growth=growth, after=after)))
"""
PIECE = 64 << 20  # bytes
ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # settings of the environment that change malloc


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the context sets options of glibc")
def test_memory_is_reused_inside_and_returned_afterwards():
    program = [sys.executable, "-c", PROGRAM.format(piece=PIECE)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ALLOCATORS)}
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    seen = json.loads(done.stdout)
    assert seen["inside"] < seen["outside"] / 10
    assert seen["growth"] < PIECE / 2, "the memory was not returned at the end"
    assert seen["after"] > seen["outside_large"] / 2, "later pieces are not returned at once"
