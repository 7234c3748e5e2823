"""What a training costs, before it begins and after it has ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

PASSES = 3  # of a forward pass's operations in a training step: the backward pass takes about two
WARM_UP, MEASURED = 2, 5  # steps


@dataclass(frozen=True)
class Size:
    """Of a network: floating-point operations of a forward pass of one image (additions and multiplications count one each), and weights."""

    flops: int
    parameters: int

    @classmethod
    def measure(cls, architecture: str, model_args: dict, input_size: Sequence[int], num_classes: int) -> Size:
        with torch.device("meta"):
            network = timm.create_model(architecture, num_classes=num_classes, **model_args).eval()
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                network(torch.zeros(1, *input_size))
        return cls(counter.get_total_flops(), sum(parameter.numel() for parameter in network.parameters()))

    def spent(self, images: int) -> float:
        """Floating-point operations of training on so many images."""
        return float(PASSES * self.flops * images)


@dataclass(frozen=True)
class Line:
    """One ensemble's part of a plan."""

    name: str
    networks: int
    steps: int  # of all its networks
    images: int
    flops: float
    parameters: int
    hours: float  # on one device


def print_plan(lines: Sequence[Line], processes: int, device: torch.device) -> None:
    console = Console(highlight=False)
    table = Table(title=f"Planned, measured on {device.type}: hours of one device")
    for heading in ("", "networks", "steps", "images", "PFLOP", "million parameters", "disk, MB", "hours"):
        table.add_column(heading, justify="left" if not heading else "right")
    for line in lines:
        table.add_row(
            line.name,
            str(line.networks),
            f"{line.steps:,}",
            f"{line.images:,}",
            f"{line.flops / 1e15:,.3f}",
            f"{line.parameters / 1e6:.2f}",
            f"{4 * line.parameters / 1e6:,.1f}",
            f"{line.hours:.3f}",
        )
    console.print(table)
    total = sum(line.hours for line in lines)
    console.print(
        f"Together {total:.3f} hours, {total / processes:.3f} on {processes} such device{'s' if processes > 1 else ''}; checkpoints take some three times "
        "a network's disk more while it trains."
    )
    for one, other in itertools.combinations(lines, 2):
        apart = abs(one.flops - other.flops) / max(one.flops, other.flops)
        if apart <= 0.01:
            console.print(
                f"Equal compute: {one.name} and {other.name} ({one.flops / 1e15:,.3f} and {other.flops / 1e15:,.3f} PFLOP)."
            )


def seconds_per_step(run_steps) -> float:
    """Of a loop that yields after every step."""
    for number, _ in enumerate(run_steps, 1):
        if number == WARM_UP:
            started = time.perf_counter()
        if number == WARM_UP + MEASURED:
            return (time.perf_counter() - started) / MEASURED
    raise ValueError(f"a measurement needs {WARM_UP + MEASURED} steps.")
