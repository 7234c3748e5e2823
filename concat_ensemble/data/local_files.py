"""Which files of this machine a dataset may name as its images.

A table from elsewhere can name any file, such as a device, a pipe or a private photograph. Its images are opened only
if they are below the folder that it came in.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets.config
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HUB_CACHE

from concat_ensemble.console import printable
from concat_ensemble.data.sources import DIGITS, identify_source

pc: Any = pyarrow.compute  # whose functions are made as it is imported
Split = TypeVar("Split", Dataset, IterableDataset)


def confine_files(split: Split, kind: str, name: Any) -> Split:
    """The split of the dataset `name` whose images, in the column `image`, may be opened where they are files. Those
    of a stream are checked as they are read.

    Raises:
        ValueError: naming the row whose image is an address or a file elsewhere. A dataset in memory, which the user's
            own code made, may name any file; in a folder of images, links may lead elsewhere.
    """
    source = identify_source(str(name)) if isinstance(name, str | Path) and name != DIGITS else None
    resolve = os.path.abspath if source and source[0] == "imagefolder" else os.path.realpath
    folders = source and [os.path.join(resolve(folder), "") for folder in _own_folders(*source)]  # noqa: PTH118
    check = partial(_check_path, kind=kind, folders=folders, resolve=resolve)
    if isinstance(split, IterableDataset):
        return split.map(partial(_check_row, check), with_indices=True, features=split.features)
    images = split.data.column("image")
    paths = pc.struct_field(images, "path")
    paths = pc.if_else(pc.is_null(pc.struct_field(images, "bytes")), paths, pa.scalar(None, paths.type))
    if split._indices is not None:  # of the paths alone, since `take` copies what it takes
        paths = paths.take(split._indices.column(0))
    for row, path in enumerate(paths.to_pylist()):
        if path is not None:
            check(row, path)
    return split


def _check_row(check: Any, example: dict[str, Any], row: int) -> dict[str, Any]:
    image = example["image"]
    if image and image["bytes"] is None and image["path"] is not None:
        check(row, image["path"])
    return example


def _check_path(row: int, path: str, *, kind: str, folders: list[str] | None, resolve: Callable[[str], str]) -> None:
    if "://" in path:
        problem = f"the images of the {kind} split are addresses, such as {printable(path[:200])}"
        raise ValueError(f"{problem}; download them, and give a folder of images.")
    if folders is None:
        return
    place = ""
    with suppress(OSError, ValueError):  # of a name that no file can have
        place = resolve(path)
    if not place.startswith(tuple(folders)):
        problem = f"image {row} of the {kind} split is the file {path[:200]!r}, which is not below {folders[0]}"
        raise ValueError(f"{problem}; move it there, or make the dataset in Python and pass it to load_data.")


def _own_folders(builder: str, location: str) -> list[Path]:
    """The folders that the images of a dataset may lie in."""
    cache = [Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(datasets.config.EXTRACTED_DATASETS_PATH)]
    if builder == "hub":
        return [Path(HF_HUB_CACHE, f"datasets--{location.replace('/', '--')}"), *cache]
    if builder == "imagefolder":
        return [Path(location), *cache]  # `datasets` unpacks archives there
    path = Path(location)
    while set(str(path)) & set("*?[") and not path.exists():  # of a pattern, the folder above it
        path = path.parent
    return [path.parent if path.is_file() else path]
