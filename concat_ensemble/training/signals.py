"""Signals that ask a training to end: it finishes the step first, and its workers go on reading meanwhile."""

from __future__ import annotations

import os
import signal
import threading


class Signals:
    """Records SIGTERM and SIGINT, between `start` and `stop`, instead of exiting at once; a second Ctrl-C exits at
    once. The death of `accelerate launch`, which then no longer ends its processes, counts as SIGHUP.
    """

    def __init__(self):
        self.received: list[int] = []
        self._handlers = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def start(self) -> None:
        self._handlers = {n: signal.signal(n, self._record) for n in (signal.SIGTERM, signal.SIGINT)}

    def stop(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def __bool__(self) -> bool:
        if self._launcher not in (None, os.getppid()):
            self.received.append(signal.SIGHUP)
            self._launcher = None
        return bool(self.received)

    def _record(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received.append(number)


def outlive_signals(_worker: int) -> None:
    """Let a data loader's worker be ended by its training alone. Ctrl-C, and a cluster that ends a job, signal all
    processes at once, and without its workers a training could not finish its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parents_signal, daemon=True).start()


def _wait_for_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
