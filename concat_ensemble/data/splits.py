"""Picking the splits of a dataset by name."""

import re
from collections.abc import Collection, Mapping

import numpy as np
from datasets import Dataset, IterableDataset

from concat_ensemble.errors import argument

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def pick_splits(
    source: Mapping[str, Dataset | IterableDataset], names: dict[str, str | None], *, for_training: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """Pick a split of `source` for each of `train`, `validation` and `test`, by its name in `names` or a common name.

    A validation split without a test split is the test split, except for training. Raises ValueError for a split that
    does not exist, and without a training split.
    """
    named = {name.partition("[")[0] for name in names.values() if name}
    picked = {kind: pick_split(source, kind, name, exclude=named) for kind, name in names.items()}
    splits = {kind: split for kind, split in picked.items() if split is not None}
    if "train" not in splits:
        raise ValueError(f"no training split among {sorted(source)}; name it with {argument('train_split')}.")
    if not for_training and "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return splits


def pick_split(
    source: Mapping[str, Dataset | IterableDataset], kind: str, name: str | None, *, exclude: Collection[str] = ()
) -> Dataset | IterableDataset | None:
    """Pick a split by name, as in `train[:80%]`, or by the common names of its kind if `name` is None.

    A dataset's only split is its training split, whatever its name, and so is the only one whose name speaks of it,
    such as `train_mini`. Names in `exclude` do not count as common names, which may be capitalized.
    Raises ValueError for a split that does not exist, or a malformed slice.
    """
    if name is None:
        candidates = [split for split in source if split not in exclude]
        common = [split for split in candidates if split_kind(split) == kind]
        if kind == "train" and not common:
            similar = [split for split in candidates if find_split_kind(split) == kind]
            common = candidates if len(source) == 1 else similar if len(similar) == 1 else []
        return source[common[0]] if common else None
    base, bracket, bounds = name.partition("[")
    named = argument(f"{kind}_split", name)
    if base not in source:
        raise ValueError(f"{named} does not exist; the dataset has {', '.join(source)}.")
    split = source[base]
    if not bracket:
        return split
    if isinstance(split, IterableDataset):
        raise ValueError(f"{named} is a slice, which a stream does not have; set streaming=False.")
    try:
        if not bounds.endswith("]"):
            raise ValueError("no closing bracket")
        start, stop = (_parse_bound(bound, len(split)) for bound in bounds[:-1].split(":"))
    except ValueError as error:
        raise ValueError(f"{named} is not a slice such as train[:80%] or train[1000:2000].") from error
    start, stop, _ = slice(start, stop).indices(len(split))
    return split.select(np.arange(start, max(start, stop)))


def split_kind(name: str) -> str | None:
    """`train`, `validation` or `test` if `name` is one of their common names, in any case; else None."""
    return next((kind for kind, names in SPLIT_NAMES.items() if name.lower() in names), None)


def find_split_kind(name: str) -> str | None:
    """The split that the name of a file or folder speaks of in a word of its own, as in `Train`, `test-images`,
    `val2017` or `imagenet_train-00001`, or that it begins with, as in `testset`."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    kinds = [kind for kind in map(split_kind, words) if kind]
    if kinds:
        return kinds[0]
    return next((kind for kind, names in SPLIT_NAMES.items() if name.lower().startswith(names)), None)


def refuse_empty(split: Dataset, kind: str) -> None:
    """Raise ValueError for a split without images."""
    if not len(split):
        remedy = f"name another with {argument(f'{kind}_split')}, or keep more of it"
        raise ValueError(f"the {kind} split is empty; {remedy}.")


def _parse_bound(text: str, total: int) -> int | None:
    """One bound of a slice, as a number of images or as a percentage."""
    if not text:
        return None
    return round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)
