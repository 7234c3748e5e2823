"""How several processes share several trainings.

With `--parallelism data`, all processes form one team, which runs one training after the other and averages the
gradients of its processes. With `--parallelism members`, there are as many teams as trainings, or one for each process
if there are fewer processes; each team takes the next training until none is left. No process group reaches beyond a
team, so no gradient can. Teams share a key-value store only, that of the launcher's rendezvous.
"""

import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed


class Team:
    """The team of this process, for `num_jobs` trainings with a parallelism of "data" or "members". Create it before
    any `Accelerator`, which then takes the team for all processes.
    """

    def __init__(self, parallelism: str, num_jobs: int, cpu: bool):
        _warn_if_single()
        self.num_processes = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        teams = split_processes(self.num_processes, num_jobs if parallelism == "members" else 1)
        self.num_teams, self.num_jobs = len(teams), num_jobs
        self.number = next(number for number, ranks in enumerate(teams) if rank in ranks)
        self.rank, self.size = teams[self.number].index(rank), len(teams[self.number])
        self.is_main_process = rank == 0
        self._store = None
        if self.num_teams > 1:
            self._store = open_store()
            self._form_group(self._store, cpu)

    def __str__(self) -> str:
        if self.num_processes == 1:
            return "one process"
        return f"{self.num_processes} processes in {self.num_teams} team{'s' if self.num_teams > 1 else ''}"

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of processes) within the team."""
        return self.rank, self.size

    def jobs(self) -> Iterator[int]:
        """Numbers of the trainings that this team runs. Its first one is fixed; then it takes whichever is next."""
        if self._store is None:
            yield from range(self.num_jobs)
            return
        for turn in range(self.num_jobs):
            key = f"team {self.number}, turn {turn}"
            if self.rank == 0:
                # Were the first one not fixed, a fast team could leave a larger team without any.
                number = self.num_teams + self._store.add("taken", 1) - 1 if turn else self.number
                self._store.set(key, str(number))
            number = int(self._store.get(key))  # the other processes of the team wait here
            if number >= self.num_jobs:
                return
            yield number
            if self.rank == 0:
                self._store.set(f"job {number} is done", "yes")

    def wait_for_all(self) -> None:
        """Wait in the main process until the trainings of all teams are done."""
        if self._store is not None and self.is_main_process:
            self._store.wait([f"job {number} is done" for number in range(self.num_jobs)])

    def _form_group(self, store: distributed.Store, cpu: bool) -> None:
        """Make the team all that accelerate sees: by its environment variables, and by a process group if needed."""
        use_gpu = not cpu and torch.cuda.is_available()
        if use_gpu:
            local_rank = os.environ.get("LOCAL_RANK", "0")
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{local_rank}"
            torch.cuda.set_device(int(local_rank))
        if self.size == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            return
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        store = distributed.PrefixStore(f"team {self.number}", store)
        backend = "nccl" if use_gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)


def split_processes(num_processes: int, num_jobs: int) -> list[list[int]]:
    """Ranks of each team: at most one team for each job, of sizes that differ by one at most."""
    num_teams = max(min(num_jobs, num_processes), 1)
    teams: list[list[int]] = [[] for _ in range(num_teams)]
    for rank in range(num_processes):
        teams[rank * num_teams // num_processes].append(rank)
    return teams


def _warn_if_single() -> None:
    """Warn if `accelerate launch` was asked for several processes and started this one alone, as with its own `--cpu`.

    It then exports the address for a rendezvous, but no number of processes, which torchrun would.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print(
            "warning: accelerate launch was asked for several processes and started one. For several processes on the "
            "CPU, pass --multi_gpu to accelerate launch and --cpu to this script.",
            file=sys.stderr,
        )


def open_store() -> distributed.Store:
    """The store that all processes of a start share."""
    store, *_ = next(distributed.rendezvous("env://"))
    store.set_timeout(timedelta(days=365))  # a team waits as long as another one trains
    return distributed.PrefixStore(f"teams, start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
