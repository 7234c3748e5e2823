"""Labels of a split as numbers, and the names of the classes that they stand for."""

from collections.abc import Mapping

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, concatenate_datasets

from concat_ensemble.data.columns import read_features


def class_names(split: Dataset | IterableDataset) -> list[str]:
    """Names of a split's classes, in the order of their numbers."""
    return list(read_features(split)["label"].names)


def read_labels(split: Dataset) -> np.ndarray:
    """(N,) int64 class numbers of a split's images."""
    return _label_column(split).astype(np.int64)


def read_groups(splits: Mapping[str, Dataset]) -> dict[str, np.ndarray] | None:
    """(N,) the group of each image by split, where all splits have a column `group`; else None."""
    if not all("group" in split.column_names for split in splits.values()):
        return None
    return {kind: np.asarray(split.with_format("numpy")["group"][:]) for kind, split in splits.items()}


def to_class_labels(split: Dataset, kind: str) -> Dataset:
    """Convert a `label` column of names, whole numbers or booleans to `ClassLabel`, in sorted order. Raises ValueError
    for missing, hidden (-1) or unsuitable labels; `kind` names the split."""
    feature = split.features["label"]
    if split.data.column("label").null_count:
        raise ValueError(f"the {kind} split has images without a label; remove them or name another label_column.")
    if isinstance(feature, ClassLabel):
        if read_labels(split).min() < 0:
            raise ValueError(f"the {kind} split's labels are hidden (-1); name a split that has them.")
        return split
    dtype = feature.dtype if isinstance(feature, Value) else str(feature)
    if not dtype.startswith(("int", "uint")) and dtype not in ("string", "large_string", "bool"):
        raise ValueError(f"the labels of the {kind} split are {dtype}; they must be class names or whole numbers.")
    names, numbers = np.unique(_label_column(split), return_inverse=True)
    return _replace_labels(split, numbers, [str(name) for name in names])


def unify_classes(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number the classes of all splits alike; a split whose labels were names or numbers may lack some of them."""
    names = list(dict.fromkeys(name for split in splits.values() for name in class_names(split)))
    if all(class_names(split) == names for split in splits.values()):
        return splits
    names = sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    return {kind: _renumber(split, names) for kind, split in splits.items()}


def select_classes(splits: dict[str, Dataset], classes: list[int | str]) -> dict[str, Dataset]:
    """Keep the images of some classes, named or numbered, and number these from 0 in the dataset's order. Raises
    ValueError for an unknown class, or none."""
    names = class_names(splits["train"])
    unknown = [c for c in classes if (c not in names if isinstance(c, str) else not 0 <= c < len(names))]
    if unknown or not classes:
        listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ValueError(f"classes={unknown or classes!r}: the dataset has {len(names)}, {listing}.")
    numbers = sorted({names.index(c) if isinstance(c, str) else c for c in classes})
    selected = [names[number] for number in numbers]
    renumbered = {kind: _renumber(split, selected) for kind, split in splits.items()}
    return {kind: split.select(np.flatnonzero(read_labels(split) >= 0)) for kind, split in renumbered.items()}


def _label_column(split: Dataset) -> np.ndarray:
    return np.asarray(split.with_format("numpy")["label"][:])


def _renumber(split: Dataset, names: list[str]) -> Dataset:
    """Replace each label by the position of its class in `names`, or by -1 if it is not there."""
    numbers = np.array([names.index(name) if name in names else -1 for name in class_names(split)])
    return _replace_labels(split, numbers[read_labels(split)], names)


def _replace_labels(split: Dataset, numbers: np.ndarray, names: list[str]) -> Dataset:
    """Put another label column beside the images, which stay where they are on disk; `Dataset.map` would copy them."""
    column = Dataset.from_dict({"label": numbers}, features=Features(label=ClassLabel(names=names)))
    return concatenate_datasets([split.select_columns(["image"]), column], axis=1)
