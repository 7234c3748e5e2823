import platform
import resource

import psutil
import pytest
import torch

from concat_ensemble.memory import freed_memory_kept

PIECE = 64 << 20  # bytes


def faults(action) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def ask_and_free(times: int = 20) -> None:
    for _ in range(times):
        torch.empty(PIECE, dtype=torch.uint8).zero_()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_pieces_are_used_again_within_and_given_back_after():
    ask_and_free(1)
    alone, before = faults(ask_and_free), psutil.Process().memory_info().rss
    with freed_memory_kept():
        ask_and_free(1)
        assert faults(ask_and_free) < alone / 10
    assert psutil.Process().memory_info().rss < before + PIECE / 2, "what was kept has gone back"
    assert faults(ask_and_free) > alone / 2, "and pieces are handed back at once again"
