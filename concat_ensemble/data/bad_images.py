"""Images that cannot be used: one error that names all of them, or their rows left out."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict

from concat_ensemble.data.images import describe_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.errors import argument

BadImages = dict[str, dict[int, str]]  # split -> row -> why its image cannot be used
NAMED = 20  # images that an error names; it counts the others


def describe_bad_images(splits: Mapping[str, Dataset], bad: BadImages) -> str:
    """The images with their splits, rows, files and reasons, up to `NAMED` of them, and the number of the others."""
    images = [(split, row, reason) for split, rows in bad.items() for row, reason in sorted(rows.items())]
    total = sum(map(len, splits.values()))
    names = [f"the {split} split, {describe_image(splits[split], row)}: {why}" for split, row, why in images[:NAMED]]
    more = f"; and {len(images) - NAMED:,} more" if len(images) > NAMED else ""
    return f"{len(images):,} of {total:,} images cannot be used: {'; '.join(names)}{more}"


def _describe_remedy(bad: BadImages) -> str:
    """What to do about bad images that are not left out yet."""
    images = "it" if sum(map(len, bad.values())) == 1 else "them"
    return f"remove or repair {images}, or leave {images} out with {argument('skip_bad', True)}"


def usable_rows(splits: Mapping[str, Dataset], bad: BadImages, *, skip_bad: bool) -> dict[str, np.ndarray]:
    """Numbers of the rows of each split whose images can be used, in order.

    Raises:
        ValueError: naming the bad images, unless `skip_bad` is set; and always if they are all images of a split, or
            all images of a class in the training split or in all splits.
    """
    if any(bad.values()) and not skip_bad:
        raise ValueError(f"{describe_bad_images(splits, bad)}; {_describe_remedy(bad)}.")
    rows = {name: np.setdiff1d(np.arange(len(split)), list(bad.get(name, ()))) for name, split in splits.items()}
    if any(bad.values()):
        _refuse_empty(splits, bad, rows)
    return rows


def without_rows(dataset: DatasetDict, skipped: Mapping[str, Sequence[int]] | None) -> DatasetDict:
    """The dataset without some rows, such as the `skipped` ones of a feature table; the others keep their order."""
    if not skipped or not any(skipped.values()):
        return dataset
    rows = {name: np.setdiff1d(np.arange(len(split)), skipped.get(str(name), [])) for name, split in dataset.items()}
    return DatasetDict({name: split.select(rows[name]) for name, split in dataset.items()})


def _refuse_empty(splits: Mapping[str, Dataset], bad: BadImages, rows: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if no image of a split, or of a class, is left."""
    for name, split in splits.items():
        if len(split) and not len(rows[name]):
            raise ValueError(f"no image of the {name} split can be used; {describe_bad_images(splits, bad)}.")
    labels = {name: read_labels(split) for name, split in splits.items()}
    left = {name: labels[name][rows[name]] for name in splits}
    lost = np.setdiff1d(np.concatenate(list(labels.values())), np.concatenate(list(left.values())))
    if "train" in splits:
        lost = np.union1d(lost, np.setdiff1d(labels["train"], left["train"]))
    if len(lost):
        classes = ", ".join(class_names(next(iter(splits.values())))[label] for label in lost[:NAMED])
        problem = f"no training image of these classes can be used: {classes}; {describe_bad_images(splits, bad)}"
        raise ValueError(f"{problem}; repair some of them, or choose the other classes with {argument('classes')}.")
