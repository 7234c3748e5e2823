"""Checks of output paths before the work starts, so that hours of it are not lost to a mistake in a path."""

import tempfile
from pathlib import Path

from concat_ensemble.errors import argument


def check_file(path: Path, overwrite: bool) -> None:
    """Raise ValueError where a new file cannot be written, or may not take the place of what is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with {argument('output')}.")
    if path.exists() and not overwrite:
        remedy = f"add {argument('overwrite', True)} or name another {argument('output')}"
        raise ValueError(f"{path} is there already; {remedy}.")
    check_parent(path)


def check_own_folder(folder: Path) -> None:
    """Raise OSError where a folder inside an ensemble's folder is a link, through which other files would change."""
    if folder.is_symlink():
        raise OSError(f"{folder} is a link to {folder.readlink()}; remove it.")


def check_parent(path: Path) -> None:
    """Raise ValueError where nothing can be written to the nearest existing folder above `path`."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        remedy = f"name another {argument('output')}"
        raise ValueError(f"{path} cannot be written ({error.strerror}); {remedy}.") from error
