"""What a training costs, before it begins and after it has ended."""

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch
from rich.table import Table

from concat_ensemble.console import PlainConsole, out
from concat_ensemble.studies.cost import count_flops

PASSES = 3  # a training step costs as much as three forward passes, since the backward pass takes about two
WARM_UP_STEPS, MEASURED_STEPS = 2, 5  # the first two of five steps are not timed
GIB = 2**30


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
        counts = [self.name, str(self.networks), f"{self.steps:,}", f"{self.images:,}", _format(self.flops / 1e15)]
        weights = self.parameters / 1e6
        return [*counts, f"{weights:.2f}", f"{4 * weights:,.1f}", _format(self.hours)]


@dataclass(frozen=True)
class PlannedSharing:
    """What a number of devices would do with one `--parallelism`."""

    devices: int
    parallelism: str
    networks: str  # who trains what
    hours: float
    part: int  # images of a network that a device trains on in one pass
    memory: float  # bytes of a device

    def to_cells(self, limit: float | None) -> list[str]:
        """The table row, under `SHARING_HEADINGS`."""
        fits = limit is None or self.memory <= limit
        memory = f"{self.memory / GIB:,.1f}" + ("" if fits else " (too much)")
        return [str(self.devices), self.parallelism, self.networks, _format(self.hours), f"{self.part:,}", memory]


HEADINGS = ("", "networks", "steps", "images", "PFLOP", "million parameters", "disk, MB", "hours")
SHARING_HEADINGS = ("devices", "parallelism", "networks", "hours", "images in a pass", "GiB per device")


def print_plan(ensembles: Sequence[PlannedEnsemble]) -> None:
    """Print the cost of each ensemble and of all, and which ensembles cost the same within 1%."""
    _print_table("Hours on one device", HEADINGS, [ensemble.to_cells() for ensemble in ensembles])
    hours = sum(ensemble.hours for ensemble in ensembles)
    out.print(
        f"Together {_format(hours)} hours on one device; while a network trains, its checkpoints take about three "
        "times its disk space.",
        soft_wrap=True,
    )
    for a, b in itertools.combinations(ensembles, 2):
        if abs(a.flops - b.flops) <= 0.01 * max(a.flops, b.flops):
            petaflops = f"{_format(a.flops / 1e15)} and {_format(b.flops / 1e15)} PFLOP"
            out.print(f"Equal compute: {a.name} and {b.name} ({petaflops}).", soft_wrap=True)


def print_sharings(sharings: Sequence[PlannedSharing], limit: float | None) -> None:
    """Print how several devices would share the networks. `limit` is the memory of a device, in bytes."""
    memory = f" of {limit / GIB:,.0f} GiB" if limit else ""
    rows = [sharing.to_cells(limit) for sharing in sharings]
    _print_table(f"Until all is trained, on devices{memory}", SHARING_HEADINGS, rows)


def _format(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "parallelism") else "right")
    for row in rows:
        table.add_row(*row)
    PlainConsole(width=None if sys.stdout.isatty() else 140).print(table)


def seconds_per_step(steps: Iterable[int]) -> float:
    """Time a loop that yields after every step."""
    for number, _ in enumerate(steps, 1):
        if number == WARM_UP_STEPS:
            started = time.perf_counter()
        if number == MEASURED_STEPS:
            return (time.perf_counter() - started) / (MEASURED_STEPS - WARM_UP_STEPS)
    raise ValueError(f"a measurement needs {MEASURED_STEPS} steps.")
