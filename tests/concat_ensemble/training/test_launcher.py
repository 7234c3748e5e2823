"""What processes that are started together do one after the other."""

import multiprocessing
import os
import time

import pytest
from torch import distributed

from concat_ensemble.training.launcher import local_main_process_first


def prepare(rank: int, times, fails: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with local_main_process_first():
        times.put((rank, "begins", time.monotonic()))
        if rank == 0:
            time.sleep(0.3)
            times.put((rank, "ends", time.monotonic()))
            if fails:
                raise SystemExit(2)


@pytest.mark.parametrize("fails", [False, True])
def test_one_process_of_a_machine_prepares_what_the_others_then_find(fails, monkeypatch):
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("fork")
    times = context.Queue()
    processes = [context.Process(target=prepare, args=(rank, times, fails)) for rank in (1, 0)]
    for process in processes:
        process.start()
    seen = {(rank, what): when for rank, what, when in (times.get(timeout=60) for _ in range(3))}
    for process in processes:
        process.join(60)
    assert seen[1, "begins"] >= seen[0, "ends"], "even if the first one fails, which the others then do too"
    assert [process.exitcode for process in processes] == [0, 2 * fails]


def test_a_process_alone_does_not_wait(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with local_main_process_first():
        pass
