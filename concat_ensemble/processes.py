"""The processes that `accelerate launch` or torchrun starts for one command: sharing out rows, and ending together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

# By which each process knows the others.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def count_launched() -> int:
    """The number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse_several(name: str) -> None:
    """Raise ValueError in a launch of several processes, which would all do the same and write the same files."""
    if (number := count_launched()) > 1:
        raise ValueError(f"{name} takes one process and was started in {number}; leave accelerate launch out.")


def process_state() -> PartialState:
    """What accelerate knows of this process and the others. On a machine without a GPU, accelerate itself takes each
    process for the only one unless it is told that they compute on the CPU."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=count_launched() > 1 and not torch.accelerator.is_available())


def share_rows(count: int, read: Callable[[range], list]) -> list:
    """What `read` returns for the rows 0 to `count`, where each process reads one N-th of them. All must call this."""
    from accelerate.utils import gather_object

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
    state._reset_state()
    forget_launch()


def forget_launch() -> None:
    """Let this process go on as if it had been started alone."""
    for name in VARIABLES:
        os.environ.pop(name, None)
