"""Cutting splits off the training split, and drawing smaller ones."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets
from sklearn.model_selection import train_test_split

from concat_ensemble.data.groups import number_images, number_units
from concat_ensemble.data.images import with_hashes
from concat_ensemble.data.labels import read_labels
from concat_ensemble.errors import argument, check_at_least


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which images are used, and how missing splits are cut; the fields are arguments of `load_data`. Raises
    ValueError for a limit or a number of shots that is too small."""

    validation_size: float
    test_size: float | None  # None: nothing, for training alone
    limit: int | None
    shots: int | None
    seed: int
    for_training: bool = False
    hash_images: bool = False

    def __post_init__(self):
        check_at_least("limit", self.limit, 1)
        check_at_least("shots", self.shots, 2, ": some are for validation")
        if self.test_size is None and not self.for_training:
            raise ValueError("test_size=None must be a fraction between 0 and 1, except for_training.")


def complete_splits(splits: dict[str, Dataset], sampling: Sampling, *, has_test: bool) -> dict[str, Dataset]:
    """Cut a missing test split, draw the few-shot subset, cut a missing validation split, and limit all, in this
    order.

    Copies of an image, which are the rows with the same encoded bytes, stay on one side of a cut, as do the images of
    a group. With a `limit`, only the images that are used are read for that: where one of them is on both sides, it is
    left out of the split that was cut off. For training, the images are not read to cut the validation split.
    `has_test` says whether the dataset has images to test on, which for training are not among `splits`.
    """
    splits = dict(splits)
    total, cut = len(splits["train"]), []
    compare_all = sampling.limit is None or sampling.limit >= total
    if not has_test and sampling.test_size is not None:
        cut.append("test")
        splits["train"], splits["test"] = cut_split(
            splits["train"],
            "test_size",
            sampling.test_size,
            seed=sampling.seed,
            copies=compare_all,
            shared=sampling.hash_images,
        )
    if sampling.shots is not None:
        parts = [splits.pop(kind) for kind in ("train", "validation") if kind in splits]
        splits["train"] = _draw_shots(concatenate_datasets(parts), sampling.shots, sampling.seed)
    if "validation" not in splits:
        if not sampling.for_training:
            cut.append("validation")
        splits["train"], splits["validation"] = cut_split(
            splits["train"],
            "validation_size",
            sampling.validation_size,
            seed=sampling.seed,
            copies=compare_all and not sampling.for_training,
            shared=sampling.hash_images,
        )
    splits = {kind: splits[kind] for kind in ("train", "validation", "test") if kind in splits}
    if sampling.limit is not None:
        splits = {kind: limit_split(split, sampling.limit, sampling.seed) for kind, split in splits.items()}
    return splits if compare_all else _drop_copies(splits, cut, shared=sampling.hash_images)


def cut_split(
    split: Dataset, name: str, size: float, *, seed: int, copies: bool, shared: bool = False
) -> tuple[Dataset, Dataset]:
    """Cut off a random fraction `size`, stratified by class if each class can be on both sides; `name` is for errors.

    Rows with the same `group` and, with `copies`, the same image stay together; `shared` is that of `with_hashes`.
    Without any of these the cut is scikit-learn's `train_test_split`; else see `assign_units`.
    """
    if not 0 < size < 1:
        raise ValueError(f"{argument(name, size)} must be a fraction between 0 and 1.")
    if copies:
        split = with_hashes(split, shared=shared)
    units, labels = number_units(split, copies=copies), read_labels(split)
    if units is not None:
        side = assign_units(units, labels, size, seed)
        if side.all() or not side.any():
            problem = f"cannot cut {argument(name, size)} off {len(labels)} images"
            what = "belong together by their groups" if "group" in split.column_names else "are copies of one image"
            remedy = f"name another split with {argument(f'{name[:-4]}split')}"
            raise ValueError(f"{problem}: they all {what}; {remedy}.")
        return split.select(np.flatnonzero(~side)), split.select(np.flatnonzero(side))
    side = cut_rows(labels, name, size, seed)
    return split.select(np.flatnonzero(~side)), split.select(np.flatnonzero(side))


def cut_rows(labels: np.ndarray, name: str, size: float, seed: int) -> np.ndarray:
    """(N,) bool: the rows that scikit-learn's `train_test_split` cuts off, stratified by class if each class can be on
    both sides. Raises ValueError, with the `name` of the fraction, where a side would be empty."""
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    can_stratify = counts.min() >= 2 and min(size, 1 - size) * len(labels) >= len(counts)
    stratify = labels if can_stratify else None
    problem = f"cannot cut {argument(name, size)} off {len(labels)} images"
    try:
        _, part = train_test_split(np.arange(len(labels)), test_size=size, random_state=seed, stratify=stratify)
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from error
    side = np.zeros(len(labels), dtype=bool)
    side[part] = True
    if len(np.unique(labels[~side])) < 2 <= len(counts):
        side = _spare_classes(labels, len(part), seed)
        if not side.any():
            raise ValueError(f"{problem}: each class needs one to train on.")
    return side


def _spare_classes(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """(N,) bool: up to `number` random rows, but never the last one of a class. For a handful of images, of which a
    random cut would leave one class to train on."""
    order = np.random.default_rng(seed).permutation(len(labels))
    _, first_of_class = np.unique(labels[order], return_index=True)
    side = np.zeros(len(labels), dtype=bool)
    side[np.delete(order, first_of_class)[:number]] = True
    return side


def assign_units(units: np.ndarray, labels: np.ndarray, size: float, seed: int) -> np.ndarray:
    """(N,) bool: the rows that are cut off, a fraction `size` of each class as far as whole units allow it.

    The largest units are placed first, those of one size in random order. Each goes to the side that brings the shares
    of its classes, and that of all images, closer to `size` over the units placed so far, in the sum of squares.

    Args:
        units: (N,) the number of each row's unit, from 0.
        labels: (N,) class numbers.
        size: Fraction to cut off.
        seed: Seed of the order.
    """
    rng, num_units = np.random.default_rng(seed), int(units.max()) + 1
    pairs, pair_counts = np.unique(np.stack([units, labels]), axis=1, return_counts=True)
    starts = np.searchsorted(pairs[0], np.arange(num_units + 1))
    sizes, totals = np.bincount(units), np.bincount(labels)
    shuffled = rng.permutation(num_units)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    ties = rng.random(num_units) < size
    weights = 1 / np.maximum(totals, 1)
    mean_weight = np.count_nonzero(totals) / len(labels)
    # By how much the rows cut off so far exceed their fraction: of each class, and of all.
    excess, overall = np.zeros(len(totals)), 0.0
    side = np.zeros(num_units, dtype=bool)
    for unit in order:
        here = slice(starts[unit], starts[unit + 1])
        classes, counts = pairs[1][here], pair_counts[here]
        before, total = excess[classes] - size * counts, overall - size * sizes[unit]
        # (before + counts)^2 - before^2, weighted: the change of the sum of squares if the unit is cut off
        change = (counts * (2 * before + counts) * weights[classes]).sum()
        change += sizes[unit] * (2 * total + sizes[unit]) * mean_weight
        side[unit] = ties[unit] if abs(change) < 1e-9 else change < 0
        excess[classes], overall = before + counts * side[unit], total + sizes[unit] * side[unit]
    if num_units > 1 and (side.all() or not side.any()):
        side[order[-1]] = not side[order[-1]]  # both sides need a unit: move the smallest
    return side[units]


def limit_split(split: Dataset, limit: int, seed: int) -> Dataset:
    """Draw `limit` images, which stay in their order. Of two limits, the smaller one draws a subset of the larger."""
    if limit >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))


def _draw_shots(split: Dataset, shots: int, seed: int) -> Dataset:
    """Draw `shots` images of each class."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = read_labels(split)[order]
    by_class = np.argsort(labels, kind="stable")  # in the random order within each class
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    if counts.min() < shots:
        problem = f"{argument('shots', shots)}: a class has {counts.min()} images for training and validation"
        raise ValueError(f"{problem}; use fewer.")
    place = np.arange(len(labels)) - np.repeat(starts, counts)  # within the class
    return split.select(np.sort(order[by_class[place < shots]]))


def _drop_copies(splits: dict[str, Dataset], cut: list[str], *, shared: bool) -> dict[str, Dataset]:
    """Leave images out of the splits that were cut off if a split before them has a copy."""
    if not cut:
        return splits
    splits = {kind: with_hashes(split, shared=shared) for kind, split in splits.items()}
    images = number_images(splits)
    for kind in cut:
        earlier = [each for each in ("train", "validation", "test") if each in splits]
        earlier = [images[each] for each in earlier[: earlier.index(kind)] if each == "train" or each in cut]
        splits[kind] = splits[kind].select(np.flatnonzero(~np.isin(images[kind], np.concatenate(earlier))))
    return splits
