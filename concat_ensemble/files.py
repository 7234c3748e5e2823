"""Writing files whole or not at all, and reading YAML safely."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES, MAX_DEPTH = 100_000, 16  # far beyond any recipe


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It replaces `path` when the block ends without an error, so a killed
    process leaves either the old file or the whole new one. The parent folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.unlink(missing_ok=True)  # writing to a link would change its target
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    aside.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner alone
    try:
        yield aside
        if path.exists():
            path.rename(aside / ".replaced")
        aside.rename(path)
        shutil.rmtree(path / ".replaced", ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with an indent of one, whole or not at all."""
    with replace_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


def _umask() -> int:
    """The umask of the process, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_regular_files(folder: Path) -> None:
    """Raise OSError for a pipe, a socket or a device in a folder of an ensemble, or in its folders: whoever opens one
    may wait, or read, without end. Links are followed."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(f"{path} is not a regular file; remove it.")


def read_yaml(path: Traversable) -> Any:
    """Read a YAML file as plain values. Aliases are refused: ten lines of them can expand to a billion words.

    Raises:
        ValueError: for a file that is not YAML, too long, nested too deeply, or has aliases.
        OSError: for a file that cannot be opened.
    """
    content, depth = path.read_bytes(), 0
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"{len(content):,} bytes are more than {MAX_BYTES:,}")
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ValueError("it has an alias or is nested too deeply; write the values out")
        return yaml.safe_load(content)
    except Exception as error:  # PyYAML's constructors also raise the errors of int, datetime and others
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
