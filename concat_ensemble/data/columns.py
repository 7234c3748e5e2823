"""Which columns of a dataset hold the images and the labels."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from datasets.features.features import require_decoding

from concat_ensemble.data.arrays import array_type, encode_column
from concat_ensemble.errors import argument

IMAGE_NAMES = ("image", "img", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y", "cls")
Split = TypeVar("Split", Dataset, IterableDataset)


def select_columns(
    split: Split, kind: str, *, image_column: str | None, label_column: str | None, group_column: str | None = None
) -> Split:
    """Keep the columns of images, labels and groups, renamed to `image` (encoded), `label` and, if there is one,
    `group`.

    A column that is not named is found by its type, then by common names; of several `Image` or `ClassLabel` columns,
    one with a common name is preferred. Raises ValueError if none is found in the split, which `kind` names, or if a
    column holds something else than one image a row.
    """
    features = read_features(split)
    images = find_image_columns(features)
    class_labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = [name for name in class_labels if name in LABEL_NAMES]
    labels += [name for name in LABEL_NAMES if name in features] + class_labels
    if image_column is None and not images:
        _refuse_lists(features, kind)
    image = _choose_column("image", image_column, images, features=features, kind=kind)
    label = _choose_column("label", label_column, labels, features=features, kind=kind)
    columns = {"image": image, "label": label}
    if group_column is not None:
        columns["group"] = _choose_column("group", group_column, [], features=features, kind=kind)
    for first, second in combinations(columns, 2):
        if columns[first] == columns[second]:
            both = f"{argument(f'{first}_column')} and {argument(f'{second}_column')} are both {columns[first]!r}"
            raise ValueError(f"{both}; the dataset has {', '.join(features)}.")
    _check_images(image, features[image], kind)
    names = getattr(features[label], "names", None) or []
    if not all(isinstance(name, str) for name in names):
        problem = f"column {label!r} of the {kind} split has class names that are no text"
        raise ValueError(f"{problem}; write the names as text.")
    for role in ("label", "group"):
        if role in columns and require_decoding(features[columns[role]]):
            problem = f"column {columns[role]!r} of the {kind} split holds files"
            raise ValueError(f"{problem}; name another {argument(f'{role}_column')}.")
    split = _without_decoding(split, image).select_columns(list(columns.values()))
    # By way of names that no column has, since a dataset may use these names for other columns.
    split = split.rename_columns({name: f"{role} of {name}" for role, name in columns.items()})
    split = split.rename_columns({f"{role} of {name}": role for role, name in columns.items()})
    return _encode_images(split)


def find_image_columns(features: Features) -> list[str]:
    """Names of the columns that may hold the images, the likeliest first."""
    by_type = [name for name, feature in features.items() if isinstance(feature, Image)]
    by_name = [name for name in IMAGE_NAMES if name in features]
    arrays = [name for name, feature in features.items() if isinstance(feature, Array2D | Array3D)]
    return [name for name in by_name if name in by_type] + by_type + by_name + arrays


def select_images(split: Split, kind: str, image_column: str | None = None) -> Split:
    """Keep the column of images alone, renamed to `image` (encoded), of a split whose labels are not needed. Raises
    ValueError as `select_columns`."""
    features = read_features(split)
    images = find_image_columns(features)
    if image_column is None and not images:
        _refuse_lists(features, kind)
    image = _choose_column("image", image_column, images, features=features, kind=kind)
    _check_images(image, features[image], kind)
    split = _without_decoding(split, image).select_columns([image])
    split = split if image == "image" else split.rename_column(image, "image")
    return _encode_images(split)


def read_column(split: Dataset, name: str) -> pa.ChunkedArray:
    """A column as it is stored, a row for each image; `Dataset.__getitem__` takes seconds for 200,000 rows."""
    column = split.data.column(name)
    return column if split._indices is None else column.take(split._indices.column(0))


def add_column(split: Dataset, name: str, values: Sequence | np.ndarray, feature: Any) -> Dataset:
    """Put a column beside the others, which stay where they are on disk.

    `Dataset.add_column` and `concatenate_datasets` first copy every image of a split that was selected or shuffled;
    here the column is laid out in the order of the stored rows instead, and the same rows are selected again.
    """
    features = Features({name: feature})
    if split._indices is None:
        return concatenate_datasets([split, Dataset.from_dict({name: values}, features=features)], axis=1)
    rows = split._indices.column(0).to_numpy().astype(np.int64)  # `select` fails for unsigned ones in a row
    stored = [None] * len(split.data)
    for row, value in zip(rows, values, strict=True):
        stored[row] = value
    column = Dataset.from_dict({name: stored}, features=features)
    return concatenate_datasets([Dataset(split.data, info=split.info), column], axis=1).select(rows)


def read_features(split: Dataset | IterableDataset) -> Features:
    """The columns of a split with their types. Raises ValueError for a stream that does not state them."""
    if split.features is None:
        raise ValueError("the stream does not state its columns and their types; set streaming=False.")
    return split.features


def _choose_column(role: str, name: str | None, candidates: list[str], *, features: Features, kind: str) -> str:
    columns = ", ".join(features)
    if name is not None and name not in features:
        raise ValueError(f"the {kind} split has no column {name!r}; it has {columns}.")
    if name is None and not candidates:
        problem = f"found no {role} column among {columns} in the {kind} split"
        raise ValueError(f"{problem}; name it with {argument(f'{role}_column')}.")
    return candidates[0] if name is None else name


def _check_images(name: str, feature: Any, kind: str) -> None:
    """Raise ValueError for a column whose rows are no encoded images, files, bytes or arrays."""
    if array_type(feature) is not None:
        return
    if isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature)):
        return
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary"):
        return
    if _holds_images(feature):
        raise ValueError(f"column {name!r} of the {kind} split has several images a row; write one image in each row.")
    what = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    problem = f"column {name!r} of the {kind} split holds {what}, not images"
    raise ValueError(f"{problem}; name another {argument('image_column')}.")


def _refuse_lists(features: Features, kind: str) -> None:
    for name, feature in features.items():
        if _holds_images(feature):
            _check_images(name, feature, kind)


def _holds_images(feature: Any) -> bool:
    """Whether a row of such a column is a list of images."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(inner, Image)


def _without_decoding(split: Split, name: str) -> Split:
    """The split whose images stay encoded, unless they are arrays.

    To rename a stream's columns reads its rows: where one names a file or an address, `datasets` would open it to
    decode the image, and take the file in place of the bytes beside it, if there is one of this name.
    """
    if array_type(read_features(split)[name]) is not None:
        return split
    split = split.cast_column(name, Image(decode=False))
    if isinstance(split, Dataset):
        return split
    return split.map(partial(_drop_path, name=name), features=split.features)


def _drop_path(example: dict[str, Any], *, name: str) -> dict[str, Any]:
    image = example[name]
    has_bytes = isinstance(image, dict) and image.get("bytes") is not None
    return example | {name: image | {"path": None}} if has_bytes else example


def _encode_images(split: Split) -> Split:
    """The split with encoded images in the column `image`, also those that are arrays."""
    features = read_features(split)
    dtype = array_type(features["image"])
    return split if dtype is None else encode_column(split, dtype, features)
