"""What a network costs for one image: parameters, floating-point operations and measured seconds."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.studies.results import Cost

if TYPE_CHECKING:
    from concat_ensemble.features.table import FeatureTable
    from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel

TIMED_BATCHES, MAX_IMAGES = 3, 64
BATCH_GFLOPS = {"cpu": 20, "cuda": 5_000}  # takes less than a second; a giant member is timed on one image


def count_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Count floating-point operations of one forward pass; multiplications and additions count one each.

    The module runs as it is, so call `eval()` first. Module and inputs may be on the meta device.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return counter.get_total_flops()


def member_costs(model: ConcatEnsemblePreTrainedModel, device: str | torch.device | None = None) -> list[Cost]:
    """The cost of one image for each built member of an ensemble.

    With a device, members are timed there: seconds of one CPU core or of the GPU, the median of three batches, without
    reading the images.
    """
    costs = []
    for name, member in model.members.items():
        pixels = torch.zeros(1, *model.config.members[int(name)]["preprocessing"]["input_size"])
        weight = next(member.parameters())
        gflops = count_flops(member, pixels.to(weight.device, weight.dtype)) / 1e9
        cost = Cost(gflops, sum(parameter.numel() for parameter in member.parameters()) / 1e6)
        if device is not None:
            cost.seconds = _time_one_image(member, pixels.to(weight.dtype), cost.gflops, torch.device(device))
        costs.append(cost)
    return costs


def feature_costs(table: FeatureTable) -> list[Cost]:
    """Costs that stand in for those of the networks of one's own features, which are not known: each member of the
    table counts for as many parameters as it has features, and twice as many operations.

    With them `select_members(table, feature_costs(table), table.member_names)` takes the member with fewer features
    for the cheaper one; give its real costs if you know them.
    """
    return [Cost(gflops=2e-9 * dim, million_parameters=1e-6 * dim) for dim in table.feature_dims]


def describe_hardware(device: str | torch.device) -> str:
    """Name of the hardware that `member_costs` timed the members on."""
    is_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_gpu else "one CPU core"


@torch.no_grad()
def _time_one_image(member: nn.Module, pixels: torch.Tensor, gflops: float, device: torch.device) -> float:
    """Seconds for each image of a batch of `pixels` (1, C, H, W)."""
    if next(member.parameters()).device.type != device.type:
        member = copy.deepcopy(member).to(device)
    batch_size = max(1, min(MAX_IMAGES, int(BATCH_GFLOPS.get(device.type, 20) / max(gflops, 1e-9))))
    batch, seconds = pixels.to(device).expand(batch_size, -1, -1, -1).contiguous(), []
    # The process's own time on a CPU is not stretched by other programs on a busy machine; a GPU has no such clock.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    # As in `extract_features`: without this, page faults on fresh memory may cost as much as the arithmetic.
    with keep_freed_memory():
        for _ in range(1 + TIMED_BATCHES):  # the first batch warms up
            started = clock()
            member(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((clock() - started) / batch_size)
    return statistics.median(seconds[1:])
