"""Parts of error messages."""

import difflib
import re
from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """An error's whole message in one line. Of an error in a worker process of torch's `DataLoader`, which torch gives
    with its traceback, it is the message alone."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker process", text):
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def suggest(name: object, names: Iterable[str], *, limit: int = 3) -> str:
    """The end of a sentence about an unknown name: "; did you mean resnet18 or resnet26?", or "." if none is similar.

    Args:
        name: The unknown name, of any type, since it may come from a file.
        names: The valid names.
        limit: Number of names to suggest at most.
    """
    similar = difflib.get_close_matches(str(name), list(names), n=limit, cutoff=0.7)
    return f"; did you mean {' or '.join(similar)}?" if similar else "."
