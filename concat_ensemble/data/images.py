"""Reading, writing and hashing the encoded images of a split."""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, Value

from concat_ensemble.data.arrays import decode_array, is_array
from concat_ensemble.data.columns import add_column, read_column
from concat_ensemble.errors import first_line
from concat_ensemble.modeling.image_processing_concat_ensemble import IMAGE_FORMATS, check_file, open_picture
from concat_ensemble.processes import share_rows

HASH_BYTES = 16  # of sha256: among 10^12 images, two have the same hash with probability 1e-15
NO_IMAGE = b"no image"  # that the hash begins with where there are no bytes
HASH_COLUMN = "image_hash"


def read_image(split: Dataset, index: int) -> PIL.Image.Image:
    """Decode image `index` of a split returned by `load_data`. Raises ValueError naming it if it cannot be read."""
    encoded = split[index]["image"]
    return decode_image(encoded, describe_encoded(encoded, index))


def decode_image(encoded: dict | None, name: str) -> PIL.Image.Image:
    """Decode an image stored as {"bytes", "path"}. Raises ValueError, with its `name`, if it cannot be read, or if all
    that it shows is in its alpha channel."""
    try:
        return open_image(encoded)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}; remove or repair it.") from error


def open_image(encoded: dict | None) -> PIL.Image.Image:
    """As `decode_image`; the error is the reason alone, without a name."""
    content = _check_content(encoded)
    try:
        if is_array(content):
            return _show_array(decode_array(content))
        image = open_picture(_open_encoded(encoded))
        image.load()
        only_alpha = _shows_only_alpha(image)
    except Exception as error:  # of damaged files, PIL's plugins raise errors of nearly every kind
        raise ValueError(describe_read_error(error)) from error
    if only_alpha:
        raise ValueError("its colors are all the same and what it shows is in its alpha channel, which is not read")
    return image


def processor_input(encoded: dict | None, processor: Any) -> Any:
    """What an ensemble's image processor reads of an image: the decoded picture, or for members that name the channels
    they see, and for arrays, `open_file`'s result. Raises ValueError if there is no image."""
    names_channels = any("channels" in geometry for geometry in processor.geometries)
    is_file = names_channels or is_array(_check_content(encoded))
    return open_file(encoded) if is_file else open_image(encoded)


def open_file(encoded: dict | None) -> np.ndarray | io.BytesIO | Path:
    """An array, or the file of a picture, of which Pillow may not give all channels. Raises ValueError without one."""
    content = _check_content(encoded)
    if is_array(content):
        return decode_array(content)
    return _open_encoded(encoded)


def _check_content(encoded: dict | None) -> bytes | None:
    """The bytes of an image, or None for a path. Raises ValueError if there is neither."""
    if not encoded or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError("the row has no image")
    if encoded["bytes"] == b"":
        raise ValueError("the file is empty")
    return encoded["bytes"]


def _open_encoded(encoded: Any) -> io.BytesIO | Path:
    # A path, since a processor would fetch a string that is an address.
    return io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else Path(encoded["path"])


def _show_array(pixels: np.ndarray) -> PIL.Image.Image:
    """An array as a picture. Raises ValueError for one that is none."""
    is_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not is_shape or not pixels.size:
        raise ValueError(f"it is an array of {pixels.dtype} and shape {pixels.shape}, which is no picture of 8 bits")
    return PIL.Image.fromarray(pixels)


def describe_read_error(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, PIL.UnidentifiedImageError):  # its message has the address of a buffer
        return f"it is not an image in one of the formats {', '.join(IMAGE_FORMATS)}"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + first_line(error).rstrip(".")


def _shows_only_alpha(image: PIL.Image.Image) -> bool:
    """Whether an image is of one color once its alpha channel is dropped, and is not before."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA"):
        return False
    extrema: Any = image.getextrema()  # a pair for each band
    *colors, alpha = extrema
    return all(low == high for low, high in colors) and alpha[0] < alpha[1]


def encode_image(pixels: np.ndarray) -> dict:
    """Encode (H, W) or (H, W, C) uint8 pixels as PNG, in the form that `datasets` stores."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def describe_image(split: Dataset, index: int) -> str:
    """Name an image in error messages: its number, and its file if it has one."""
    return describe_encoded(split[index]["image"], index)


def describe_encoded(encoded: dict | None, index: int) -> str:
    """As `describe_image`, for a row that is read already."""
    path = encoded["path"] if encoded else None
    return f"image {index} ({path})" if path else f"image {index}"


def image_hashes(split: Dataset) -> list[bytes]:
    """One hash of `HASH_BYTES` bytes per image of a split from `load_data`, of its encoded bytes.

    They are taken from the column `image_hash` if the split has it and it agrees with a few of the images. An image
    without bytes, such as a missing file, gets a hash of its own, so that reading it is what fails.
    """
    if (stored := stored_hashes(split)) is not None:
        return stored
    return _hash_rows(split, range(len(split)))


def _hash_rows(split: Dataset, rows: range) -> list[bytes]:
    hashes = []
    batch: Any  # a dict of columns
    part = split.select_columns("image").with_format(None).select(rows)
    for batch in part.iter(batch_size=16):  # photographs of megabytes each
        first = rows.start + len(hashes)
        hashes += [hash_image(encoded, first + place) for place, encoded in enumerate(batch["image"])]
    return hashes


def with_hashes(split: Dataset, *, shared: bool = False) -> Dataset:
    """The split with the column `image_hash`, so that its images are read once for all who need their hashes. If
    `shared`, all processes of `accelerate launch` must call this, and each reads its share of the images."""
    if stored_hashes(split) is not None:
        return split
    split = split.select_columns([name for name in split.column_names if name != HASH_COLUMN])
    hashes = share_rows(len(split), partial(_hash_rows, split)) if shared else image_hashes(split)
    return add_column(split, HASH_COLUMN, hashes, Value("binary"))


def stored_hashes(split: Dataset) -> list[bytes] | None:
    """The column `image_hash`, or None without one. It is stale where the images were replaced since, as by
    `Dataset.map`, so that it is compared with a few of them."""
    if HASH_COLUMN not in split.column_names:
        return None
    hashes, plain = read_column(split, HASH_COLUMN).to_pylist(), split.select_columns("image").with_format(None)
    compared = np.unique(np.linspace(0, len(split) - 1, min(len(split), 8)).astype(int)).tolist()
    return hashes if all(hash_image(plain[row]["image"], row) == hashes[row] for row in compared) else None


def hash_image(encoded: dict | None, index: int) -> bytes:
    """The hash of the encoded bytes of image `index` of its split."""
    return read_encoded(encoded, index)[0]


def read_encoded(encoded: dict | None, index: int) -> tuple[bytes, dict | None]:
    """The hash of an image, and the image with its bytes where it is a file, so that the file is read only once."""
    content = encoded["bytes"] if encoded else None
    if content is None:
        try:
            path = Path((encoded or {})["path"])
            check_file(path)
            content = path.read_bytes()
        except (OSError, KeyError, TypeError, ValueError):
            digest = hashlib.sha256(f"{index}: {encoded}".encode("utf-8", "backslashreplace")).digest()
            return (NO_IMAGE + digest)[:HASH_BYTES], encoded
        if not is_array(content):  # which only the package writes, never to a file
            encoded = {"bytes": content, "path": str(path)}
    return hashlib.sha256(content).digest()[:HASH_BYTES], encoded
