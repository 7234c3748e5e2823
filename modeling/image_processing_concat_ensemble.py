"""Images to the pixels of every member of an ensemble, as timm's evaluation transform makes them."""

import base64
import copy
import io
import itertools
import json
import math
import os
import reprlib
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import timm.data
import torch
from huggingface_hub import get_session
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from .configuration_concat_ensemble import AUTO_MAP, CHANNELS, HUB_ARGUMENTS, MAX_IMAGE_CHANNELS, MAX_MEMBERS
from .configuration_concat_ensemble import PREPROCESSING_KEYS
from .configuration_concat_ensemble import ConcatEnsembleConfig
from .configuration_concat_ensemble import check_json_size
from .configuration_concat_ensemble import copy_payload
from .configuration_concat_ensemble import error_prefix
from .configuration_concat_ensemble import refuse_links
from .configuration_concat_ensemble import refuse_methods
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
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of files; with a plus, of those above 4 GB
# Formats that datasets hold, and Pillow decodes itself: it hands EPS to Ghostscript, which runs it as a program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Bounds for a stranger's images. Pixels, of 4 bytes at most, are counted before memory is allocated for them: of all
# channels of a file, and what resizing takes. `pixel_values` of an image have a quarter as many numbers at most.
MAX_IMAGE_PIXELS, MAX_FILE_BYTES = 2**28, 2**32
ROWS = 256  # of an image that are converted at a time


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
        if image.width * image.height > MAX_IMAGE_PIXELS // 4:
            problem = f"{image.width}x{image.height} pixels of more than 8 bits are too many"
            raise ValueError(f"{problem}; cut it into smaller images.")
        values = np.asarray(image)
        high = values.max()
        white = {"I": 255 if high < 256 else 65_535, "F": 1 if high < 2 else 255}.get(image.mode, 65_535)
        _check_range(values, white)
        if white != 255:
            scaled = np.empty(values.shape, np.uint8)
            for row in range(0, len(values), ROWS):  # as floats, a large image would take gigabytes
                part = values[row : row + ROWS].astype(np.float32) * np.float32(255 / white)
                scaled[row : row + ROWS] = part.round().clip(0, 255)
            image = PIL.Image.fromarray(scaled)
    return image if image.mode == mode else image.convert(mode)


class ConcatEnsembleImageProcessor(BaseImageProcessor):
    """
    Every member sees what `timm.data.create_transform(..., is_training=False)` makes of an image. Members that resize
    and crop alike share one slice; with several geometries the slices are stacked, each zero-padded on the right and
    below to the largest.

    Args:
        geometries: `ConcatEnsembleConfig.geometries`; use `from_config` rather than writing them.
        size: Input size of all members in place of their own, which the model takes if its config has
            `dynamic_img_size`: the side of a square, or `{"height": 96, "width": 128}`. `crop_pct` and the rest stay.
            `from_pretrained` takes it, too; all else that would change the pixels is refused.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as transformers has it)

    def __init__(self, geometries: list[dict[str, Any]] | None = None, size: int | dict | None = None, **kwargs):
        _check_settings({name: value for name, value in kwargs.items() if name in SETTINGS})
        super().__init__(**{name: value for name, value in kwargs.items() if name not in {*SETTINGS, *CLASS_KEYS}})
        if not geometries or not isinstance(geometries, list | tuple) or len(geometries) > MAX_MEMBERS:
            remedy = "use ConcatEnsembleImageProcessor.from_config(config) or from_pretrained(folder)"
            content = reprlib.repr(geometries)[:200]
            raise ValueError(f"geometries={content} must be a list of 1 to {MAX_MEMBERS} geometries; {remedy}.")
        with error_prefix("geometries"):
            self.geometries = [validate_preprocessing(geometry, MAX_IMAGE_CHANNELS) for geometry in geometries]
        if size is not None:
            self.geometries = [_resize_geometry(self.geometries, size)]
        with error_prefix("geometries"):
            channels, *sides = (max(axis) for axis in zip(*(g["input_size"] for g in self.geometries), strict=True))
            if (numbers := len(self.geometries) * channels * math.prod(sides)) > MAX_IMAGE_PIXELS // 4:
                raise ValueError(f"an image would have {numbers:,} values, more than {MAX_IMAGE_PIXELS // 4:,}.")
            check_resizing(1, 1, self.geometries)
        self._transforms = [_create_transform(geometry) for geometry in self.geometries]
        self._num_channels = 1 + max((n for each in self.geometries for n in each.get(CHANNELS, ())), default=-1)

    @classmethod
    def from_config(cls, config: ConcatEnsembleConfig) -> "ConcatEnsembleImageProcessor":
        """The processor that matches a model with this configuration."""
        return cls(geometries=config.geometries)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        hub_arguments["_raise_exceptions_for_missing_entries"] = False  # transformers says that there is none
        if path := cached_file(pretrained_model_name_or_path, IMAGE_PROCESSOR_NAME, **hub_arguments):
            check_json_size(path)
        try:
            settings, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise OSError(f"{path} is nested too deeply for a processor; save it again.") from error
        if not isinstance(settings, dict):
            raise OSError(f"{path} must hold a JSON object, not {reprlib.repr(settings)}; save it again.")
        refuse_methods(cls, settings)
        return settings, kwargs

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
            images: One image or a list: PIL images, paths, URLs, open files, or arrays or tensors, (H, W), (H, W, C)
                or (C, H, W), gray or RGB, with or without alpha, which is dropped; a 4-dimensional one is a batch.
                Floats up to 1 mean 0..1, else 0..255; integers mean 0..255, or 16 bits if one is above 255 and in
                uint16. For members that name their channels, see `read_channels`.
            return_tensors: `"pt"` or `"np"`.
            size: As for the class, for this call.
            do_resize: `False` neither resizes nor crops: the images must have the members' input size.
            do_rescale: `False` says that the images are floats in 0..1, which is checked.
            input_data_format: `"channels_first"` or `"channels_last"`; default: where there are 1 or 3, else 2 or 4.
            device: Where to put `pixel_values`; they are made on the CPU.
            kwargs: Other arguments of transformers' image processors, only with the value that changes nothing.

        Returns:
            `pixel_values`, float32, (B, C, H, W) with one geometry and (B, G, C, H, W) with several. ValueError with
            the image's number in the batch if it cannot be read, has only one pixel or holds NaN.
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
        if len(slices) == 1:
            return slices[0]
        channels, height, width = (max(axis) for axis in zip(*(s.shape for s in slices), strict=True))
        pixels = slices[0].new_zeros(len(slices), channels, height, width)
        for padded, s in zip(pixels, slices, strict=True):  # a gray slice fills all channels; further ones are zero
            padded[: channels if len(s) == 1 else len(s), : s.shape[1], : s.shape[2]] = s
        return pixels

    def _create_slices(self, image, *, do_resize, do_rescale, input_data_format) -> list[torch.Tensor]:
        """What each geometry makes of an image, normalized."""
        channels: Any = None
        picture: Any = None
        is_scaled = do_rescale is False
        if self._num_channels:
            channels = read_channels(image, self._num_channels, input_data_format)
            if is_scaled and channels.dtype.kind != "f":
                raise ValueError("do_rescale=False needs an array of floats in 0..1; leave it out for others.")
            if not _is_file(image):
                image, input_data_format = channels[:3] if len(channels) == 4 else channels, "channels_first"
        if not all(CHANNELS in geometry for geometry in self.geometries):
            picture = _to_pil(image, is_scaled, input_data_format)
        if do_resize is not False:
            width, height = picture.size if picture else channels.shape[:0:-1]
            check_resizing(width, height, self.geometries)
        slices = []
        for geometry, transform in zip(self.geometries, self._transforms, strict=True):
            if CHANNELS in geometry:
                slices.append(_transform_channels(channels, geometry, transform, do_resize is not False))
            else:
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
        return {
            key: value
            for key, value in super().to_dict().items()
            if key not in ("_transforms", "_num_channels", *CLASS_KEYS)
        }

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
    if not isinstance(size, int | dict) and not (isinstance(size, list | tuple) and len(size) == 2):
        raise ValueError(f"size={reprlib.repr(size)} must be a whole number or height and width.")
    sides = get_size_dict(size)
    if set(sides) != {"height", "width"}:
        raise ValueError(f"size={size!r} must be a whole number or have the keys height and width alone.")
    channels = geometries[0]["input_size"][0]
    resized = geometries[0] | {"input_size": [channels, sides["height"], sides["width"]]}
    return validate_preprocessing(resized, MAX_IMAGE_CHANNELS)


def check_resizing(width: int, height: int, geometries: list[dict[str, Any]]) -> None:
    """Raise ValueError if it takes too much memory or time to make an image of this size fit for all geometries."""
    upright = sum(_count_pixels(width, height, geometry) for geometry in geometries)
    turned = sum(_count_pixels(height, width, geometry) for geometry in geometries)  # as EXIF may say
    if (pixels := max(upright, turned)) > MAX_IMAGE_PIXELS:
        problem = f"to resize {width}x{height} pixels takes memory for {pixels:,} pixels"
        raise ValueError(f"{problem}, more than {MAX_IMAGE_PIXELS:,}; cut the image into squares, or leave it out.")


def _count_pixels(width: int, height: int, geometry: dict[str, Any]) -> int:
    """Pixels, of 4 bytes, that Pillow holds to resize an image: what only has the new width yet, the result, and the
    weights of each row and column, of up to 56 bytes for every one before or after."""
    rows, columns = (math.floor(side / geometry["crop_pct"]) for side in geometry["input_size"][1:])
    if geometry["crop_mode"] != "squash":
        scale = (min if geometry["crop_mode"] == "border" else max)(columns / width, rows / height)
        rows, columns = math.ceil(height * scale), math.ceil(width * scale)
    pixels = columns * height + columns * rows + 14 * (max(width, columns) + max(height, rows))
    return pixels * len(geometry.get(CHANNELS, [0]))


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
    values = None if _is_file(image) else _to_array(image)
    if is_scaled and (values is None or values.dtype.kind != "f" or values.max() > 1.01):
        raise ValueError("do_rescale=False needs an array of floats in 0..1; leave it out for 0..255.")
    if values is not None:
        return PIL.Image.fromarray(_scale_to_bytes(_put_channels_last(values, data_format)))
    if not isinstance(image, PIL.Image.Image):
        return open_picture(image)
    if image.format == "EPS":
        raise ValueError("it is EPS, which Pillow has Ghostscript run as a program; save it as PNG.")
    return image


def open_picture(file) -> PIL.Image.Image:
    """Open a path, a web address, a data URL (both as `str`) or an open file; its pixels are read later.

    Raises:
        ValueError, OSError: if it is not a regular file, not a picture in one of `IMAGE_FORMATS`, or too large.
    """
    if hasattr(file, "read"):
        file.seek(0)
    elif isinstance(file, str) and file.startswith("data:"):
        file = io.BytesIO(base64.b64decode(file.partition(",")[2]))
    elif isinstance(file, str) and file.startswith(("http://", "https://")):
        file = io.BytesIO(get_session().get(file, timeout=None, follow_redirects=True).content)
    else:
        check_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the bounds here are stricter
        picture = PIL.Image.open(file, formats=IMAGE_FORMATS)
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels are too many; cut it into smaller images.")
    return picture


def check_file(path: str | os.PathLike) -> None:
    """Raise ValueError for a device, a pipe, an empty file, as the system's are, and one too large for an image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file.")
    if not 0 < status.st_size <= MAX_FILE_BYTES:
        content = f"{status.st_size:,} bytes, which is no image" if status.st_size else "empty"
        raise ValueError(f"the file is {content}.")


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
        remedy = "name those that a member sees, as in assemble(member, channels=[2, 1, 0])"
        raise ValueError(f"an array of shape {array.shape} is not an image; give 1 to 4 channels, or {remedy}.")
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


def read_channels(image, least: int = 1, input_data_format: str | None = None) -> np.ndarray:
    """The channels (C, H, W) of an image for members that name theirs: uint8, uint16 or float32.

    Args:
        image: An array or tensor, (H, W), (H, W, C) or (C, H, W), of these types, float16, bfloat16 or float64; or a
            PIL image, path or open file. A TIFF's channels are its pages, or the samples of its only page.
        least: Number of channels that it must have at least.
        input_data_format: `"channels_first"` or `"channels_last"`; found by the shape by default.

    Raises:
        ValueError: for fewer channels, for a shape that leaves open which axis has them, and for other types.
    """
    array = _read_bands(image) if _is_file(image) else _channels_first(_to_array(image), least, input_data_format)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype.type not in (np.uint8, np.uint16):
        remedy = "give uint8, uint16, or floats in the units of the members' mean and std"
        raise ValueError(f"its pixels are {array.dtype}; {remedy}.")
    if len(array) < least:
        remedy = "give an array or a TIFF with all of them"
        raise ValueError(f"it has {len(array)} channels, and members see channels up to number {least - 1}; {remedy}.")
    if array[0].size < 2:
        raise ValueError("the image is 1x1 pixels, which shows nothing; remove it from the data.")
    return array


def _channels_first(array: np.ndarray, least: int, input_data_format: str | None) -> np.ndarray:
    """An array (H, W), (H, W, C) or (C, H, W) as (C, H, W)."""
    formats = ("channels_first", "channels_last")
    if input_data_format not in (None, *formats):
        raise ValueError(f"input_data_format={input_data_format!r} must be {' or '.join(formats)}.")
    if array.ndim == 2:
        return array[None]
    name = input_data_format or _infer_data_format(array.shape, least)
    return array if name == "channels_first" else array.transpose(2, 0, 1)


def _infer_data_format(shape: tuple[int, ...], least: int) -> str:
    """Which end of a shape (C, H, W) or (H, W, C) has the channels: of a square image the end that differs, else one
    of at most half the length of both other axes, or of `least` entries."""
    first, middle, last = shape
    for name, end, other in (("channels_first", first, last), ("channels_last", last, first)):
        if middle == other != end or (first != middle != last and 2 * end <= min(middle, other)):
            return name
    if (first == least) != (last == least):
        return "channels_first" if first == least else "channels_last"
    remedy = "pass input_data_format='channels_first' or 'channels_last'"
    raise ValueError(f"its shape {shape} leaves open which axis has the {least} or more channels; {remedy}.")


def _read_bands(image) -> np.ndarray:
    """The channels (C, H, W) of a PIL image or of a file, by Pillow, or by tifffile where Pillow would lose some."""
    try:
        picture: Any = _to_pil(image)
    except PIL.UnidentifiedImageError:
        if not _is_tiff(image):
            raise
        return _read_samples(image)
    file = (getattr(image, "filename", "") or image) if picture is image else image
    tags = getattr(picture, "tag_v2", None)
    if tags is None:
        return _bands(picture)
    samples, bits = tags.get(277, 1), max(tags.get(258, (1,)))
    is_premultiplied = 1 in tags.get(338, ())  # Pillow would divide the colors by the last channel
    if samples > 1 and (bits > 8 or samples != len(picture.getbands()) or is_premultiplied):
        return _read_samples(file)
    pages, pixels = [], 0
    with suppress(EOFError):  # after the last page
        for page in itertools.count():
            picture.seek(page)
            pixels += picture.width * picture.height
            if page >= MAX_IMAGE_CHANNELS or pixels > MAX_IMAGE_PIXELS:
                raise ValueError(f"it has more than {page} pages, which are too large; cut it into smaller images.")
            pages.append(_bands(picture))
    picture.seek(0)
    shapes = sorted({page.shape for page in pages})
    if len(pages) > 1 and (len(shapes) > 1 or shapes[0][0] > 1):
        raise ValueError(f"its pages have the shapes {shapes}; save one gray page of one size for each channel.")
    return np.concatenate(pages)


def _bands(image: PIL.Image.Image) -> np.ndarray:
    """The channels (C, H, W) of one picture, set upright."""
    image = PIL.ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")  # of a palette, CMYK or YCbCr
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _is_tiff(file) -> bool:
    if hasattr(file, "read"):
        file.seek(0)
        return file.read(4) in TIFF_STARTS
    with suppress(OSError), open(file, "rb") as opened:  # OSError: an address
        return opened.read(4) in TIFF_STARTS
    return False


def _read_samples(file) -> np.ndarray:
    """The channels (C, H, W) of a TIFF with several samples a pixel, which Pillow cuts to three or to 8 bits."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a TIFF with several samples a pixel needs tifffile: pip install tifffile.") from error
    if isinstance(file, PIL.Image.Image):
        raise ValueError("Pillow cannot give all channels of this TIFF; pass its path or the open file instead.")
    if hasattr(file, "seek"):
        file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            tags: Any = tiff.pages.first.tags
            if tags.valueof("Orientation", default=1) != 1:
                raise ValueError("its orientation is not upright")
            axes, shape, size = tiff.series[0].axes, tiff.series[0].shape, tiff.series[0].nbytes
            if len(axes) != 3 or "YX" not in axes or max(math.prod(shape), size // 4) > MAX_IMAGE_PIXELS:
                raise ValueError(f"its axes {axes} of {shape} are not a picture's channels, or are too large")
            return np.moveaxis(tiff.series[0].asarray(), 2 if axes.startswith("YX") else 0, 0)
    except Exception as error:  # of damaged files, of nearly every kind
        raise ValueError(f"tifffile cannot read it ({error!r}); save its channels as gray pages.") from error


def _is_file(image) -> bool:
    """Whether an image comes with its own layout: a path, an open file or a PIL image."""
    return isinstance(image, str | os.PathLike | PIL.Image.Image) or hasattr(image, "read")


def _create_transform(geometry: dict[str, Any]) -> Any:
    """timm's evaluation transform; of a geometry with named channels a list with one for each, by PIL mode."""
    settings = {key: value for key, value in geometry.items() if key not in ("image_mode", CHANNELS)}
    if CHANNELS not in geometry:
        return timm.data.create_transform(**settings, is_training=False)
    transforms = []
    for mean, std in zip(geometry["mean"], geometry["std"], strict=True):
        one = settings | {"input_size": (1, *geometry["input_size"][1:]), "mean": (mean,), "std": (std,)}
        bytes_transform: Any = timm.data.create_transform(**one, is_training=False)
        float_transform = copy.deepcopy(bytes_transform)
        if geometry["crop_mode"] == "border":
            float_transform.transforms[1].fill = [mean]  # timm's is in 8 bits
        transforms.append({"L": bytes_transform, "F": float_transform})
    return transforms


def _transform_channels(
    channels: np.ndarray, geometry: dict[str, Any], transforms: list[dict], do_resize: bool
) -> torch.Tensor:
    """The slice (C, H, W) of a geometry with named channels. Each is resized by itself: 8 bits as Pillow does for RGB,
    16 bits and floats in float32. 16 bits are divided by 65,535 and, as 8 bits, cut off where resizing overshoots."""
    slices = []
    for place, number in enumerate(geometry[CHANNELS]):
        mean, std = geometry["mean"][place], geometry["std"][place]
        picture = PIL.Image.fromarray(scale_channel(channels, number))
        pixels = _transform_image(picture, transforms[place][picture.mode], geometry, do_resize)
        if channels.dtype == np.uint16:
            pixels = pixels.clamp((0 - mean) / std, (1 - mean) / std)
        slices.append(pixels)
    return torch.cat(slices)


def scale_channel(channels: np.ndarray, number: int) -> np.ndarray:
    """Channel `number` of (C, H, W) as 8 bits, or as float32: 16 bits from 0 to 1, floats as they are. Raises
    ValueError for values that are not finite."""
    channel = np.ascontiguousarray(channels[number])
    if not np.isfinite(channel).all():
        raise ValueError(f"channel {number} has pixels that are NaN or infinite; remove or repair it.")
    return channel.astype(np.float32) / 65_535 if channel.dtype == np.uint16 else channel
