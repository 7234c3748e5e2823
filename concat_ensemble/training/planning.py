"""What a recipe trains: networks, the ensembles that they are for, and jobs, which are trained in one pass."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cache

from concat_ensemble.training.ledger import Size
from concat_ensemble.training.recipe import Recipe

SEEDS_PER_RUN = 1_000


@dataclass(frozen=True)
class Network:
    """One training: of a member of the ensemble `name`, or of all its members if they are snapshots."""

    name: str
    number: int
    steps: int
    seed: int
    model_args: dict
    snapshots: int = 1

    @property
    def folders(self) -> list[str]:
        """Folders of the members that the training gives."""
        return [f"members/{self.name}-{self.number + k}" for k in range(self.snapshots)]


def plan_networks(recipe: Recipe) -> list[Network]:
    """All networks of a recipe. Seeds do not depend on which other ensembles the recipe has."""
    networks, first = [], recipe.seed * SEEDS_PER_RUN
    for count in sorted(recipe.members):
        steps = recipe.total_steps // count if count > 1 else round(recipe.total_steps * (1 + recipe.baseline_extra))
        seeds = recipe.seeds or [first + count * (count - 1) // 2 + k for k in range(count)]
        networks += [Network(f"cat{count}", k, steps, seed, recipe.model_args) for k, seed in enumerate(seeds)]
    last = first + SEEDS_PER_RUN - 1
    if recipe.wide_steps:
        networks.append(Network("w2", 0, recipe.wide_steps, last, recipe.model_args | recipe.wide_model_args))
    if recipe.snapshots:
        name = f"cat{recipe.snapshots}-s"
        networks.append(Network(name, 0, recipe.total_steps, last - 1, recipe.model_args, recipe.snapshots))
    return networks


def plan_ensembles(recipe: Recipe) -> dict[str, list[Network]]:
    """The networks of each ensemble."""
    groups = itertools.groupby(plan_networks(recipe), key=lambda network: network.name)
    return {name: list(networks) for name, networks in groups}


def plan_jobs(recipe: Recipe) -> list[list[Network]]:
    """Groups of networks that are trained in one pass over the images."""
    size = recipe.members_per_process
    ensembles = plan_ensembles(recipe).values()
    return [networks[start : start + size] for networks in ensembles for start in range(0, len(networks), size)]


def job_flops(job: list[Network], recipe: Recipe) -> float:
    """What a job costs compared with others: its floating-point operations, up to a factor. It does not depend on the
    machine, so that a run that is continued shares its jobs among the processes as before.
    """
    return sum(network.steps * network_size(recipe, network, num_classes=1_000).flops for network in job)


def network_size(recipe: Recipe, network: Network, num_classes: int) -> Size:
    """The size of a network, which is computed once for all of its kind."""
    model_args = json.dumps(network.model_args)
    return _size(recipe.architecture, model_args, tuple(recipe.input_size), num_classes)


@cache
def _size(architecture: str, model_args: str, input_size: tuple[int, ...], num_classes: int) -> Size:
    return Size.measure(architecture, json.loads(model_args), input_size, num_classes)
