"""How several processes train the networks of a run, as a `Sharing` plans it.

While all processes train one network, they form one team, which averages their gradients. When each team trains its
own network, no process group reaches beyond a team, so no gradient can. Teams share a key-value store only, that of
the launcher's rendezvous.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import torch
from accelerate.state import AcceleratorState
from torch import distributed

from concat_ensemble.errors import first_line
from concat_ensemble.processes import count_launched, forget_launch
from concat_ensemble.training.sharing import Sharing

POLL_SECONDS = 0.5
FAILED = "failed"  # key under which a team says why it has ended


def count_processes() -> int:
    """The number of processes that the launcher started.

    Raises:
        ValueError: if this process cannot know of the others, or has no GPU of its own.
    """
    count, started = count_launched(), int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {started} processes without a launcher, and each would train everything; start one "
            "accelerate launch on each machine, as training/slurm.sh does."
        )
    return count


class Team:
    """The team of this process. Create it before any `Accelerator`, which then takes the team for all processes.

    Raises:
        ValueError: if this process has no GPU of its own.
    """

    def __init__(self, sharing: Sharing, cpu: bool):
        _warn_if_single()
        self.sharing, self._use_gpu = sharing, not cpu and torch.cuda.is_available()
        self._rank_of_all, self._local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        if self._use_gpu and self._local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self._local_rank} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; launch as many processes as GPUs (--num_processes), or use --cpu."
            )
        self.is_main_process = self._rank_of_all == 0
        self.number, self.rank, self.size = 0, self._rank_of_all, sharing.num_devices
        self._store = open_store() if sharing.apart and sharing.num_devices > 1 else None

    def __str__(self) -> str:
        count = self.sharing.num_devices
        networks = f"{self.sharing.num_jobs} network{'s' if self.sharing.num_jobs > 1 else ''}"
        return f"one process, {networks}" if count == 1 else f"{count} processes, {networks}: {self.sharing}"

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of processes) within the team."""
        return self.rank, self.size

    def run(self, train: Callable[[int], None]) -> None:
        """Call `train` with the number of each training that the team of this process runs. The main process waits for
        all teams.

        Raises:
            OSError: in the main process, if another team has failed.
        """
        try:
            for number in self.sharing.together:
                train(number)
            if self._store is None:
                return
            self._form_team(self._store)
            for number in self._take(self._store):
                train(number)
                if self.rank == 0:
                    self._store.set(f"job {number} is done", "yes")
        except BaseException as error:
            if self._store is not None:
                reason = first_line(error) if isinstance(error, Exception) else "it was ended."
                with suppress(RuntimeError):  # the machine that has the store may be gone
                    self._store.set(FAILED, reason)
            raise
        if self.is_main_process:
            _wait_for_teams(self._store, [f"job {number} is done" for number in self.sharing.apart])

    def _take(self, store: distributed.Store) -> Iterator[int]:
        """The trainings of this team. The first is fixed: else a fast team could leave a larger one without any."""
        for turn in range(len(self.sharing.apart)):
            key = f"team {self.number}, turn {turn}"
            if self.rank == 0:
                place = len(self.sharing.teams) + store.add("taken", 1) - 1 if turn else self.number
                store.set(key, str(place))
            place = int(store.get(key))  # the other processes of the team wait here
            if place >= len(self.sharing.apart):
                return
            yield self.sharing.apart[place]

    def _form_team(self, store: distributed.Store) -> None:
        """Make the team all that accelerate sees: by its environment variables, and by a process group if needed."""
        if distributed.is_initialized():  # for the networks that all processes have trained
            distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        teams = self.sharing.teams
        self.number = next(number for number, ranks in enumerate(teams) if self._rank_of_all in ranks)
        self.rank, self.size = teams[self.number].index(self._rank_of_all), len(teams[self.number])
        if self._use_gpu:
            os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{self._local_rank}"
            torch.cuda.set_device(self._local_rank)
        if self.size == 1:
            forget_launch()
            return
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        store = distributed.PrefixStore(f"team {self.number}", store)
        backend = "nccl" if self._use_gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)


def _wait_for_teams(store: distributed.Store, keys: list[str]) -> None:
    for key in keys:
        while not store.check([key]):
            if store.check([FAILED]):
                reason = store.get(FAILED).decode()
                raise OSError(f"another team has failed: {reason} The same command continues.")
            time.sleep(POLL_SECONDS)


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
