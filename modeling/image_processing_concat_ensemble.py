"""Images to the pixels of every member of an ensemble, as timm's evaluation transform makes them."""

import os
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import timm.data
import torch
from torch.nn.functional import pad
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from .configuration_concat_ensemble import ConcatEnsembleConfig
from .configuration_concat_ensemble import copy_payload
from .configuration_concat_ensemble import error_prefix
from .configuration_concat_ensemble import refuse_links
from .configuration_concat_ensemble import validate_preprocessing


def convert_image(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """The image upright and in PIL mode `mode` ("RGB" or "L").

    PIL's own `convert` ignores the EXIF rotation and cuts values off at 255. Here 16-bit values are divided by 257 and
    floats in 0..1 multiplied by 255. An alpha channel is dropped, as timm does: the colors beneath it are seen.

    Raises:
        ValueError: for an image of one pixel, and for values that are NaN, negative, or over 255 (floats) or 65,535.
    """
    if image.width * image.height < 2:
        raise ValueError("the image is 1x1 pixels, which shows nothing; remove it from the data.")
    image = PIL.ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image  # else a mere copy
    if image.mode[0] in "IF":  # I;16 and its variants, I, which some readers make of 16-bit files, and F
        values = np.asarray(image).astype(np.float32)
        low, high = values.min(), values.max()
        white = {"I": 255 if high < 256 else 65_535, "F": 1 if high < 2 else 255}.get(image.mode, 65_535)
        if not -0.01 <= low <= high <= 1.01 * white:
            raise ValueError(f"its values {low:g} to {high:g} must be 0..1, 0..255 or 16 bits, not NaN or infinite.")
        if white != 255:
            image = PIL.Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


class ConcatEnsembleImageProcessor(BaseImageProcessor):
    """
    Every member sees what `timm.data.create_transform(..., is_training=False)` makes of an image. Members that resize
    and crop alike share one slice; with several geometries the slices are stacked, each zero-padded on the right and
    below to the largest.

    Args:
        geometries (`list[dict]`): `ConcatEnsembleConfig.geometries`; use `from_config` rather than writing them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as transformers has it)

    def __init__(self, geometries: list[dict[str, Any]] | None = None, **kwargs):
        super().__init__(**kwargs)
        if not geometries or not isinstance(geometries, list | tuple):
            remedy = "use ConcatEnsembleImageProcessor.from_config(config) or from_pretrained(folder)"
            raise ValueError(f"geometries={geometries!r} must be a list of at least one geometry; {remedy}.")
        with error_prefix("geometries"):
            self.geometries = [validate_preprocessing(geometry) for geometry in geometries]
        settings = [{key: geometry[key] for key in geometry if key != "image_mode"} for geometry in geometries]
        self._transforms = [timm.data.create_transform(**each, is_training=False) for each in settings]

    @classmethod
    def from_config(cls, config: ConcatEnsembleConfig) -> "ConcatEnsembleImageProcessor":
        """The processor that matches a model with this configuration."""
        return cls(geometries=config.geometries)

    def preprocess(self, images, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """
        Args:
            images: One image or a list: PIL images, paths, URLs, or uint8 or [0, 1] float arrays or tensors, (H, W, C)
                or (C, H, W).
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values`, float32: (B, C, H, W) with one geometry, (B, G, C, H, W) with several. ValueError with the
            image's number in the batch if it cannot be read, has only one pixel or holds NaN.
        """
        if kwargs:
            raise ValueError(f"unknown arguments {sorted(kwargs)}; leave them out: the config fixes what members see.")
        if not (images := _flatten(images)):
            raise ValueError("images is empty; give at least one.")
        pixels = [self._create_pixels(number, image) for number, image in enumerate(images)]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    def _create_pixels(self, number: int, image) -> torch.Tensor:
        try:
            pil_image = _to_pil(image)
            slices = [
                transform(convert_image(pil_image, geometry["image_mode"]))
                for transform, geometry in zip(self._transforms, self.geometries, strict=True)
            ]
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # PIL's for a bad image
            path = f" ({image})" if isinstance(image, str | os.PathLike) else ""
            raise ValueError(f"image {number} of the batch{path}: {error}") from error
        channels, height, width = (max(axis) for axis in zip(*(s.shape for s in slices), strict=True))
        # A gray slice fills all channels.
        padded = [pad(s.expand(channels, -1, -1), (0, width - s.shape[2], 0, height - s.shape[1])) for s in slices]
        return padded[0] if len(padded) == 1 else torch.stack(padded)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        refuse_links(save_directory)
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        copy_payload(save_directory)
        return files

    def to_dict(self) -> dict[str, Any]:
        # Only config.json names the class: transformers' `pipeline` takes an `auto_map` here for a video processor's,
        # and asks whether to trust its code even if this package is installed.
        left_out = ("_transforms", "image_processor_type", "auto_map")
        return {key: value for key, value in super().to_dict().items() if key not in left_out}


def _flatten(images) -> list:
    """One image, a batch, or a list of them, as a list of single images."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _to_pil(image) -> PIL.Image.Image:
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        # `load_image` converts files to RGB before a 16-bit image can be scaled.
        return load_image(path) if path.startswith(("http://", "https://", "data:")) else PIL.Image.open(path)
    if isinstance(image, PIL.Image.Image):
        return image
    array = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3):
        expected = "a PIL image, a path, or an array of 2 or 3 dimensions"
        raise ValueError(f"{type(image).__name__} is not an image; give {expected}.")
    if array.dtype == np.uint16:
        array = (array / 257.0).round().astype(np.uint8)
    if not np.isfinite(array).all():
        raise ValueError("it has pixels that are NaN or infinite; remove or repair it.")
    return to_pil_image(array[None] if array.ndim == 2 else array)
