"""Writing files whole or not at all, reading YAML and NumPy's arrays safely, and paths without local folders."""

import ctypes
import errno
import glob
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from concat_ensemble.errors import suggest

MAX_BYTES, MAX_DEPTH = 100_000, 16  # far beyond any recipe
AT_CURRENT_FOLDER, RENAME_EXCHANGE = -100, 2  # of Linux
# Where a path begins that leads from the root, a home folder or a drive: at the start, or after what may stand before
# a path, as in imagefolder:/home/me/photos and resnet50=/home/me/x.pth. An address is none.
PATH_START = r"(?:(?<![^=:,\s\[('\"])(?:[\\/](?!/)|~[^\\/]*[\\/]|[A-Za-z]:[\\/](?!/))|^//|file:///)"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It replaces `path` when the block ends without an error, so a killed
    process leaves either the old file or the whole new one, and of several at once the last one wins. The parent
    folder is made; what killed processes have left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _name_aside(path)
    aside.unlink(missing_ok=True)  # writing to a link would change its target
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode & 0o777)  # safetensors gives access to the owner alone
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, is_stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place in one step when the block ends without an error, so
    a killed process leaves either the old folder or the whole new one, and of several at once the last one wins. What
    killed processes have left is removed.

    Files of the old folder that the new one does not have go along, as the same files and not as copies, links as
    links; except those that are stale, by their name in the folder.

    Raises:
        OSError: if the new folder has a file where the old one has a folder or a link, or if something in the old one
            is on another disk; then nothing changes.
    """
    path = path.resolve()
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.exists() and not path.exists():  # a kill between the two steps of `_exchange`
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    with folder_beside(path) as aside:
        yield aside
        give_usual_access(aside)
        if path.exists():
            _link_rest(path, aside, is_stale)
        _exchange(aside, path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make an empty folder beside `path`, and remove it in the end. What killed processes have left is removed."""
    aside = _name_aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _name_aside(path: Path) -> Path:
    """The path beside `path` to which this thread writes it: no other writes there. Those of processes that are no
    more, and that of earlier versions, which all processes shared, are removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*tmp"):
        writer = re.fullmatch(r"(?:(\d{1,9})-\d+\.)?tmp", left.name[len(path.name) + 2 :])
        if writer and not (writer[1] and psutil.pid_exists(int(writer[1]))):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")


def give_usual_access(folder: Path) -> None:
    """Give the files below a folder that was just made the access that new files have there: safetensors gives it to
    the owner alone."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _link_rest(old: Path, new: Path, is_stale: Callable[[str], bool]) -> None:
    """Give `new` the files of `old` that it does not have, and its folders the access rights of those of `old`."""

    def skip(folder: str, names: list[str]) -> set[str]:
        skipped = set()
        for name in names:
            source = Path(folder, name)
            target = new / source.relative_to(old)
            if target.exists() and (source.is_symlink() or source.is_dir() != target.is_dir()):
                raise FileExistsError(
                    f"{source} is where a {'folder' if target.is_dir() else 'file'} is written; move it."
                )
            if target.is_file() or is_stale(source.relative_to(old).as_posix()):
                skipped.add(name)
        return skipped

    shutil.copytree(old, new, symlinks=True, ignore=skip, copy_function=_link, dirs_exist_ok=True)
    for folder in (new, *(path for path in new.rglob("*") if path.is_dir() and not path.is_symlink())):
        source = old / folder.relative_to(new)
        with suppress(PermissionError):  # only root, and members of a group, can give to others
            if source.is_dir():
                shutil.chown(folder, source.stat().st_uid, source.stat().st_gid)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EXDEV:  # a mounted folder, which would be deleted with the old folder
            raise
        shutil.copy2(source, target)  # on a file system without hard links


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders: in one step on Linux, where the file system can. `second` may be missing."""
    if not second.exists():
        first.rename(second)
        return
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = AT_CURRENT_FOLDER, os.fsencode(first), AT_CURRENT_FOLDER, os.fsencode(second)
    if swap and swap(*paths, RENAME_EXCHANGE) == 0:
        return
    replaced = second.with_name(f".{second.name}.replaced")
    second.rename(replaced)
    first.rename(second)
    replaced.rename(first)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with an indent of one, whole or not at all."""
    with replace_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


def without_folders(text: str) -> str:
    """What may be published of an argument or of the name of a dataset: of an absolute path only its last part. In a
    list, such as [/home/me/a, /home/me/b], of each."""
    end = r"[^,\]}'\"]*" if text.startswith(("[", "{")) else r".*"
    return re.sub(PATH_START + end, lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], text, flags=re.DOTALL)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repo on the Hub, such as "me/two-resnets" or "me/two-resnets@main", and is not
    that of a file or folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?", name)) and not Path(name).exists()


def describe_missing_folder(folder: str | Path) -> str:
    """Error message for a folder that does not exist, with the name of a similar one beside it."""
    return f"no such folder: {folder}{suggest_folder(folder)}"


def suggest_folder(folder: str | Path) -> str:
    """The end of a sentence about a folder that does not exist: "; did you mean photos?" for a similar one beside it,
    else "."."""
    beside = (str(path) for path in Path(folder).parent.glob("*") if path.is_dir())
    return suggest(folder, beside, limit=1)


def is_special(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_regular_files(folder: Path) -> None:
    """Raise OSError for a folder that does not exist, and for a pipe, a socket or a device in a folder of an ensemble,
    or in its folders: whoever opens one may wait, or read, without end. Links are followed."""
    if not folder.exists():
        raise FileNotFoundError(describe_missing_folder(folder))
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if is_special(path):
            raise OSError(f"{path} is not a regular file; remove it.")


def read_yaml(path: Traversable) -> Any:
    """Read a YAML file as plain values. Raises ValueError naming the file as `parse_yaml` does, and OSError for a file
    that cannot be opened."""
    try:
        with path.open("rb") as file:
            return parse_yaml(file.read(MAX_BYTES + 1))
    except ValueError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error


def parse_yaml(content: bytes, max_bytes: int = MAX_BYTES) -> Any:
    """The plain values that YAML holds. Aliases are refused: ten lines of them can expand to a billion words.

    Raises ValueError for what is not YAML, too long, nested too deeply, or has aliases.
    """
    depth = 0
    try:
        if len(content) > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ValueError("it has an alias or is nested too deeply; write the values out")
        return yaml.safe_load(content)
    except Exception as error:  # PyYAML's constructors also raise the errors of int, datetime and others
        raise ValueError(" ".join(str(error).split())) from error


def check_array(file: IO[bytes], size: int) -> None:
    """Read the header of an array in NumPy's format. Raises ValueError unless exactly its numbers follow, up to the
    end of the `size` bytes of the file, because NumPy allocates memory for what a header claims."""
    import numpy as np  # here, since commands import this module to start

    try:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
    except Exception as error:  # NumPy evaluates the header, which may fail in every way
        raise ValueError(f"it has no header of an array ({' '.join(str(error).split())[:200]})") from error
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"it is an array of {str(dtype)[:200]}, not of numbers")
    claimed, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != actual:
        raise ValueError(f"its header claims {claimed:,} bytes, and {actual:,} follow")
