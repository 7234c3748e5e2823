"""The processes that `accelerate launch` or torchrun starts for one command: sharing out rows, and ending together."""

import os
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

# By which each process knows the others.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def process_state() -> PartialState:
    """What accelerate knows of this process and the others. On a machine without a GPU, accelerate itself takes each
    process for the only one unless it is told that they compute on the CPU."""
    is_launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=is_launched and not torch.accelerator.is_available())


def share_rows(count: int, read: Callable[[range], list]) -> list:
    """What `read` returns for the rows 0 to `count`, where each process reads one N-th of them. All must call this."""
    state = process_state()
    start, stop = (count * number // state.num_processes for number in (state.process_index, state.process_index + 1))
    return gather_object(read(range(start, stop)))


def continue_alone() -> None:
    """Let the main process go on as if it had been started alone; the others end here, with exit code 0.

    All must call this, after what they do together. What takes longer than a process may wait for another, and what
    writes files, comes after it.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    is_main_process = state.is_main_process
    state.destroy_process_group()
    if not is_main_process:
        raise SystemExit(0)
    PartialState._reset_state()
    for name in VARIABLES:
        os.environ.pop(name, None)
