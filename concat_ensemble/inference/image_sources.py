"""Images to predict, without labels: the files of a folder, a split of a dataset, or images in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, IterableDataset

from concat_ensemble.console import printable
from concat_ensemble.data.columns import select_images
from concat_ensemble.data.folders import IMAGE_ENDINGS
from concat_ensemble.data.images import decode_image, processor_input
from concat_ensemble.data.loading import SCATTERED, load_data
from concat_ensemble.data.local_files import confine_files
from concat_ensemble.data.sources import identify_source, load_source
from concat_ensemble.data.splits import pick_split
from concat_ensemble.errors import argument


@dataclass(frozen=True)
class ImageSource:
    """Images by number, each with a name: its path within a folder, or its row in a dataset."""

    heading: str  # "file" or "row": what the names are
    names: list[str]
    images: Sequence[Any]  # paths, PIL images, arrays, or rows with an encoded `image`
    ignored: list[str] = field(default_factory=list)  # files of the folder that are no images

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, number: int) -> str:
        """The image in error messages; characters that would move a terminal's cursor are left out."""
        name = printable(self.names[number])
        return name if self.heading == "file" else f"image {name}"

    def read(self, number: int, processor: Any = None) -> Any:
        """Decode an image, or give what this image processor reads of it. Raises ValueError naming it if it cannot be
        read."""
        image = self.images[number]
        if isinstance(image, PIL.Image.Image | np.ndarray):
            return image
        encoded = {"bytes": None, "path": os.fspath(image)} if isinstance(image, str | Path) else image["image"]
        if not encoded or (encoded["bytes"] is None and not encoded["path"]):
            raise ValueError(f"{self.describe(number)} cannot be read: the row has no image; remove or repair it.")
        if processor is None:
            return decode_image(encoded, self.describe(number))
        try:
            return processor_input(encoded, processor)
        except ValueError as error:
            raise ValueError(f"{self.describe(number)} cannot be read: {error}; remove or repair it.") from error


def open_images(
    images: str | Path | Dataset | DatasetDict | Sequence[str | Path | PIL.Image.Image | np.ndarray],
    *,
    split: str | None = None,
    image_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> ImageSource:
    """Find the images to predict.

    Args:
        images: A folder, whose images are found at any depth; an image file; any dataset that `load_data` takes; or a
            list of paths, or of PIL images and arrays. A folder that `datasets` or parquet files were saved in is a
            dataset.
        split: Of a dataset, such as test or train[:100]. Default: its test split, or its only one.
        image_column, config, revision: Of a dataset, as in `load_data`.

    Raises:
        ValueError: for a folder without images, a dataset or split that does not exist, and for arguments of a dataset
            beside a folder or files.
    """
    options = {"split": split, "image_column": image_column, "config": config, "revision": revision}
    location = _find_files(images, split)
    if location is None and isinstance(images, str | Path | Dataset | DatasetDict | IterableDataset):
        return _open_dataset(images, **options)
    given = [argument(name) for name, value in options.items() if value is not None]
    if given:
        problem = f"{' and '.join(given)} go with a dataset, and these are files"
        raise ValueError(f"{problem}; leave them out, or name a dataset, as in imagefolder:FOLDER.")
    if location is None:
        return _open_list(images)
    if location.is_file():
        return ImageSource("file", [location.name], [location])
    return _open_folder(location)


def _find_files(images: Any, split: str | None) -> Path | None:
    """The folder or image file that is meant; None for datasets and lists."""
    if not isinstance(images, str | Path):
        return None
    prefix, _, location = str(images).partition(":")
    if prefix == "imagefolder" and split is None and Path(location).is_dir():
        return Path(location)
    path = Path(images)
    if path.is_file() and path.suffix.lower() in IMAGE_ENDINGS:
        return path
    return path if path.is_dir() and identify_source(str(images))[0] == "imagefolder" else None


def _open_folder(folder: Path) -> ImageSource:
    """All images below a folder, sorted by path. Hidden files and folders are left out."""
    names, ignored = [], []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = Path(parent, file).relative_to(folder).as_posix()
            if not file.startswith("."):
                (names if Path(file).suffix.lower() in IMAGE_ENDINGS else ignored).append(name)
    if not names:
        others = f" among {len(ignored):,} files" if ignored else ""
        raise ValueError(f"{folder} has no image{others} that PIL reads; name a folder of images, or a dataset.")
    names.sort()
    return ImageSource("file", names, [folder / name for name in names], sorted(ignored))


def _raise(error: OSError) -> None:
    raise error


def _open_list(images: Any) -> ImageSource:
    images = list(images)
    if not images:
        raise ValueError("images is empty; give at least one.")
    are_paths = all(isinstance(image, str | Path) for image in images)
    if not are_paths and not all(isinstance(image, PIL.Image.Image | np.ndarray) for image in images):
        raise ValueError("images must be paths, or PIL images and arrays, all of one kind.")
    names = list(map(os.fspath, images)) if are_paths else list(map(str, range(len(images))))
    return ImageSource("file" if are_paths else "row", names, images)


def _open_dataset(
    name: Any, *, split: str | None, image_column: str | None, config: str | None, revision: str | None
) -> ImageSource:
    if isinstance(name, str) and name.startswith(SCATTERED):  # which places images split by split
        source: Any = load_data(name, config=config, revision=revision, image_column=image_column)
    else:
        source = load_source(name, config=config, revision=revision)
    chosen = pick_split(source, "test", split)
    if chosen is None and len(source) == 1:
        chosen = next(iter(source.values()))
    if isinstance(chosen, IterableDataset):
        raise ValueError(
            "the images are a stream; give a dataset that is stored, such as Dataset.from_list(list(...))."
        )
    if chosen is None:
        raise ValueError(f"there is no test split among {', '.join(source)}; name one with {argument('split')}.")
    if not len(chosen):
        raise ValueError(f"the {split or 'test'} split is empty; name another with {argument('split')}.")
    column = None if isinstance(name, str) and name.startswith(SCATTERED) else image_column
    rows = select_images(chosen, split or "test", column)
    rows = confine_files(rows, split or "test", name)
    return ImageSource("row", list(map(str, range(len(rows)))), rows)  # pyright: ignore[reportArgumentType]
