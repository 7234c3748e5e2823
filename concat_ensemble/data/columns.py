"""Which columns of a dataset hold the images and the labels."""

from typing import TypeVar

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset

IMAGE_NAMES = ("image", "img", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y")
Split = TypeVar("Split", Dataset, IterableDataset)


def select_columns(split: Split, kind: str, *, image_column: str | None, label_column: str | None) -> Split:
    """Keep the columns of images and labels, renamed to `image` (encoded) and `label`.

    A column that is not named is found by its type, then by common names; of several `ClassLabel` columns, one with a
    common name is preferred. Raises ValueError if none is found in the split, which `kind` names.
    """
    features = read_features(split)
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    images += [name for name in IMAGE_NAMES if name in features]
    class_labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = [name for name in class_labels if name in LABEL_NAMES]
    labels += [name for name in LABEL_NAMES if name in features] + class_labels
    image = _choose_column("image", image_column, images, features=features, kind=kind)
    label = _choose_column("label", label_column, labels, features=features, kind=kind)
    if image == label:
        raise ValueError(f"image_column and label_column are both {image!r}; the dataset has {', '.join(features)}.")
    split = split.select_columns([image, label])
    if image != "image":
        split = split.rename_column(image, "image")
    if label != "label":
        split = split.rename_column(label, "label")
    return split.cast_column("image", Image(decode=False))


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
        raise ValueError(f"found no {role} column among {columns} in the {kind} split; name it with {role}_column.")
    return candidates[0] if name is None else name
