"""What a training costs, before it begins and after it has ended."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch
from rich.table import Table

from concat_ensemble.console import PlainConsole
from concat_ensemble.studies.cost import count_flops

PASSES = 3  # a training step costs as much as three forward passes, since the backward pass takes about two
WARM_UP_STEPS, MEASURED_STEPS = 2, 7  # the first two of seven steps are not timed


@dataclass(frozen=True)
class Size:
    """Size of a network: floating-point operations of a forward pass of one image (multiplications and additions count
    one each), and number of weights.
    """

    flops: int
    parameters: int

    @classmethod
    def measure(cls, architecture: str, model_args: dict, input_size: Sequence[int], num_classes: int) -> "Size":
        with torch.device("meta"):
            network = timm.create_model(architecture, num_classes=num_classes, **model_args).eval()
            flops = count_flops(network, torch.zeros(1, *input_size))
        return cls(flops, sum(parameter.numel() for parameter in network.parameters()))

    def training_flops(self, images: int) -> float:
        """Floating-point operations of training on a number of images."""
        return float(PASSES * self.flops * images)


@dataclass(frozen=True)
class PlannedEnsemble:
    """The cost of training one ensemble."""

    name: str
    networks: int
    steps: int  # of all its networks together
    images: int
    flops: float
    parameters: int
    hours: float  # on one device

    def to_cells(self) -> list[str]:
        """The table row, under `HEADINGS`."""
        counts = [self.name, str(self.networks), f"{self.steps:,}", f"{self.images:,}", f"{self.flops / 1e15:,.3f}"]
        weights = self.parameters / 1e6
        return [*counts, f"{weights:.2f}", f"{4 * weights:,.1f}", f"{self.hours:.3f}"]


HEADINGS = ("", "networks", "steps", "images", "PFLOP", "million parameters", "disk, MB", "hours")


def print_plan(ensembles: Sequence[PlannedEnsemble], processes: int, device: torch.device) -> None:
    """Print the cost of each ensemble and of all, and which ensembles cost the same within 1%."""
    console = PlainConsole()
    table = Table(title=f"Plan, measured on {device.type}: hours on one device")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for ensemble in ensembles:
        table.add_row(*ensemble.to_cells())
    console.print(table)
    hours = sum(ensemble.hours for ensemble in ensembles)
    devices = f"{processes} such device{'s' if processes > 1 else ''}"
    console.print(
        f"Together {hours:.3f} hours, {hours / processes:.3f} on {devices}; while a network trains, its checkpoints "
        "take about three times its disk space."
    )
    for a, b in itertools.combinations(ensembles, 2):
        if abs(a.flops - b.flops) <= 0.01 * max(a.flops, b.flops):
            petaflops = f"{a.flops / 1e15:,.3f} and {b.flops / 1e15:,.3f} PFLOP"
            console.print(f"Equal compute: {a.name} and {b.name} ({petaflops}).")


def seconds_per_step(steps: Iterable[int]) -> float:
    """Time a loop that yields after every step."""
    for number, _ in enumerate(steps, 1):
        if number == WARM_UP_STEPS:
            started = time.perf_counter()
        if number == MEASURED_STEPS:
            return (time.perf_counter() - started) / (MEASURED_STEPS - WARM_UP_STEPS)
    raise ValueError(f"a measurement needs {MEASURED_STEPS} steps.")
