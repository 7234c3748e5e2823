"""Splits of a dataset: picking them by name, cutting the missing ones, and drawing smaller ones."""

from collections.abc import Collection, Mapping

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from sklearn.model_selection import train_test_split

from concat_ensemble.data.labels import read_labels

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


def pick_splits(source: Mapping[str, Dataset | IterableDataset], names: dict[str, str | None]) -> dict[str, Dataset]:
    """Pick a split of `source` for each of `train`, `validation` and `test`, by its name in `names` or a common name.
    Raises ValueError for a split that does not exist or is empty, and without a training split."""
    named = {name.partition("[")[0] for name in names.values() if name}
    picked = {kind: pick_split(source, kind, name, exclude=named) for kind, name in names.items()}
    splits = {kind: split for kind, split in picked.items() if isinstance(split, Dataset)}
    if "train" not in splits:
        raise ValueError(f"no training split among {sorted(source)}; name it with train_split.")
    for kind, split in splits.items():
        refuse_empty(split, kind)
    return splits


def pick_split(
    source: Mapping[str, Dataset | IterableDataset], kind: str, name: str | None, *, exclude: Collection[str] = ()
) -> Dataset | IterableDataset | None:
    """Pick a split by name, as in `train[:80%]`, or by the common names of its kind if `name` is None.

    A dataset's only split is its training split, whatever its name. Names in `exclude` do not count as common names.
    Raises ValueError for a split that does not exist, or a malformed slice.
    """
    if name is None:
        candidates = [split for split in source if split not in exclude]
        if not (kind == "train" and len(source) == 1):
            candidates = [split for split in candidates if split in SPLIT_NAMES[kind]]
        return source[candidates[0]] if candidates else None
    base, bracket, bounds = name.partition("[")
    if base not in source:
        raise ValueError(f"{kind}_split={name!r} does not exist; the dataset has {', '.join(source)}.")
    split = source[base]
    if not bracket:
        return split
    if isinstance(split, IterableDataset):
        raise ValueError(f"{kind}_split={name!r} is a slice, which a stream does not have; set streaming=False.")
    try:
        if not bounds.endswith("]"):
            raise ValueError("no closing bracket")
        start, stop = (_parse_bound(bound, len(split)) for bound in bounds[:-1].split(":"))
    except ValueError as error:
        raise ValueError(f"{kind}_split={name!r} is not a slice such as train[:80%] or train[1000:2000].") from error
    start, stop, _ = slice(start, stop).indices(len(split))
    return split.select(np.arange(start, max(start, stop)))


def refuse_empty(split: Dataset, kind: str) -> None:
    """Raise ValueError for a split without images."""
    if not len(split):
        raise ValueError(f"the {kind} split is empty; name another with {kind}_split, or keep more of it.")


def complete_splits(
    splits: dict[str, Dataset], *, validation_size: float, test_size: float, shots: int | None, seed: int
) -> dict[str, Dataset]:
    """Cut a missing test split, draw the few-shot subset, and cut a missing validation split, in this order.

    A validation split without a test split becomes the test split. The arguments are those of `load_data`.
    """
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        splits["train"], splits["test"] = _cut_split(splits["train"], "test_size", test_size, seed)
    if shots is not None:
        parts = [splits.pop(kind) for kind in ("train", "validation") if kind in splits]
        splits["train"] = _draw_shots(concatenate_datasets(parts), shots, seed)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _cut_split(splits["train"], "validation_size", validation_size, seed)
    return {kind: splits[kind] for kind in ("train", "validation", "test")}


def limit_split(split: Dataset, limit: int, seed: int) -> Dataset:
    """Draw `limit` images, which stay in their order. Of two limits, the smaller one draws a subset of the larger."""
    if limit >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))


def _parse_bound(text: str, total: int) -> int | None:
    """One bound of a slice, as a number of images or as a percentage."""
    if not text:
        return None
    return round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)


def _cut_split(split: Dataset, name: str, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut off a random fraction `size`, stratified by class if each class can be on both sides."""
    if not 0 < size < 1:
        raise ValueError(f"{name}={size} must be a fraction between 0 and 1.")
    labels = read_labels(split)
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    can_stratify = counts.min() >= 2 and min(size, 1 - size) * len(labels) >= len(counts)
    stratify = labels if can_stratify else None
    try:
        rest, part = train_test_split(np.arange(len(labels)), test_size=size, random_state=seed, stratify=stratify)
    except ValueError as error:
        raise ValueError(f"cannot cut {name}={size} off {len(labels)} images: {error}") from error
    return split.select(np.sort(rest)), split.select(np.sort(part))


def _draw_shots(split: Dataset, shots: int, seed: int) -> Dataset:
    """Draw `shots` images of each class."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = read_labels(split)[order]
    subsets = [order[labels == label][:shots] for label in np.unique(labels)]
    fewest = min(map(len, subsets))
    if fewest < shots:
        raise ValueError(f"shots={shots}: a class has {fewest} images for training and validation; use fewer.")
    return split.select(np.sort(np.concatenate(subsets)))
