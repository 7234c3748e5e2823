"""Optimizers and learning-rate schedules, by steps: timm's, and the schedule-free AdamW of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import schedulefree
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from concat_ensemble.training.recipe import SCHEDULE_FREE, Settings

ParameterGroups = Callable[[Any], list[dict]]


def count_warmup_steps(settings: Settings, steps: int) -> int:
    """Steps of the warm-up: at least one, if there is a warm-up at all, and never all steps."""
    return min(max(round(settings.warmup * steps), 1 if settings.warmup else 0), steps - 1)


def create_optimizer(
    network: nn.Module, settings: Settings, warmup: int, param_groups: ParameterGroups | None = None
) -> Optimizer:
    """Create the optimizer of a network. `param_groups` makes its parameter groups; timm's own when left out."""
    betas: dict[str, Any] = {} if settings.betas is None else {"betas": tuple(settings.betas)}
    if settings.optimizer == SCHEDULE_FREE:
        groups = param_groups(network) if param_groups else _group_parameters(network, settings)
        groups = [{"lr": settings.learning_rate * group.pop("lr_scale", 1.0)} | group for group in groups]
        return schedulefree.AdamWScheduleFree(groups, lr=settings.learning_rate, warmup_steps=warmup, **betas)
    # One fused call for all tensors, if torch has it, saves a tenth of a small network's step on a CPU.
    kind = get_optimizer_class(settings.optimizer, bind_defaults=False)
    fused: dict[str, Any] = {"fused": True} if "fused" in signature(kind).parameters else {}
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    groups = {"param_group_fn": param_groups, "layer_decay": settings.layer_decay}
    return create_optimizer_v2(network, settings.optimizer, **groups, **rates, **betas, **fused)


def create_schedule(optimizer: Optimizer, settings: Settings, warmup: int, length: int, cycles: int) -> Any:
    """timm's schedule, by steps: `warmup` steps, then `cycles` of `length` steps each."""
    first_rate = settings.learning_rate / max(warmup, 1) if settings.warmup_lr is None else settings.warmup_lr
    steps = {"num_epochs": length, "warmup_epochs": warmup, "step_on_epochs": False, "updates_per_epoch": 1}
    steps |= {"warmup_lr": first_rate, "warmup_prefix": True, "min_lr": settings.min_lr}
    schedule = create_scheduler_v2(optimizer, settings.schedule, cycle_limit=cycles, cycle_decay=1.0, **steps)[0]
    if schedule is not None and not warmup:
        schedule.step_update(0)  # else the first step would be without timm's scale of the rate of each layer
    return schedule


def group_by_layers(networks: Iterable[nn.Module], head: nn.Module, settings: Settings) -> list[dict]:
    """timm's parameter groups by layers of several networks, and that of the layer on top of them."""
    groups = []
    for network in networks:
        groups += param_groups_layer_decay(
            network, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay or 1.0
        )
    return [*groups, {"params": list(head.parameters()), "weight_decay": 0.0}]


def _group_parameters(network: nn.Module, settings: Settings) -> list[dict]:
    if settings.layer_decay is None:
        return param_groups_weight_decay(network, weight_decay=settings.weight_decay)
    return param_groups_layer_decay(network, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
