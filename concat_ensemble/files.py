"""Files that are written whole or not at all, and YAML that is read with care."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

LONGEST, DEEPEST = 100_000, 16  # characters, and levels of nesting: far beyond any recipe
_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It takes the place of `path` when the block ends without an error, so that a
    kill leaves either what was there or all of what is new. The parent folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.unlink(missing_ok=True)  # if it were a link, its target would be written
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`. It takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    aside.chmod(0o777 & ~_umask())  # mkdtemp makes folders for the owner alone
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
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read_yaml(path: Path) -> Any:
    """What a YAML file says, in plain values. Aliases are refused: ten lines of them say a billion words.

    Raises:
        ValueError: naming the file.
    """
    depth = 0
    try:
        text = path.read_text()
        if len(text) > LONGEST:
            raise ValueError(f"{len(text):,} characters are more than {LONGEST:,}")
        for token in yaml.scan(text):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if isinstance(token, yaml.AliasToken) or depth > DEEPEST:
                raise ValueError("it has an alias, or is nested too deeply; write out what you mean")
        return yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # PyYAML's constructors let those of int, datetime and others through
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
