"""What a recipe would cost on several devices, and whether it fits into their memory. It needs no images, so that a
laptop can plan for a cluster.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy

from concat_ensemble.console import out
from concat_ensemble.errors import first_line
from concat_ensemble.training.batches import Batch, Pixels
from concat_ensemble.training.images import Images
from concat_ensemble.training.ledger import (
    GIB,
    MEASURED_STEPS,
    PlannedEnsemble,
    PlannedSharing,
    print_plan,
    print_sharings,
    seconds_per_step,
)
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.memory import memory_of_device, training_memory
from concat_ensemble.training.planning import (
    Network,
    job_flops,
    network_size,
    plan_ensembles,
    plan_jobs,
    plan_networks,
)
from concat_ensemble.training.recipe import Recipe
from concat_ensemble.training.sharing import PARALLELISMS, Sharing, finish_first, share_networks

ASSUMED_CLASSES = 1_000
UNWATCHED: dict[str, Any] = {"evaluate_every": 0, "save_best": None, "log_every": 0, "log_with": None}
UNWATCHED |= {"validation_split": None, "validation_size": Recipe.validation_size}
MEASURED_FLOPS = {"cpu": 1e11, "cuda": 2e13}  # of a step: some seconds of two cores, less than one of a GPU


@dataclass(frozen=True)
class Devices:
    """The devices that a recipe is planned for.

    Args:
        memory: Bytes of one, None if any amount will do.
        efficiency: Speed of m devices that train one network, as a share of m times that of one.
    """

    count: int
    memory: float | None = None
    efficiency: float = 1.0

    def __str__(self) -> str:
        return f"{self.count} device{'s' if self.count > 1 else ''}"

    def has_room(self, needed: float) -> bool:
        return self.memory is None or not needed > self.memory  # what is not known (NaN) is not refused


def choose_sharing(recipe: Recipe, parallelism: str, devices: Devices, num_classes: int = ASSUMED_CLASSES) -> Sharing:
    """How the devices share the jobs of a recipe. It depends on the recipe and the devices alone, not on what is
    trained already, so that a run which is continued goes on as it began.

    Raises:
        ValueError: if batches cannot be divided, or do not fit into the devices' memory.
    """
    costs = [job_flops(job, recipe) for job in plan_jobs(recipe)]
    batch = {"batch_size": recipe.batch_size, "accumulation": recipe.gradient_accumulation}
    plans = share_networks(parallelism, costs, devices.count, **batch)
    if devices.memory is not None:
        needs = [device_memory(recipe, plan, num_classes) for plan in plans]
        plans = [plan for plan, need in zip(plans, needs, strict=True) if devices.has_room(need)]
        if not plans:
            raise ValueError(_describe_lack(recipe, devices, min(needs)))
    return finish_first(plans, costs, devices.efficiency)


def device_memory(recipe: Recipe, sharing: Sharing, num_classes: int = ASSUMED_CLASSES) -> float:
    """Bytes of the device that needs most."""
    needs = []
    for number, job in enumerate(plan_jobs(recipe)):
        count = sharing.fewest_devices(number)
        needs.append(
            training_memory(
                recipe,
                job[0].model_args,
                num_classes=num_classes,
                num_images=_images_in_a_pass(recipe, count),
                num_networks=len(job),
                several_devices=count > 1,
            )
        )
    return max(needs)


def print_forecast(
    recipe: Recipe, devices: Sequence[Devices], *, teraflops: float | None, max_images: int | None, cpu: bool
) -> None:
    """Print the cost of each ensemble, and the hours and memory of every parallelism for these devices.

    Args:
        teraflops: 10^12 floating-point operations that a device does in a second of training; measured when left out.

    Raises:
        ValueError: after printing, if the recipe does not fit into the memory of some of the devices.
    """
    num_classes, images_per_step = _describe_dataset(recipe, max_images)
    speeds = _seconds_per_image(recipe, num_classes, teraflops, cpu)

    def hours(networks: Sequence[Network]) -> float:
        seconds = (speeds[_kind(network)] * network.steps for network in networks)
        return sum(seconds) * images_per_step / 3600

    print_plan(list(_plan_ensembles(recipe, num_classes, images_per_step, hours)))
    job_hours, sharings, problems = [hours(job) for job in plan_jobs(recipe)], [], []
    for some in devices:
        rows = list(_plan_sharings(recipe, some, num_classes, job_hours))
        sharings += rows
        if not any(some.has_room(row.memory) for row in rows):
            try:
                choose_sharing(recipe, "auto", some, num_classes)
            except ValueError as error:
                problems.append(f"{some}: {error}")
    print_sharings(sharings, devices[0].memory)
    if problems:
        raise ValueError(" ".join(problems))


def _plan_ensembles(
    recipe: Recipe, num_classes: int, images_per_step: int, hours: Callable[[Sequence[Network]], float]
) -> Iterator[PlannedEnsemble]:
    for name, networks in plan_ensembles(recipe).items():
        steps = sum(network.steps for network in networks)
        count = sum(network.snapshots for network in networks)
        size = network_size(recipe, networks[0], num_classes)
        images = steps * images_per_step
        flops, parameters = size.training_flops(images), count * size.parameters
        yield PlannedEnsemble(name, count, steps, images, flops, parameters, hours(networks))


def _plan_sharings(
    recipe: Recipe, devices: Devices, num_classes: int, job_hours: Sequence[float]
) -> Iterator[PlannedSharing]:
    """What each parallelism does with the devices; "auto" keeps to their memory."""
    for parallelism in PARALLELISMS if devices.count > 1 else PARALLELISMS[:1]:
        limited = devices if parallelism == "auto" else replace(devices, memory=None)
        try:
            sharing = choose_sharing(recipe, parallelism, limited, num_classes)
        except ValueError as error:
            out.print(f"{devices}, parallelism={parallelism} is not possible: {error}", soft_wrap=True)
            continue
        memory, part = device_memory(recipe, sharing, num_classes), _images_in_a_pass(recipe, min(sharing.sizes))
        hours = sharing.finish(job_hours, devices.efficiency)
        yield PlannedSharing(devices.count, parallelism, str(sharing), hours, part, memory)


def _images_in_a_pass(recipe: Recipe, num_devices: int) -> int:
    return recipe.batch_size // (num_devices * recipe.gradient_accumulation)


def _describe_lack(recipe: Recipe, devices: Devices, needed: float) -> str:
    limit = devices.memory or 0
    part = f"batch_size={recipe.batch_size} with gradient_accumulation={recipe.gradient_accumulation}"
    remedies = [f"gradient_accumulation={count}" for count in _accumulations_with_room(recipe, devices)]
    remedies += [] if recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
    remedies += ["mixed_precision=bf16"] if recipe.mixed_precision == "no" else []
    remedies += [f"members_per_process below {recipe.members_per_process}"] if recipe.members_per_process > 1 else []
    advice = f"set {' or '.join(remedies)}" if remedies else "make batch_size smaller, or take more devices"
    need = f"needs about {needed / GIB:,.1f} GiB of each device's memory, and there are {limit / GIB:,.1f}"
    return f"{part} {need}; {advice}."


def _accumulations_with_room(recipe: Recipe, devices: Devices) -> list[int]:
    """The smallest number of parts of a batch with which it fits, if there is one."""
    for count in range(recipe.gradient_accumulation + 1, recipe.batch_size + 1):
        smaller = replace(recipe, gradient_accumulation=count)
        if recipe.batch_size % (count * devices.count):
            continue
        sharing = choose_sharing(smaller, "data", replace(devices, memory=None))
        if devices.has_room(device_memory(smaller, sharing)):
            return [count]
    return []


def _describe_dataset(recipe: Recipe, max_images: int | None) -> tuple[int, int]:
    """Classes, and images of a step. Where the dataset is not at hand, say what is assumed."""
    try:
        images = Images(recipe, Pixels.from_settings(recipe), max_images=max_images, with_test=False)
    except (OSError, ValueError) as error:
        assumed = f"{ASSUMED_CLASSES:,} classes and at least {recipe.batch_size:,} images"
        out.print(f"Assumed: {assumed}, since the dataset is not here: {first_line(error)}", soft_wrap=True)
        return ASSUMED_CLASSES, recipe.batch_size
    return len(images.class_names), images.images_per_step


def _seconds_per_image(recipe: Recipe, num_classes: int, teraflops: float | None, cpu: bool) -> dict[str, float]:
    """Seconds of a training step on one device for each image, by kind of network."""
    kinds = {_kind(network): network for network in reversed(plan_networks(recipe))}  # the first one of each kind
    if teraflops is None:
        return {kind: _measure(recipe, network, num_classes, cpu) for kind, network in kinds.items()}
    out.print(f"Assumed: {teraflops:g} TFLOP in each second of a device.")
    flops = {kind: network_size(recipe, network, num_classes).training_flops(1) for kind, network in kinds.items()}
    return {kind: each / (1e12 * teraflops) for kind, each in flops.items()}


def _measure(recipe: Recipe, network: Network, num_classes: int, cpu: bool) -> float:
    """Time a few steps on random images, and print what was measured."""
    settings = replace(recipe, **UNWATCHED, checkpoint_every=MEASURED_STEPS, gradient_accumulation=1)
    accelerator = create_accelerator(settings, cpu)
    device = accelerator.device
    flops = network_size(recipe, network, num_classes).training_flops(1)
    count = min(int(MEASURED_FLOPS.get(device.type, MEASURED_FLOPS["cpu"]) / flops), _images_in_a_pass(recipe, 1))
    kind, limit = {"model_args": network.model_args, "num_classes": num_classes}, memory_of_device(cpu)
    while limit and training_memory(settings, **kind, num_images=count) > limit:
        count //= 2
    count = max(count, 2)  # BatchNorm needs two
    set_seed(network.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = torch.randn(count, *recipe.input_size, device=device).to(memory_format=torch.channels_last)
    batch = Batch([], [(images, torch.randint(num_classes, (count,), device=device))], 1.0)
    model = timm.create_model(recipe.architecture, num_classes=num_classes, **network.model_args)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            accelerator, settings, [model], steps=MEASURED_STEPS, folder=Path(folder), identity={}, name="measurement"
        )
        steps = loop.run(lambda *_: itertools.repeat(batch), _loss, stops=range(1, MEASURED_STEPS))
        seconds = seconds_per_step(_synchronized(steps, device)) / count
    name, peak = "the CPU", ""
    if device.type == "cuda":
        name, computed = torch.cuda.get_device_name(device), training_memory(settings, **kind, num_images=count)
        peak = f", {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB (computed: {computed / GIB:.1f})"
    speed = f"{1 / seconds:,.1f} images per second, {flops / seconds / 1e12:.3g} TFLOP in each{peak}"
    out.print(f"Measured: {network.name}, {speed}, on {name} with {count} random images a step.", soft_wrap=True)
    return seconds


def _synchronized(steps: Iterator[int], device: torch.device) -> Iterator[int]:
    """The steps, each when the device has done it."""
    for step in steps:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield step


def _loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(network(images), labels)


def _kind(network: Network) -> str:
    return json.dumps(network.model_args)
