"""The terminal: consoles for results and for messages, and a way to silence other libraries."""

import wrapt
from rich.console import Console

out = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def be_quiet() -> None:
    """Show our own progress bars only. Other libraries are silenced when they are imported; none is imported here."""
    wrapt.register_post_import_hook(lambda logging: logging.disable_progress_bar(), "datasets.utils.logging")
    wrapt.register_post_import_hook(_silence_transformers, "transformers.utils.logging")


def _silence_transformers(logging) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
