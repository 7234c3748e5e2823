"""How much memory of a device a training step needs, computed without running it.

The forward and backward pass run on torch's fake tensors, which have a shape and no memory, at the real batch size;
what lives at the same time is added up. So it takes a second on a laptop, for any batch.
"""

from __future__ import annotations

import json
import math
import weakref
from contextlib import suppress
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from concat_ensemble.training.optimizers import create_optimizer
from concat_ensemble.training.recipe import NetworkSettings, Settings

RESERVED = 2**30  # bytes for CUDA itself and the workspaces of its libraries, about


def memory_of_device(cpu: bool) -> float | None:
    """Bytes of a GPU's memory; None on the CPU, whose memory is not planned."""
    return None if cpu or not torch.cuda.is_available() else torch.cuda.get_device_properties(0).total_memory


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the tensors that are made in its context and live at the same time, real or fake."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view of a tensor, or one changed in place
            return
        self._known[key] = weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def training_memory(
    settings: NetworkSettings,
    model_args: dict,
    *,
    num_classes: int,
    num_images: int,
    num_networks: int = 1,
    several_devices: bool = False,
) -> float:
    """Bytes of a GPU that trains `num_networks` networks of one kind, each on `num_images` images in one pass. With
    torch.compile it may be less.
    """
    kind = (settings.architecture, json.dumps(model_args), tuple(settings.input_size), num_classes)
    precise, checkpoints = settings.mixed_precision == "no", settings.gradient_checkpointing
    weights, of_pass = _measure_pass(*kind, num_images, precise, checkpoints)
    copies = 1 + _optimizer_copies(settings) + bool(settings.ema_decay) + several_devices  # the last: DDP's buckets
    gradients = weights  # while the networks are updated; all but one network's also while the last one runs
    pixels = 4 * num_images * settings.input_size[0] * settings.input_size[1] * settings.input_size[2]
    views = num_networks * 2 * pixels - pixels  # the next part is prepared while this one, in `of_pass`, is used
    accumulated = gradients if settings.gradient_accumulation > 1 else 0
    while_passing = (num_networks - 1) * gradients + accumulated + of_pass
    while_updating = (num_networks + 1) * gradients  # one network's update needs temporary values
    return RESERVED + num_networks * copies * weights + views + max(while_passing, while_updating)


@cache
def _measure_pass(
    architecture: str,
    model_args: str,
    input_size: tuple[int, ...],
    num_classes: int,
    num_images: int,
    precise: bool,
    checkpoints: bool,
) -> tuple[float, float]:
    """Bytes of the weights, and of what a forward and backward pass needs beside them: the images, what it keeps for
    the backward pass, and the gradients. NaN for a network whose computation depends on values.
    """
    with torch.device("meta"):
        network: Any = timm.create_model(architecture, num_classes=num_classes, **json.loads(model_args))
    if checkpoints:
        network.set_grad_checkpointing()
    with suppress(RuntimeError), FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu").train()
        weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        with PeakMemory() as memory:
            images, labels = torch.empty(num_images, *input_size), torch.empty(num_images, dtype=torch.long)
            # As on a GPU: the CPU's autocast computes almost the same layers in 16 bits.
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                outputs = network(images)
            cross_entropy(outputs.float(), labels).backward()
        return weights, memory.peak
    return math.nan, math.nan


def _optimizer_copies(settings: Settings) -> float:
    """How many times the memory of the weights the state of the optimizer takes, seen on a small layer."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer: Any = create_optimizer(layer, settings, 1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    layer(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    states = tree_leaves([*optimizer.state.values()])
    return sum(each.nbytes for each in states if isinstance(each, torch.Tensor)) / layer.weight.nbytes
