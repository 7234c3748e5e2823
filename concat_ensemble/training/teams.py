"""How several processes share out several trainings.

One team of all processes trains each in turn and averages its gradients (`--parallelism data`); or as many teams as there are trainings, of
one process each where these suffice, take what is next until none is left (`--parallelism members`). A team is a world of its own: no process
group reaches beyond it, so no gradient can. Teams meet at a key-value store only, the one that the launcher keeps for its rendezvous.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import distributed

PARALLELISMS = ("data", "members")


class Team:
    """This process's team. To be made before any `Accelerator`, which then takes the team for the whole world.

    Args:
        parallelism: "data" or "members".
        jobs: How many trainings there are.
        cpu: Whether they run on the CPU.
    """

    def __init__(self, parallelism: str, jobs: int, cpu: bool):
        self.world, self.rank = (
            int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0))
        )
        self.teams = max(min(jobs, self.world), 1) if parallelism == "members" else 1
        self.number = self.rank * self.teams // self.world
        self.ranks = [rank for rank in range(self.world) if rank * self.teams // self.world == self.number]
        self._jobs, self._store = jobs, None
        if self.teams > 1:
            self._store = self._meet()
            self._secede(cpu)

    def __str__(self) -> str:
        if self.world == 1:
            return "one process"
        return f"{self.world} processes in {self.teams} team{'s' if self.teams > 1 else ''}"

    @property
    def leads_all(self) -> bool:
        return self.rank == 0

    def jobs(self) -> Iterator[int]:
        """The numbers of the trainings that fall to this team; each begins with one of its own, and whichever is free takes the next."""
        if self._store is None:
            yield from range(self._jobs)
            return
        for turn in range(self._jobs):
            told = f"team {self.number}, turn {turn}"
            if self.rank == self.ranks[0]:
                # The first one is fixed, or a team that is sooner there would leave a larger one without any.
                number = self.teams + self._store.add("taken", 1) - 1 if turn else self.number
                self._store.set(told, str(number))
            number = int(self._store.get(told))  # the others of the team wait here
            if number >= self._jobs:
                return
            yield number
            if self.rank == self.ranks[0]:
                self._store.set(f"job {number} is done", "yes")

    def wait_for_all(self) -> None:
        """On the process that leads all: until every team's trainings are done."""
        if self._store is not None and self.leads_all:
            self._store.wait([f"job {number} is done" for number in range(self._jobs)])

    def _meet(self):
        store, *_ = next(distributed.rendezvous("env://"))
        store.set_timeout(timedelta(days=365))  # a team waits as long as another trains
        return distributed.PrefixStore(f"teams, start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _secede(self, cpu: bool) -> None:
        local = os.environ.get("LOCAL_RANK", "0")
        if not cpu and torch.cuda.is_available():
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{local}"
            torch.cuda.set_device(int(local))
        if len(self.ranks) == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            return
        os.environ |= {"RANK": str(self.ranks.index(self.rank)), "WORLD_SIZE": str(len(self.ranks))}
        distributed.init_process_group(
            "gloo" if cpu or not torch.cuda.is_available() else "nccl",
            store=distributed.PrefixStore(f"team {self.number}", self._store),
            rank=self.ranks.index(self.rank),
            world_size=len(self.ranks),
        )


def processes_asked_for() -> int | None:
    """The --num_processes of the `accelerate launch` that started this process; None where none did, or it did not say. accelerate
    1.15 starts a single one for `--cpu`, and for a configuration of MULTI_CPU, without a word.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    with suppress(psutil.Error, OSError):
        words = psutil.Process().parent().cmdline()
        if "launch" in words and any("accelerate" in word for word in words[: words.index("launch")]):
            given, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
            config = given.config_file or (default_config_file if Path(default_config_file).is_file() else None)
            return given.num_processes or (load_config_from_file(config).num_processes if config else None)
    return None
