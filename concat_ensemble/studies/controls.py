"""The controls: what could explain a concatenation's gain other than what its members learned."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, DatasetDict

from concat_ensemble.console import show_progress
from concat_ensemble.data.bad_images import BadImages, usable_rows
from concat_ensemble.data.images import describe_read_error, open_file, open_image
from concat_ensemble.data.labels import class_names, read_groups, read_labels
from concat_ensemble.features.table import FeatureTable, Rows
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image, read_channels, scale_channel
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel, ConcatEnsemblePreTrainedModel

PIXEL_SIDE = 32


def untrained_like(model: ConcatEnsemblePreTrainedModel, seed: int) -> ConcatEnsembleModel:
    """An ensemble with the same architectures and random weights: as many features, none of them learned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConcatEnsembleModel(type(model.config).from_dict(model.config.to_dict())).eval()


def pixel_table(
    dataset: DatasetDict, mode: str | Sequence[int], *, skip_bad: bool = False, quiet: bool = False
) -> FeatureTable:
    """Raw pixels as features in one block: what a probe achieves without any network.

    One image at a time is in memory, beside the table of one byte per feature, or of four for channels by number.

    Args:
        mode: The PIL mode to which images are converted, such as `L`, or the numbers of their channels to take. If
            larger than 32x32, or of several sizes, they are also resized.
        skip_bad: Leave images out that cannot be read, as `extract_features` does.
        quiet: Show no progress.

    Raises:
        ValueError: naming all images that cannot be read, or with `skip_bad` if no image of a split or class is left.
    """
    splits: dict[str, Dataset] = {str(name): split for name, split in dataset.items()}
    bad: BadImages = {name: {} for name in splits}
    with show_progress("raw pixels", sum(map(len, splits.values())), quiet=quiet) as advance:
        size = _common_size(splits, mode)
        length = size[0] * size[1] * len(mode)  # of one of PIL's modes L and RGB, or of channels
        dtype = np.uint8 if isinstance(mode, str) else np.float32
        pixels = {name: np.zeros((len(split), length), dtype) for name, split in splits.items()}
        for name, row, images in _read_images(splits, mode, bad):
            resized = [image if image.size == size else image.resize(size) for image in images]
            pixels[name][row] = np.concatenate([np.asarray(image).ravel() for image in resized])
            advance()
        advance(sum(map(len, bad.values())))
    rows = usable_rows(splits, bad, skip_bad=skip_bad)
    groups = read_groups(splits)
    return FeatureTable(
        {name: [PixelRows(pixels[name][rows[name]] if bad[name] else pixels[name])] for name in splits},
        {name: read_labels(split)[rows[name]] for name, split in splits.items()},
        class_names(splits["train"]),
        groups=None if groups is None else {name: groups[name][rows[name]] for name in splits},
        skipped={name: sorted(bad[name]) for name in splits} if any(bad.values()) else None,
    )


class PixelRows(Rows):
    """Pixels (N, D) of 8 bits, read as float32 from 0 to 1, or floats."""

    def __init__(self, pixels: np.ndarray):
        super().__init__(pixels.shape, np.dtype(np.float32))
        self._pixels = pixels

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        pixels = self._pixels[part]
        return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels


def _common_size(splits: Mapping[str, Dataset], mode: str | Sequence[int]) -> tuple[int, int]:
    """(width, height) of all readable images if they are small and of one size, else 32x32. Of larger images, only the
    first is read."""
    common = None
    for _, _, (image, *_) in _read_images(splits, mode, {}):
        common = common or image.size
        if image.size != common or max(image.size) > PIXEL_SIDE:
            return PIXEL_SIDE, PIXEL_SIDE
    return common or (PIXEL_SIDE, PIXEL_SIDE)


def _read_images(
    splits: Mapping[str, Dataset], mode: str | Sequence[int], bad: BadImages
) -> Iterator[tuple[str, int, list[PIL.Image.Image]]]:
    """(split, row, pictures) of all images, one image at a time: in this mode, or a picture for each channel. The
    others are added to `bad`."""
    for name, split in splits.items():
        for row in range(len(split)):
            try:
                images = _read_pixels(split[row]["image"], mode)
            except Exception as error:  # of all kinds: a damaged file may only fail when it is converted
                bad.setdefault(name, {})[row] = describe_read_error(error)
                continue
            yield name, row, images


def _read_pixels(encoded: dict, mode: str | Sequence[int]) -> list[PIL.Image.Image]:
    if isinstance(mode, str):
        return [convert_image(open_image(encoded), mode)]
    channels = read_channels(open_file(encoded), 1 + max(mode))
    planes = [scale_channel(channels, number) for number in mode]
    return [
        PIL.Image.fromarray(plane.astype(np.float32) / (255 if plane.dtype == np.uint8 else 1)) for plane in planes
    ]
