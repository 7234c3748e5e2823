"""What the processes of a training tell each other in every step, in one small all-reduce beside their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


class Exchange:
    """The losses, whether a process was told to end, and BatchNorm's running statistics, unless rank 0's are used.

    The statistics are averaged in each step rather than before each evaluation, as timm's `dist-bn` does: checkpoints
    and moving averages need those of all processes, and DDP replaces them by the first process's in the next step,
    when they are equal by now.
    """

    def __init__(self, accelerator: Accelerator, networks: Sequence[nn.Module], *, averages_statistics: bool):
        self.accelerator = accelerator
        self.statistics: list[torch.Tensor] = []
        if averages_statistics and accelerator.num_processes > 1:
            buffers = [buffer for network in networks for buffer in network.named_buffers()]
            self.statistics = [buffer for name, buffer in buffers if name.endswith(("running_mean", "running_var"))]
        self._flag: tuple[torch.Tensor, torch.cuda.Event] | None = None  # of the last step, on its way from the GPU

    @torch.no_grad()
    def __call__(self, losses: torch.Tensor, ends: bool) -> tuple[torch.Tensor, bool]:
        """The (K,) losses' means over the processes, and whether any process ends. With several GPUs, the latter is as
        of the step before, since none waits for the present one."""
        if self.accelerator.num_processes == 1:
            return losses, ends
        mean = self._average([torch.full_like(losses[:1], float(ends)), losses, *self.statistics])
        self._set_statistics(mean[2:])
        return mean[1], self._read_flag(mean[0])

    @torch.no_grad()
    def average_statistics(self) -> None:
        if self.statistics:
            self._set_statistics(self._average(self.statistics))

    def ends(self, ends: bool) -> bool:
        """Whether any process ends, at once."""
        flag = torch.tensor(float(ends), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag))

    def _set_statistics(self, values: list[torch.Tensor]) -> None:
        if values:
            torch._foreach_copy_(self.statistics, values)

    def _average(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Means over the processes."""
        flat: Any = self.accelerator.reduce(torch.cat([tensor.float().flatten() for tensor in tensors]), "mean")
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _read_flag(self, flag: torch.Tensor) -> bool:
        if flag.device.type != "cuda":
            return bool(flag)
        event, last = torch.cuda.Event(), self._flag
        self._flag = flag.to("cpu", non_blocking=True), event
        event.record()
        if last is None:
            return False
        last[1].synchronize()
        return bool(last[0])
