"""Parts of error messages: arguments by the names that a user knows, the system's errors in words, similar names."""

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNSET = object()
# The option of a command line that sets an argument, if there is one; None where functions are called from Python.
_find_option: Callable[[str], str | None] | None = None


@contextmanager
def name_options(find_option: Callable[[str], str | None]) -> Iterator[None]:
    """Let messages that are made inside name the options of a command line in place of the arguments of functions.

    Args:
        find_option: Returns the option, such as "--test-size", that sets an argument, or None if there is none.
    """
    global _find_option
    before, _find_option = _find_option, find_option
    try:
        yield
    finally:
        _find_option = before


def option_name(argument: str) -> str:
    """The option that is named after an argument, such as "--test-size"."""
    return f"--{argument.replace('_', '-')}"


def argument(name: str, value: Any = UNSET) -> str:
    """An argument as a message names it: "test_size=2", or "--test-size 2" where the command that runs has an option
    for it. If it has none, "validation size 0.2". Without a value, the name alone."""
    if _find_option is None:
        return name if value is UNSET else f"{name}={value!r}"
    option = _find_option(name) or name.replace("_", " ")
    if value is UNSET or value is True:
        return option
    if isinstance(value, dict):
        return " ".join(f"{option} {key}={each}" for key, each in value.items())
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{option} {shlex.quote(text.removesuffix('.0') if isinstance(value, float) else text)}"


def check_at_least(name: str, value: float | None, minimum: int, why: str = "") -> None:
    """Raise ValueError for an argument that is too small; None is none."""
    if value is not None and value < minimum:
        raise ValueError(f"{argument(name, value)} must be at least {minimum}{why}.")


def describe_error(error: Exception) -> str:
    """The message of an error. One of the system, such as "[Errno 2] No such file or directory: 'x.json'", is in plain
    words, "no such file: x.json", with the variable to set if the file is in a cache."""
    if not isinstance(error, OSError) or not error.strerror or not isinstance(error.errno, int):
        return _drop_number(str(error))
    if error.strerror != os.strerror(error.errno):  # a library's own words
        return _drop_number(error.strerror)
    reason = "no such file" if error.errno == errno.ENOENT else error.strerror[:1].lower() + error.strerror[1:]
    paths = (error.filename, error.filename2)
    names = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
    return f"{reason}{': ' if names else ''}{' -> '.join(names)}{_cache_remedy(error.errno, names[:1])}"


def _drop_number(text: str) -> str:
    text = re.sub(r"\[errno \d+\] ", "", text, flags=re.IGNORECASE)
    return text.replace("No such file or directory", "no such file")


def _cache_remedy(code: int, names: list[str]) -> str:
    """What to do about a file that cannot be written because of the place of a cache; empty for any other file."""
    for path in (Path(os.path.realpath(name)) for name in names):  # `resolve` fails for a link to itself
        for variable, cache in _cache_folders().items():
            is_inside = path.is_relative_to(cache) and not (code == errno.ENOENT and os.access(cache, os.F_OK))
            is_above = cache.is_relative_to(path) and not os.access(path, os.F_OK)
            if is_inside or is_above:
                return f"; set {variable}, or HF_HOME for all caches, to a folder that can be written"
    return ""


def _cache_folders() -> dict[str, Path]:
    """The folders of the Hub's and our own caches, by the variables that move them. What was not imported was not
    written to."""
    constants, config = sys.modules.get("huggingface_hub.constants"), sys.modules.get("datasets.config")
    names = ("HF_ASSETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE")
    folders = {name: getattr(constants, name, None) for name in names}
    folders |= {name: getattr(config, name, None) for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    return {name: Path(os.path.realpath(Path(folder).expanduser())) for name, folder in folders.items() if folder}


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (describe_error(error).splitlines() or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """An error's whole message in one line. Of an error in a worker process of torch's `DataLoader`, which torch gives
    with its traceback, it is the message alone."""
    text = describe_error(error)
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
