"""Images that a dataset holds as arrays, of any number of channels: stored like files, in NumPy's format."""

import io
from typing import Any, TypeGuard, TypeVar

import numpy as np
from datasets import Array2D, Array3D, Dataset, Features, Image, IterableDataset, Value

from concat_ensemble.errors import first_line
from concat_ensemble.files import check_array

Split = TypeVar("Split", Dataset, IterableDataset)
START = b"\x93NUMPY"


def array_type(feature: Any) -> str | None:
    """The dtype of a column whose rows are arrays of two or three dimensions; None for other columns."""
    if isinstance(feature, Array2D | Array3D):
        return feature.dtype
    value: Any = None
    inner, depth = feature, -1
    while inner is not None:
        value, depth = inner, depth + 1
        inner = value[0] if isinstance(value, list) else getattr(value, "feature", None)
    if isinstance(value, Value) and value.dtype.startswith(("int", "uint", "float")) and depth in (2, 3):
        return value.dtype
    return None


def encode_column(split: Split, dtype: str, features: Features) -> Split:
    """Encode the arrays of type `dtype` in a split's column `image`; `features` are all of its columns."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {
            "image": [None if array is None else encode_array(np.asarray(array, dtype)) for array in batch["image"]]
        }

    encoded = Features({**features, "image": Image(decode=False)})
    return split.map(encode, batched=True, batch_size=16, features=encoded)


def encode_array(pixels: np.ndarray) -> dict:
    """Encode the channels of an image with their type and shape, in the form in which `datasets` stores images."""
    buffer = io.BytesIO()
    np.save(buffer, pixels, allow_pickle=False)
    return {"bytes": buffer.getvalue(), "path": None}


def is_array(content: bytes | None) -> TypeGuard[bytes]:
    """Whether `encode_array` wrote these bytes."""
    return content is not None and content.startswith(START)


def decode_array(content: bytes) -> np.ndarray:
    """The array that `encode_array` encoded. Raises ValueError if it is damaged."""
    try:
        check_array(io.BytesIO(content), len(content))
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"the array is damaged: {first_line(error)}") from error
