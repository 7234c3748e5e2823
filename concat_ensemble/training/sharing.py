"""How several devices share the networks of a run, and when they finish: pure functions of the costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARALLELISMS = ("data", "members", "auto")
WORTH = 0.01  # training a network on all devices must end the run sooner by this share, since it needs communication


@dataclass(frozen=True)
class Sharing:
    """First, all devices train the networks `together`, one after the other. Then teams of devices train those
    `apart`: each team begins with the network of its own number and takes whichever is next when it is free.
    """

    together: tuple[int, ...]
    apart: tuple[int, ...]
    teams: tuple[tuple[int, ...], ...]  # ranks of each team

    @property
    def num_devices(self) -> int:
        return sum(map(len, self.teams))

    @property
    def num_jobs(self) -> int:
        return len(self.together) + len(self.apart)

    @property
    def sizes(self) -> list[int]:
        """Numbers of devices that a network may be trained on."""
        teams = {len(team) for team in self.teams} if self.apart else set()
        return sorted(teams | ({self.num_devices} if self.together else set()))

    def fewest_devices(self, number: int) -> int:
        """The smallest number of devices that may train a network: any team may take any of those `apart`."""
        return self.num_devices if number in self.together else min(map(len, self.teams))

    def finish(self, costs: Sequence[float], efficiency: float = 1.0) -> float:
        """When all networks are trained, in the unit of their costs on one device. On m > 1 devices a network takes
        cost / (m * efficiency).
        """
        busy = [0.0] * len(self.teams)
        for turn, number in enumerate(self.apart):
            team = turn if turn < len(self.teams) else busy.index(min(busy))
            busy[team] += _time(costs[number], len(self.teams[team]), efficiency)
        return _time(sum(costs[number] for number in self.together), self.num_devices, efficiency) + max(busy)

    def __str__(self) -> str:
        """For example "1 on all, then 4 on teams of 2 + 2 + 2 + 2"."""
        parts = [f"{len(self.together)} on all"] if self.together else []
        if self.apart:
            sizes = [len(team) for team in self.teams]
            same = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
            parts.append(f"{len(self.apart)} on teams of {same}")
        return ", then ".join(parts)


def share_networks(
    parallelism: str, costs: Sequence[float], num_devices: int, *, batch_size: int, accumulation: int = 1
) -> list[Sharing]:
    """All ways in which devices can share networks with these costs, for a parallelism of `PARALLELISMS`: those with
    the fewest networks on all devices first.

    "data" trains each network on all devices. "members" has a team for each network, or for each device if there are
    fewer. "auto" leaves the choice: the most expensive networks on all devices, the others on teams.

    Raises:
        ValueError: if a batch cannot be divided evenly in any of them.
    """
    num_jobs = len(costs)
    if num_devices == 1 or num_jobs == 1:
        parallelism = "data"  # nothing to choose; the order stays that of the recipe
    order = sorted(range(num_jobs), key=lambda number: -costs[number])
    # A single network that the others leave to a team would have all devices as well.
    counts = {"data": [num_jobs], "members": [0], "auto": [*range(num_jobs - 1), num_jobs]}[parallelism]
    plans = [_share(order, num_devices, count) for count in counts]
    possible = [plan for plan in plans if not any(batch_size % (size * accumulation) for size in plan.sizes)]
    if not possible:
        sizes = " and of ".join(str(size) for size in plans[-1].sizes)
        parts = f"{sizes} processes x gradient_accumulation={accumulation}"
        raise ValueError(f"batch_size={batch_size} must be a multiple of {parts}; change one of them.")
    return possible


def finish_first(plans: Sequence[Sharing], costs: Sequence[float], efficiency: float = 1.0) -> Sharing:
    """The first plan that finishes within 1% of the earliest. With the order of `share_networks`, it has the fewest
    networks on all devices: a network of one device needs no communication, and is the same as without parallelism.
    """
    finishes = [plan.finish(costs, efficiency) for plan in plans]
    return next(plan for plan, finish in zip(plans, finishes, strict=True) if finish * (1 - WORTH) <= min(finishes))


def split_processes(num_processes: int, num_jobs: int) -> list[list[int]]:
    """Ranks of each team: at most one team for each job, of sizes that differ by one at most, the largest first."""
    num_teams = max(min(num_jobs, num_processes), 1)
    teams: list[list[int]] = [[] for _ in range(num_teams)]
    for rank in range(num_processes):
        teams[rank * num_teams // num_processes].append(rank)
    return sorted(teams, key=len, reverse=True)


def _share(order: Sequence[int], num_devices: int, num_together: int) -> Sharing:
    """The plan with the `num_together` first networks of `order` on all devices."""
    together, apart = sorted(order[:num_together]), order[num_together:]
    teams = split_processes(num_devices, len(apart))
    return Sharing(tuple(together), tuple(apart), tuple(map(tuple, teams)))


def _time(cost: float, num_devices: int, efficiency: float) -> float:
    return cost / (num_devices * efficiency if num_devices > 1 else 1)
