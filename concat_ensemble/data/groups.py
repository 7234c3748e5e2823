"""Rows that must stay on one side of a cut: copies of an image, and images of one group, such as one patient's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from concat_ensemble.data.columns import add_column, read_column
from concat_ensemble.data.images import NO_IMAGE, image_hashes
from concat_ensemble.errors import argument


def check_groups(splits: Mapping[str, Dataset], group_column: str) -> dict[str, Dataset]:
    """Write the column `group` of all splits alike, as whole numbers if it is so in every split, else as text. Raises
    ValueError for groups of another type, and for images without a group."""
    features = [split.features["group"] for split in splits.values()]
    for kind, feature in zip(splits, features, strict=True):
        dtype = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        whole = dtype.startswith(("int", "uint")) or isinstance(feature, ClassLabel)
        if not whole and dtype not in ("string", "large_string", "bool"):
            problem = f"the groups of the {kind} split ({argument('group_column', group_column)}) are {dtype}"
            raise ValueError(f"{problem}; they must be whole numbers or text.")
    as_numbers = all(isinstance(each, Value) and each.dtype.startswith(("int", "uint")) for each in features)
    return {kind: _rewrite_groups(split, kind, group_column, as_numbers) for kind, split in splits.items()}


def number_values(values: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    """(N,) int64 by split: equal values get one number, in all splits."""
    numbers: dict[Any, int] = {}
    return {
        name: np.array([numbers.setdefault(value, len(numbers)) for value in each], dtype=np.int64)
        for name, each in values.items()
    }


def number_images(splits: Mapping[str, Dataset]) -> dict[str, np.ndarray]:
    """(N,) int64 by split: copies of an image get one number, in all splits. An image that is missing is no copy."""
    hashes = {name: image_hashes(split) for name, split in splits.items()}
    return number_values(
        {
            name: [(name, row) if image.startswith(NO_IMAGE) else image for row, image in enumerate(each)]
            for name, each in hashes.items()
        }
    )


def number_units(split: Dataset, *, copies: bool) -> np.ndarray | None:
    """(N,) the number of the unit that each row belongs to, from 0, or None if every row is alone.

    Rows of one `group` are one unit, and with `copies` so are rows with the same image; units that share a row are
    one.
    """
    parts = []
    if copies:
        parts.append(number_images({"": split})[""])
    if "group" in split.column_names:
        parts.append(number_values({"": read_column(split, "group").to_pylist()})[""])
    return join_units(parts)


def join_units(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """(N,) the number of each row's unit, from 0: rows with equal numbers in one of up to two `parts` (N,), or
    connected through other rows, are one unit. None if every row is alone."""
    parts = [part for part in parts if part.max(initial=-1) + 1 < len(part)]
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    # A graph with a node for each image and one for each group, and an edge for each row.
    images, groups = parts
    size = images.max() + groups.max() + 2
    edges = coo_matrix((np.ones(len(images), dtype=bool), (images, images.max() + 1 + groups)), shape=(size, size))
    _, components = connected_components(edges, directed=False)
    return np.unique(components[images], return_inverse=True)[1]


def _rewrite_groups(split: Dataset, kind: str, group_column: str, as_numbers: bool) -> Dataset:
    feature = split.features["group"]
    values = read_column(split, "group").to_pylist()
    missing = sum(value is None or (isinstance(value, str) and not value.strip()) for value in values)
    if isinstance(feature, ClassLabel):
        missing += sum(value == -1 for value in values)
    if missing:
        problem = f"{missing:,} of {len(split):,} images of the {kind} split have no group"
        named = argument("group_column", group_column)
        raise ValueError(f"{problem} ({named}); fill them in, or leave these images out.")
    if as_numbers:
        return split
    names = [feature.names[value] if isinstance(feature, ClassLabel) else str(value) for value in values]
    return add_column(split.remove_columns("group"), "group", names, Value("string"))
