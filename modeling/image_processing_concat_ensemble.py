"""Images to the pixels of every member of an ensemble, as timm's evaluation transform makes them."""

import copy
import math
import os
from contextlib import suppress
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

from .configuration_concat_ensemble import CHANNELS
from .configuration_concat_ensemble import MAX_IMAGE_CHANNELS
from .configuration_concat_ensemble import ConcatEnsembleConfig
from .configuration_concat_ensemble import copy_payload
from .configuration_concat_ensemble import error_prefix
from .configuration_concat_ensemble import refuse_links
from .configuration_concat_ensemble import validate_preprocessing

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of files; with a plus, of those above 4 GB
MAX_IMAGE_VALUES = 2**28  # of a TIFF's channels together, before memory is allocated for them


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
            self.geometries = [validate_preprocessing(geometry, MAX_IMAGE_CHANNELS) for geometry in geometries]
        self._transforms = [_create_transform(geometry) for geometry in self.geometries]
        self._num_channels = 1 + max((n for each in self.geometries for n in each.get(CHANNELS, ())), default=-1)

    @classmethod
    def from_config(cls, config: ConcatEnsembleConfig) -> "ConcatEnsembleImageProcessor":
        """The processor that matches a model with this configuration."""
        return cls(geometries=config.geometries)

    def preprocess(
        self, images, return_tensors: str = "pt", *, input_data_format: str | None = None, **kwargs
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list: PIL images, paths, URLs, open files, or uint8 or [0, 1] float arrays or
                tensors, (H, W, C) or (C, H, W). For members that name their channels, see `read_channels`.
            return_tensors: `"pt"` or `"np"`.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves that open.

        Returns:
            `pixel_values`, float32: (B, C, H, W) with one geometry, (B, G, C, H, W) with several. ValueError with the
            image's number in the batch if it cannot be read, has only one pixel or holds NaN.
        """
        if kwargs:
            raise ValueError(f"unknown arguments {sorted(kwargs)}; leave them out: the config fixes what members see.")
        if not (images := _flatten(images)):
            raise ValueError("images is empty; give at least one.")
        pixels = [self._create_pixels(number, image, input_data_format) for number, image in enumerate(images)]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    def _create_pixels(self, number: int, image, input_data_format: str | None) -> torch.Tensor:
        try:
            slices = self._create_slices(image, input_data_format)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # PIL's for a bad image
            path = f" ({image})" if isinstance(image, str | os.PathLike) else ""
            raise ValueError(f"image {number} of the batch{path}: {error}") from error
        channels, height, width = (max(axis) for axis in zip(*(s.shape for s in slices), strict=True))
        # A gray slice fills all channels; further channels are zero.
        slices = [s.expand(channels, -1, -1) if len(s) == 1 else s for s in slices]
        padded = [pad(s, (0, width - s.shape[2], 0, height - s.shape[1], 0, channels - len(s))) for s in slices]
        return padded[0] if len(padded) == 1 else torch.stack(padded)

    def _create_slices(self, image, input_data_format: str | None) -> list[torch.Tensor]:
        """What each geometry makes of an image, normalized."""
        channels: Any = None
        picture = None
        if self._num_channels:
            channels = read_channels(image, self._num_channels, input_data_format)
            image = image if _is_file(image) else channels[:3] if len(channels) == 4 else channels
        slices = []
        for geometry, transform in zip(self.geometries, self._transforms, strict=True):
            if CHANNELS in geometry:
                slices.append(_transform_channels(channels, geometry, transform))
            else:
                picture = picture or _to_pil(image)
                slices.append(transform(convert_image(picture, geometry["image_mode"])))
        return slices

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        refuse_links(save_directory)
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        copy_payload(save_directory)
        return files

    def to_dict(self) -> dict[str, Any]:
        # Only config.json names the class: transformers' `pipeline` takes an `auto_map` here for a video processor's,
        # and asks whether to trust its code even if this package is installed.
        left_out = ("_transforms", "_num_channels", "image_processor_type", "auto_map")
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
    if hasattr(image, "read"):
        image.seek(0)
        return PIL.Image.open(image)
    array = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3):
        expected = "a PIL image, a path, or an array of 2 or 3 dimensions"
        raise ValueError(f"{type(image).__name__} is not an image; give {expected}.")
    if array.ndim == 3 and not {1, 3, 4} & {array.shape[0], array.shape[2]}:
        remedy = "name those that a member sees, as in assemble(member, channels=[2, 1, 0])"
        raise ValueError(f"its shape {array.shape} has neither 1 nor 3 channels, nor 4; {remedy}.")
    if array.dtype == np.uint16:
        array = (array / 257.0).round().astype(np.uint8)
    if not np.isfinite(array).all():
        raise ValueError("it has pixels that are NaN or infinite; remove or repair it.")
    return to_pil_image(array[None] if array.ndim == 2 else array)


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
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    array = _read_bands(image) if _is_file(image) else _channels_first(np.asarray(image), least, input_data_format)
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
    if array.ndim not in (2, 3):
        raise ValueError(f"its shape {array.shape} must be (H, W), (H, W, C) or (C, H, W).")
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
    if picture.n_frames * picture.width * picture.height > MAX_IMAGE_VALUES:
        raise ValueError(f"its {picture.n_frames} pages are too large together; cut it into smaller images.")
    pages = []
    for page in range(picture.n_frames):
        picture.seek(page)
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
            axes, shape = tiff.series[0].axes, tiff.series[0].shape
            if len(axes) != 3 or "YX" not in axes or math.prod(shape) > MAX_IMAGE_VALUES:
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


def _transform_channels(channels: np.ndarray, geometry: dict[str, Any], transforms: list[dict]) -> torch.Tensor:
    """The slice (C, H, W) of a geometry with named channels. Each is resized by itself: 8 bits as Pillow does for RGB,
    16 bits and floats in float32. 16 bits are divided by 65,535 and, as 8 bits, cut off where resizing overshoots."""
    slices = []
    for place, number in enumerate(geometry[CHANNELS]):
        mean, std = geometry["mean"][place], geometry["std"][place]
        picture = PIL.Image.fromarray(scale_channel(channels, number))
        pixels = transforms[place][picture.mode](picture)
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
