"""The terminal: where results and messages go, and how other libraries are kept from it."""

from rich.console import Console

out = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def be_quiet() -> None:
    """Leave our own progress bars the only ones."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
