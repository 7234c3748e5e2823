"""Images to the pixels of every member of an ensemble, as timm's evaluation transform makes them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import timm.data
import torch
from torch.nn.functional import pad
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ChannelDimension, load_image
from transformers.processing_utils import ImagesKwargs

from .configuration_concat_ensemble import AUTO_MAP, PREPROCESSING_KEYS
from .configuration_concat_ensemble import ConcatEnsembleConfig
from .configuration_concat_ensemble import copy_payload
from .configuration_concat_ensemble import error_prefix
from .configuration_concat_ensemble import refuse_links
from .configuration_concat_ensemble import validate_preprocessing

# What transformers' image processors can be told about the pixels, and timm's transform. The config fixes it here.
SETTINGS = {*ImagesKwargs.__annotations__, *PREPROCESSING_KEYS}
# The values that change nothing.
NEUTRAL_SETTINGS = {
    "data_format": "channels_first",
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": False,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
}
# What can be set in a call, but not at loading.
CALL_SETTINGS = ("device", "do_rescale", "do_resize", "input_data_format", "return_tensors")
# How a processor in a folder of its own names its class. The last key holds transformers' `pipeline` back from taking
# the `auto_map` for a video processor's and asking whether to trust its code, even if this package is installed.
CLASS_KEYS = {
    "auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]},
    "image_processor_type": "ConcatEnsembleImageProcessor",
    "video_processor_type": "none",
}


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
        high = values.max()
        white = {"I": 255 if high < 256 else 65_535, "F": 1 if high < 2 else 255}.get(image.mode, 65_535)
        _check_range(values, white)
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
        size (`int` or `dict`, *optional*): Input size of all members in place of their own, which the model takes if
            its config has `dynamic_img_size`: the side of a square, or `{"height": 96, "width": 128}`. `crop_pct` and
            the rest stay. `from_pretrained` takes it, too; all else that would change the pixels is refused.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as transformers has it)

    def __init__(self, geometries: list[dict[str, Any]] | None = None, size: int | dict | None = None, **kwargs):
        _check_settings({name: value for name, value in kwargs.items() if name in SETTINGS})
        super().__init__(**{name: value for name, value in kwargs.items() if name not in {*SETTINGS, *CLASS_KEYS}})
        if not geometries or not isinstance(geometries, list | tuple):
            remedy = "use ConcatEnsembleImageProcessor.from_config(config) or from_pretrained(folder)"
            raise ValueError(f"geometries={geometries!r} must be a list of at least one geometry; {remedy}.")
        with error_prefix("geometries"):
            self.geometries = [validate_preprocessing(geometry) for geometry in geometries]
        if size is not None:
            self.geometries = [_resize_geometry(self.geometries, size)]
        settings = [{key: geometry[key] for key in geometry if key != "image_mode"} for geometry in self.geometries]
        self._transforms = [timm.data.create_transform(**each, is_training=False) for each in settings]

    @classmethod
    def from_config(cls, config: ConcatEnsembleConfig) -> "ConcatEnsembleImageProcessor":
        """The processor that matches a model with this configuration."""
        return cls(geometries=config.geometries)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        # transformers would set attributes of a finished processor. It also passes on what is meant for a model, such
        # as a pipeline's `model_kwargs`: other names are left to it, which ignores or returns them.
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name in {"geometries", *SETTINGS}}
        changes = {name: value for name, value in settings.items() if value is not None}
        return super().from_dict(image_processor_dict | changes, **kwargs)

    @property
    def size(self) -> dict[str, int]:
        """Height and width of `pixel_values`."""
        height, width = (max(geometry["input_size"][axis] for geometry in self.geometries) for axis in (1, 2))
        return {"height": height, "width": width}

    @property
    def image_mean(self) -> list[float]:
        """Mean with which the first geometry's pixels are normalized; `pixel_values` has one geometry or several."""
        return list(self.geometries[0]["mean"])

    @property
    def image_std(self) -> list[float]:
        """Standard deviation with which the first geometry's pixels are normalized."""
        return list(self.geometries[0]["std"])

    def preprocess(
        self,
        images,
        return_tensors: str | None = "pt",
        *,
        size: int | dict | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list: PIL images, paths, URLs, or arrays or tensors, (H, W), (H, W, C) or (C, H, W),
                gray or RGB, with or without alpha, which is dropped; a 4-dimensional one is a batch. Floats up to 1
                mean 0..1, else 0..255; integers mean 0..255, or 16 bits if one is above 255 and in uint16.
            return_tensors: `"pt"` or `"np"`.
            size: As for the class, for this call.
            do_resize: `False` neither resizes nor crops: the images must have the members' input size.
            do_rescale: `False` says that the images are floats in 0..1, which is checked.
            input_data_format: `"channels_first"` or `"channels_last"`; default: where there are 1 or 3, else 2 or 4.
            device: Where to put `pixel_values`; they are made on the CPU.
            kwargs: Other arguments of transformers' image processors, only with the value that changes nothing.

        Returns:
            `pixel_values`, float32: (B, C, H, W) with one geometry, (B, G, C, H, W) with several. ValueError with the
            image's number in the batch if it cannot be read, has only one pixel or holds NaN.
        """
        _check_settings(kwargs)
        processor = self if size is None else type(self)(self.geometries, size=size)
        if not (images := _flatten(images)):
            raise ValueError("images is empty; give at least one.")
        options = {"do_resize": do_resize, "do_rescale": do_rescale, "input_data_format": input_data_format}
        pixels = [processor._create_pixels(number, image, **options) for number, image in enumerate(images)]
        return BatchFeature({"pixel_values": torch.stack(pixels).to(device)}, tensor_type=return_tensors or "pt")

    def _create_pixels(self, number: int, image, **options) -> torch.Tensor:
        try:
            slices = self._create_slices(image, **options)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # PIL's for a bad image
            path = f" ({image})" if isinstance(image, str | os.PathLike) else ""
            raise ValueError(f"image {number} of the batch{path}: {error}") from error
        channels, height, width = (max(axis) for axis in zip(*(s.shape for s in slices), strict=True))
        # A gray slice fills all channels.
        padded = [pad(s.expand(channels, -1, -1), (0, width - s.shape[2], 0, height - s.shape[1])) for s in slices]
        return padded[0] if len(padded) == 1 else torch.stack(padded)

    def _create_slices(self, image, *, do_resize, do_rescale, input_data_format) -> list[torch.Tensor]:
        """What each geometry makes of an image, normalized."""
        picture, slices = _to_pil(image, do_rescale is False, input_data_format), []
        for geometry, transform in zip(self.geometries, self._transforms, strict=True):
            converted = convert_image(picture, geometry["image_mode"])
            slices.append(_transform_image(converted, transform, geometry, do_resize is not False))
        return slices

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        refuse_links(save_directory)
        files = super().save_pretrained(save_directory)
        copy_payload(save_directory)
        if push_to_hub:  # with the code
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in ("_transforms", *CLASS_KEYS)}

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        # An ensemble's config.json names the class of the processor beside it.
        config = Path(json_file_path).with_name("config.json")
        is_named = config.is_file() and CLASS_KEYS["image_processor_type"] in config.read_text(errors="replace")
        settings = self.to_dict() | ({} if is_named else CLASS_KEYS)
        Path(json_file_path).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError for a setting that would change what members see. None stands for the default, as with
    transformers' own processors."""
    for name, value in settings.items():
        is_neutral = name == "disable_grouping" or (name in NEUTRAL_SETTINGS and value == NEUTRAL_SETTINGS[name])
        if value is None or is_neutral:
            continue
        remedy = "pass it when you call the processor" if name in CALL_SETTINGS else "leave it out"
        raise ValueError(f"{name}={value!r} cannot be set, since the config fixes what members see; {remedy}.")


def _resize_geometry(geometries: list[dict[str, Any]], size: Any) -> dict[str, Any]:
    """A copy of the only geometry with another input size."""
    if len(geometries) > 1:
        remedy = "leave it out, or assemble with preprocessing='shared' and dynamic_img_size=True"
        raise ValueError(f"size={size!r} cannot be set: members resize and crop in {len(geometries)} ways; {remedy}.")
    sides = get_size_dict(size)
    if set(sides) != {"height", "width"}:
        raise ValueError(f"size={size!r} must be a whole number or have the keys height and width alone.")
    channels = geometries[0]["input_size"][0]
    return validate_preprocessing(geometries[0] | {"input_size": [channels, sides["height"], sides["width"]]})


def _transform_image(
    image: PIL.Image.Image, transform: Any, geometry: dict[str, Any], do_resize: bool
) -> torch.Tensor:
    """What timm's transform makes of an image in its mode, or its end, without resizing and cropping."""
    if do_resize:
        return transform(image)
    height, width = geometry["input_size"][1:]
    if image.size != (width, height):
        shape = f"{image.width}x{image.height}"
        raise ValueError(f"do_resize=False needs images of {width}x{height} pixels, not {shape}; leave it out.")
    to_tensor, normalize = transform.transforms[-2:]
    return normalize(to_tensor(image))


def _flatten(images) -> list:
    """One image, a batch, or a list of them, as a list of single images."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _to_pil(image, is_scaled: bool = False, data_format: str | None = None) -> PIL.Image.Image:
    """`image` as a PIL image. `is_scaled`: whether it must be floats in 0..1."""
    is_array = not isinstance(image, str | os.PathLike | PIL.Image.Image)
    values = _to_array(image) if is_array else None
    if is_scaled and (values is None or values.dtype.kind != "f" or values.max() > 1.01):
        raise ValueError("do_rescale=False needs an array of floats in 0..1; leave it out for 0..255.")
    if values is not None:
        return PIL.Image.fromarray(_scale_to_bytes(_put_channels_last(values, data_format)))
    if isinstance(image, PIL.Image.Image):
        return image
    path = os.fspath(image)
    # `load_image` converts files to RGB before a 16-bit image can be scaled.
    return load_image(path) if path.startswith(("http://", "https://", "data:")) else PIL.Image.open(path)


def _to_array(image) -> np.ndarray:
    """The values of an array, a tensor or what NumPy can make an array of."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16
    array = np.asarray(image)
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # JAX's bfloat16
        array = array.astype(np.float32)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or not array.size:
        expected = "a PIL image, a path, or an array of 2 or 3 dimensions"
        raise ValueError(f"{type(image).__name__} is not an image; give {expected}.")
    return array


def _put_channels_last(array: np.ndarray, data_format: str | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) as (H, W) or (H, W, C). `data_format`: where the channels are, if known."""
    if array.ndim == 2:
        return array
    first, last = array.shape[0], array.shape[-1]
    is_first = first in (1, 3) or (last not in (1, 3) and first in (2, 4))
    if data_format is not None:
        is_first = ChannelDimension(data_format) == ChannelDimension.FIRST
    array = np.moveaxis(array, 0, -1) if is_first else array
    if array.shape[-1] > 4:
        raise ValueError(f"an array of shape {array.shape} is not an image; give 1 to 4 channels, first or last.")
    return array[..., 0] if array.shape[-1] == 1 else array


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, 0..255 or 16 bits, rounded to uint8; see `preprocess` for which are which."""
    if values.dtype == np.uint8:
        return values
    high = values.max()
    if values.dtype.kind == "f":
        white = 1 if high < 2 else 255
    else:
        white = 1 if values.dtype.kind == "b" else 255 if high < 256 and values.dtype != np.uint16 else 65_535
    _check_range(values, white)
    return (values * (255 / white)).round().clip(0, 255).astype(np.uint8)


def _check_range(values: np.ndarray, white: int) -> None:
    """Raise ValueError for values that an image with this white cannot have, beyond rounding errors."""
    low, high = values.min(), values.max()
    if not -0.01 <= low <= high <= 1.01 * white:
        raise ValueError(f"its values {low:g} to {high:g} must be 0..1, 0..255 or 16 bits, not NaN or infinite.")
