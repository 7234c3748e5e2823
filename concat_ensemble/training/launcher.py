"""What `accelerate launch` tells the processes that it starts, in environment variables."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed

from concat_ensemble.training.recipe import Settings

# Variables of the launcher for trainings that shard the weights of a network over processes.
SHARDING = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
_turns = itertools.count()  # of `local_main_process_first`, the same in every process


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """Let one process of each machine go first, so that it downloads and prepares what the others then find in its
    cache. accelerate's own needs a process group of all processes, which teams must not have; call this before there
    is a team. Without the store of `accelerate launch`, all go at once.
    """
    count, turn = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), next(_turns)
    if count == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    store, *_ = next(distributed.rendezvous("env://"))
    store.set_timeout(timedelta(days=1))
    machine, start = (os.environ.get(name, "0") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"))
    key = f"start {start}, turn {turn}: machine {machine} is prepared"
    if os.environ.get("LOCAL_RANK") != "0":
        store.wait([key])
        yield
        return
    try:
        yield
    finally:  # the others then fail as this one does
        store.set(key, "yes")


def check_launcher(settings: Settings) -> None:
    """Raise ValueError for an option of the launcher that the settings contradict, or that cannot work. The launcher
    says "no" when it was not asked, which the settings replace."""
    precision = _read("ACCELERATE_MIXED_PRECISION")
    if precision not in ("no", settings.mixed_precision):
        own = f"the recipe's mixed_precision={settings.mixed_precision}"
        raise ValueError(f"the launcher's mixed_precision={precision} must be {own}; set it in the recipe alone.")
    backend = _read("ACCELERATE_DYNAMO_BACKEND")
    if backend != "no" and not (settings.compile and backend == "inductor"):
        own = f"left out with the recipe's compile={settings.compile}"
        raise ValueError(f"the launcher's dynamo_backend={backend} must be {own}; set compile=True in the recipe.")
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", "auto"):
        remedy = "set gradient_accumulation in the recipe alone"
        raise ValueError(f"the launcher's gradient_accumulation_steps={parts} must be left out; {remedy}.")
    for variable, option in SHARDING.items():
        if _read(variable) in ("true", "1", "yes"):
            reason = "every process holds whole networks, which it averages, evaluates and saves"
            remedy = "use gradient_checkpointing=True and mixed_precision=bf16 for a network that needs much memory"
            raise ValueError(f"the launcher's {option} must be left out: {reason}; {remedy}.")


def _read(variable: str) -> str:
    return os.environ.get(variable, "no").lower()
