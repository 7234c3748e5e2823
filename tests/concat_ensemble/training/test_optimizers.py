"""Optimizers and learning rates at each step."""

import pytest
import timm
from torch import nn

from concat_ensemble.training.optimizers import count_warmup_steps, create_optimizer, create_schedule
from concat_ensemble.training.recipe import SCHEDULE_FREE, Settings


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return timm.create_model("resnet10t", in_chans=1, channels=[4, 4, 8, 8], stem_width=4, num_classes=3)


def settings(**changes) -> Settings:
    return Settings(dataset="digits", learning_rate=0.1, **changes)


def rates(network, steps=10, **changes) -> list[float]:
    """The learning rate of the last layer at each step."""
    chosen = settings(**changes)
    warmup = count_warmup_steps(chosen, steps)
    optimizer = create_optimizer(network, chosen, warmup)
    schedule = create_schedule(optimizer, chosen, warmup, steps - warmup, 1)
    values = []
    for step in range(steps):
        values.append(optimizer.param_groups[-1]["lr"])
        schedule.step_update(step + 1)
    return values


def test_the_warm_up_starts_at_its_own_rate(network):
    assert rates(network, warmup=0.4)[:5] == pytest.approx([0.025, 0.04375, 0.0625, 0.08125, 0.1])
    assert rates(network, warmup=0.4, warmup_lr=0.02)[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "tanh", "wsd"])
def test_a_schedule_ends_at_its_least_rate(schedule, network):
    values = rates(network, 1_000, warmup=0.0, schedule=schedule, min_lr=0.03)
    assert values[0] == pytest.approx(0.1, rel=1e-4) and values[-1] == pytest.approx(0.03, rel=0.05)
    assert min(values) >= 0.03


@pytest.mark.parametrize(("steps", "expected"), [(4, 1), (100, 5), (10, 1), (2, 1), (1, 0)])
def test_a_warm_up_has_a_step_at_least_and_leaves_one(steps, expected):
    assert count_warmup_steps(settings(warmup=0.05), steps) == expected
    assert count_warmup_steps(settings(warmup=0.0), steps) == 0


@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adamw", SCHEDULE_FREE])
def test_layers_learn_more_slowly_towards_the_input(optimizer, warmup, network):
    chosen = settings(optimizer=optimizer, layer_decay=0.5, weight_decay=0.2, warmup=warmup)
    created = create_optimizer(network, chosen, 5 if warmup else 0)
    if optimizer == "adamw":
        create_schedule(created, chosen, 5 if warmup else 0, 10, 1)
    peak = 0.02 if warmup and optimizer == "adamw" else 0.1  # of the first step
    groups = {id(each): group for group in created.param_groups for each in group["params"]}
    head, stem = groups[id(network.get_parameter("fc.weight"))], groups[id(network.get_parameter("conv1.0.weight"))]
    assert head["lr"] == pytest.approx(peak) and head["weight_decay"] == 0.2
    assert 0 < stem["lr"] < 0.3 * peak
    assert sum(len(group["params"]) for group in created.param_groups) == len(list(network.parameters()))


def test_three_betas_reach_an_optimizer_that_takes_three(network):
    optimizer = create_optimizer(network, settings(optimizer="adan", betas=[0.9, 0.8, 0.7]), 0)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.8, 0.7)
