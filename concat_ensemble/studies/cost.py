"""What an image costs: parameters, floating-point operations, and measured seconds."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.studies.results import Cost

TIMED_BATCHES, MOST_IMAGES = 3, 64
BATCH_GFLOPS = {"cpu": 20, "cuda": 5_000}  # less than a second; a giant member is timed on one image


def member_costs(model: nn.Module, device: str | torch.device | None = None) -> list[Cost]:
    """Of each built member of an ensemble, counted in a forward pass of one image; and timed on `device` if one is given
    (the median of three batches, without reading the images; seconds of one core, or of the GPU).
    """
    costs = []
    for name, member in model.members.items():
        pixels = torch.zeros(1, *model.config.members[int(name)]["preprocessing"]["input_size"])
        weight = next(member.parameters())
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            member(pixels.to(weight.device, weight.dtype))
        parameters = sum(parameter.numel() for parameter in member.parameters())
        cost = Cost(counter.get_total_flops() / 1e9, parameters / 1e6)
        if device is not None:
            cost.seconds = _seconds(member, pixels.to(weight.dtype), cost.gflops, torch.device(device))
        costs.append(cost)
    return costs


def hardware(device: str | torch.device) -> str:
    """On what was timed, for people."""
    is_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_gpu else "one CPU core"


@torch.no_grad()
def _seconds(member: nn.Module, pixels: torch.Tensor, gflops: float, device: torch.device) -> float:
    if next(member.parameters()).device.type != device.type:
        member = copy.deepcopy(member).to(device)
    images = max(1, min(MOST_IMAGES, int(BATCH_GFLOPS.get(device.type, 20) / max(gflops, 1e-9))))
    batch, taken = pixels.to(device).expand(images, -1, -1, -1).contiguous(), []
    # A core's own time, which other programs on a busy machine do not stretch; a GPU has no such clock.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    # As `extract_features` runs it: else faults on fresh pages may cost as much as the arithmetic.
    with keep_freed_memory():
        for _ in range(1 + TIMED_BATCHES):  # the first one warms up
            started = clock()
            member(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((clock() - started) / images)
    return statistics.median(taken[1:])
