"""A lock on an output folder, held by all processes of one start: a second start is told who is writing there. After
`kill -9` of `accelerate launch`, its processes may go on for a while.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from torch import distributed

from concat_ensemble.processes import count_launched
from concat_ensemble.training.teams import open_store

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None

LOCK_FILE = ".lock"
PATIENCE = 5.0  # seconds; a process that was just ended may need some
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Hold the lock on an output folder, which is made. Each process of a start calls this, before it joins a team.

    Where the file system has no locks, it warns and goes on.

    Raises:
        ValueError: naming the processes of another start that hold it.
    """
    if folder.is_file():
        raise ValueError(f"output={folder} is a file; name a folder.")
    start, store = _share_start()  # the store's server may be this process, and lives as long as the store
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = _lock(path, start) if fcntl else None
    try:
        yield
    finally:
        if file is not None:
            _unlock(file, path)
        if is_new:
            with suppress(OSError):  # it has results by now
                folder.rmdir()
        del store


def _share_start() -> tuple[str, distributed.Store | None]:
    """An id that the processes of this start have in common with no others, and the store that shares it."""
    own = uuid.uuid4().hex
    if count_launched() == 1:
        return own, None
    store = open_store()
    return store.compare_set("start", "", own).decode(), store


def _lock(path: Path, start: str) -> IO[str] | None:
    """The open file with a shared lock. The first process of a start takes an exclusive lock to write the start's id.

    These are POSIX locks, which belong to a process: a data loader's worker that outlives it by seconds has none.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+")
        try:
            holders = _join(file, path, start)
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: {path.parent} is on a file system without locks; start one run at a time.", file=sys.stderr
            )
            return None
        if holders == []:
            return file
        file.close()
        if holders and time.monotonic() > deadline:
            advice = "wait for it, end it, or name another output="
            raise ValueError(f"output={path.parent} is in use by {_describe(holders)}; {advice}.")
        time.sleep(0.05)


def _join(file: IO[str], path: Path, start: str) -> list[dict] | None:
    """Join the processes of this start that hold the lock. Return those of another start instead if there are any, and
    None if it must be tried again.
    """
    if not _try_lock(file, exclusive=True):
        if not _try_lock(file, exclusive=False):
            return None  # another process is about to write, or to delete the file
    elif _is_at(file, path):
        file.truncate(0)  # those that it names are gone
    file.seek(0)
    holders = []
    for line in file:
        with suppress(ValueError):  # over NFS, processes on two machines may write at once
            holders.append(json.loads(line))
    if not _is_at(file, path):
        return None
    if others := [holder for holder in holders if holder["start"] != start]:
        return others
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file.write(json.dumps({"start": start, "host": socket.gethostname(), "process": os.getpid(), "since": now}) + "\n")
    file.flush()
    _try_lock(file, exclusive=False)
    return []


def _try_lock(file: IO[str], *, exclusive: bool) -> bool:
    """Take the lock, or change it to the other kind, without waiting."""
    assert fcntl
    try:
        fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of this name. Opening it again would give up the lock in the end."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unlock(file: IO[str], path: Path) -> None:
    """Give up the lock. The last process deletes the file."""
    with file, suppress(OSError):
        if _try_lock(file, exclusive=True) and _is_at(file, path):
            path.unlink()


def _describe(holders: list[dict]) -> str:
    """Those that run, as far as this machine can tell."""
    running = [holder for holder in holders if holder["host"] != socket.gethostname() or _runs(holder["process"])]
    first, *others = running or holders
    also = f" and {len(others)} more" if others else ""
    return f"process {first['process']}{also} on {first['host']} since {first['since']}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
