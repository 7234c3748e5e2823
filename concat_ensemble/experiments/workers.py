"""How a process of a pool begins; nothing large is imported before other libraries are silenced."""

import signal
import sys

from concat_ensemble.console import be_quiet


def start_worker() -> None:
    """Take one core, show none of other libraries' warnings, and end without a traceback after Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    be_quiet()  # before torch is imported, here or for the pool's functions
    import torch

    torch.set_num_threads(1)
