"""Reading and writing the encoded images of a split."""

import io

import numpy as np
import PIL.Image
from datasets import Dataset

from concat_ensemble.errors import first_line


def read_image(split: Dataset, index: int) -> PIL.Image.Image:
    """Decode image `index` of a split returned by `load_data`. Raises ValueError naming it if it cannot be read."""
    return decode_image(split[index]["image"], describe_image(split, index))


def decode_image(encoded: dict, name: str) -> PIL.Image.Image:
    """Decode an image stored as {"bytes", "path"}. Raises ValueError, with its `name`, if it cannot be read."""
    try:
        image = PIL.Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # all raised by PIL
        raise ValueError(f"{name} cannot be read: {first_line(error)}; remove or repair it.") from error


def encode_image(pixels: np.ndarray) -> dict:
    """Encode (H, W) or (H, W, C) uint8 pixels as PNG, in the form that `datasets` stores."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def describe_image(split: Dataset, index: int) -> str:
    """Name an image in error messages: its number, and its file if it has one."""
    path = split[index]["image"]["path"]
    return f"image {index} ({path})" if path else f"image {index}"
