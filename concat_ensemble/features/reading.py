"""Reading images for an extraction: each is read once and hashed there, and decoded if its features are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from transformers import BaseImageProcessor

from concat_ensemble.data.images import describe_read_error, open_image, processor_input, read_encoded
from concat_ensemble.features.index import to_hashes
from concat_ensemble.features.store import Block
from concat_ensemble.modeling.image_processing_concat_ensemble import check_resizing, convert_image

OTHER_GEOMETRY = {"input_size": (3, 512, 512), "crop_pct": 1.0, "crop_mode": "center"}

Positions = tuple[int, ...]  # of the members that lack an image, among the built ones


class Image(NamedTuple):
    """An image to read."""

    split: str
    row: int
    image_hash: bytes | None  # where it is known already
    encoded: dict | None = None  # of a stream; else it is in row `row` of the split


class Batch(NamedTuple):
    """Images in the order in which they are read."""

    places: list[tuple[str, int]]  # split and row
    hashes: np.ndarray
    stored: np.ndarray  # whether every member has the image
    pixels: dict[Positions, tuple[list[int], torch.Tensor]]  # numbers in the batch, and `pixel_values` of these
    unreadable: dict[int, str]  # number in the batch -> why


class ImageReader(TorchDataset):
    """Batches of images: hashed, and with the `pixel_values` of those that some member lacks.

    Args:
        splits: Where the images are that do not come with their content.
        blocks: One per built member.
        make_processor: Gives the image processor of the members with these positions. None: hash only.
    """

    def __init__(
        self,
        splits: Mapping[str, Dataset],
        blocks: Sequence[Block],
        make_processor: Callable[[Positions], BaseImageProcessor] | None,
    ):
        self.splits, self.blocks, self.make_processor = splits, blocks, make_processor
        self._processors: dict[Positions, BaseImageProcessor] = {}

    @cached_property
    def _plain(self) -> dict[str, Dataset]:
        return {name: split.select_columns("image").with_format(None) for name, split in self.splits.items()}

    def __getitems__(self, images: Sequence[Image]) -> Batch:
        contents = [self._read(image) for image in images]
        hashes = to_hashes([image_hash for image_hash, _ in contents])
        lacking = np.array([block.find(hashes) < 0 for block in self.blocks])
        stored = np.asarray(~lacking.any(axis=0))
        batch = Batch([(image.split, image.row) for image in images], hashes, stored, {}, {})
        if self.make_processor is None:
            return batch
        decoded: dict[Positions, dict[int, torch.Tensor]] = {}
        for number in np.flatnonzero(~batch.stored).tolist():
            image, encoded = images[number], contents[number][1]
            if image.image_hash is not None:
                encoded = self._plain[image.split][image.row]["image"]
            positions = tuple(np.flatnonzero(lacking[:, number]).tolist())
            pixels = self._pixels(encoded, positions)
            if isinstance(pixels, str):
                batch.unreadable[number] = pixels
            else:
                decoded.setdefault(positions, {})[number] = pixels
        batch.pixels.update({positions: (list(own), _stack(own.values())) for positions, own in decoded.items()})
        return batch

    def _read(self, image: Image) -> tuple[bytes, dict | None]:
        """The hash, and the encoded image unless the hash was known already."""
        if image.image_hash is not None:
            return image.image_hash, None
        encoded = self._plain[image.split][image.row]["image"] if image.encoded is None else image.encoded
        return read_encoded(encoded, image.row)

    def _pixels(self, encoded: dict | None, positions: Positions) -> torch.Tensor | str:
        """`pixel_values`, or why the image cannot be read."""
        assert self.make_processor is not None
        if positions not in self._processors:
            self._processors[positions] = self.make_processor(positions)
        processor = self._processors[positions]
        try:
            # Our own processor, also one loaded from a repo, converts to what each member takes; others expect RGB.
            is_ours = hasattr(processor, "geometries")
            image = processor_input(encoded, processor) if is_ours else _open_rgb(encoded)
            return processor([image], return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # of all kinds: a damaged file may only fail in the processor
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            return describe_read_error(cause)


def read_batches(reader: ImageReader, images: Iterable[Sequence[Image]], **settings: Any) -> Iterator[Batch]:
    """Batches of these images; `settings` are those of `DataLoader`. torch wraps an error in a worker into its whole
    traceback; only its last line is raised."""
    try:
        yield from DataLoader(reader, batch_sampler=images, collate_fn=_keep, **settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def _keep(batch: Batch) -> Batch:
    return batch


def _stack(pixels: Iterable[torch.Tensor]) -> torch.Tensor:
    pixels = list(pixels)
    shapes = sorted({tuple(each.shape) for each in pixels})
    if len(shapes) > 1:
        problem = f"processor=... makes pixel_values of several shapes, such as {shapes[0]} and {shapes[-1]}"
        raise ValueError(f"{problem}; it must make one, by resizing or cropping.")
    return default_collate(pixels)


def _open_rgb(encoded: dict[str, Any] | None) -> PIL.Image.Image:
    """An image for a processor of another kind, which may enlarge the shorter side."""
    image = open_image(encoded)
    check_resizing(image.width, image.height, [OTHER_GEOMETRY])
    return convert_image(image, "RGB")
