"""How many threads a probe computes with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiply-adds of one pass over the rows. Below it a second thread saves nothing, and where other programs keep the
# cores busy, each of the thousands of short operations waits until the second thread has its turn.
SMALL = 8_000_000
_lock, _inside, _threads = threading.Lock(), 0, 1


@contextmanager
def pass_threads(num_rows: int, num_features: int, num_classes: int) -> Iterator[None]:
    """Compute with one thread where a pass over the rows is small. All threads of the process share the number: of
    several probes at once, the first one sets it and the last one sets it back."""
    global _inside, _threads
    if num_rows * num_features * num_classes > SMALL:
        yield
        return
    with _lock:
        if not _inside:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_threads)
