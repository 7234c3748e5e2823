"""Labels of a split as numbers, and the names of the classes that they stand for."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, IterableDataset, Value

from concat_ensemble.data.columns import add_column, read_column, read_features
from concat_ensemble.errors import argument

HIDDEN = ("", "-1")  # texts that stand for a hidden label, beside -1 and None


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
    return {kind: np.asarray(read_column(split, "group").to_pylist()) for kind, split in splits.items()}


def to_class_labels(split: Dataset, kind: str) -> Dataset:
    """Convert a `label` column of names, whole numbers or booleans to `ClassLabel`, in sorted order. Raises ValueError
    for missing labels, hidden ones (-1 or an empty text), unsuitable ones, and numbers without a class name; `kind`
    names the split."""
    feature = split.features["label"]
    dtype = feature.dtype if isinstance(feature, Value | ClassLabel) else str(feature)
    missing = read_column(split, "label").null_count
    if 0 < missing < len(split):
        problem = f"the {kind} split has {missing:,} images without a label"
        remedy = f"remove them or name another {argument('label_column')}"
        raise ValueError(f"{problem}, of {len(split):,}; {remedy}.")
    if missing:
        raise ValueError(_all_hidden(kind, "None"))
    if not dtype.startswith(("int", "uint")) and dtype not in ("string", "large_string", "bool"):
        raise ValueError(f"the labels of the {kind} split are {dtype}; they must be class names or whole numbers.")
    labels = _label_column(split)
    _refuse_hidden(labels, kind)
    if not isinstance(feature, ClassLabel):
        names, numbers = np.unique(labels, return_inverse=True)
        return _replace_labels(split, numbers, [str(name) for name in names])
    if labels.max(initial=-1) >= len(feature.names):
        problem = f"the {kind} split has the label {labels.max()}, but its column names {len(feature.names)} classes"
        raise ValueError(f"{problem}, numbered from 0; name them all, or cast the column to whole numbers.")
    return split


def _refuse_hidden(labels: np.ndarray, kind: str) -> None:
    """Raise ValueError for labels of -1, or texts of `HIDDEN`."""
    if labels.dtype.kind == "b":
        return
    numbers = labels.dtype.kind in "iu"
    hidden = labels < 0 if numbers else np.isin(np.char.strip(labels.astype(str)), HIDDEN)
    if not hidden.any():
        return
    value = str(labels[hidden].min()) if numbers else repr(str(labels[hidden][0]))
    if hidden.all():
        raise ValueError(_all_hidden(kind, value))
    problem = f"{hidden.sum():,} of {len(labels):,} labels of the {kind} split are hidden ({value})"
    raise ValueError(f"{problem}; remove these images, or, if {value} is a class, write the labels as names.")


def _all_hidden(kind: str, value: str) -> str:
    example = f", such as {argument('test_split', 'validation')}" if kind == "test" else ""
    return f"the {kind} split's labels are hidden ({value}); name a split that has them{example}."


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
    numbers_by_name = {name: number for number, name in enumerate(names)}
    unknown = [c for c in classes if (c not in numbers_by_name if isinstance(c, str) else not 0 <= c < len(names))]
    if unknown or not classes:
        listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ValueError(f"{argument('classes', unknown or classes)}: the dataset has {len(names)}, {listing}.")
    numbers = sorted({numbers_by_name[c] if isinstance(c, str) else c for c in classes})
    selected = [names[number] for number in numbers]
    renumbered = {kind: _renumber(split, selected) for kind, split in splits.items()}
    return {kind: split.select(np.flatnonzero(read_labels(split) >= 0)) for kind, split in renumbered.items()}


def _label_column(split: Dataset) -> np.ndarray:
    column = read_column(split, "label")
    texts = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return np.asarray(column.to_pylist()) if texts else column.to_numpy()


def _renumber(split: Dataset, names: list[str]) -> Dataset:
    """Replace each label by the position of its class in `names`, or by -1 if it is not there."""
    positions = {name: position for position, name in enumerate(names)}
    numbers = np.array([positions.get(name, -1) for name in class_names(split)])
    return _replace_labels(split, numbers[read_labels(split)], names)


def _replace_labels(split: Dataset, numbers: np.ndarray, names: list[str]) -> Dataset:
    """Put another label column beside the images, which stay where they are on disk; `Dataset.map` would copy them."""
    return add_column(split.remove_columns("label"), "label", numbers, ClassLabel(names=names))
