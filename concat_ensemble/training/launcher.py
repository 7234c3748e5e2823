"""The options of `accelerate launch`, which come in environment variables, must be what the recipe says."""

import os

from concat_ensemble.training.recipe import Settings

# Variables of the launcher for trainings that shard the weights of a network over processes.
SHARDING = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


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
