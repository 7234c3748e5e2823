"""Load any image classification dataset as splits with the columns `image` and `label`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset

from concat_ensemble.data.columns import read_features, select_columns
from concat_ensemble.data.labels import class_names, read_labels, select_classes, to_class_labels, unify_classes
from concat_ensemble.data.scattered import scatter_split
from concat_ensemble.data.sources import load_source
from concat_ensemble.data.splits import complete_splits, limit_split, pick_split, pick_splits, refuse_empty

SCATTERED = "scattered:"


def load_data(
    name: str | Path | Dataset | DatasetDict,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Iterable[int | str] | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_size: float = 0.2,
    test_size: float = 0.5,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load an image classification dataset with the splits `train`, `validation` and `test`.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8, gray); a Hub id; `"parquet:FILES"`,
            `"csv:FILES"`, `"json:FILES"` or `"imagefolder:FOLDER"`; the path of a folder or a parquet file; or a
            `Dataset` or `DatasetDict` in memory. `"scattered:NAME"` puts each image of one of these, which must be of
            one size, in gray at a random place, scale and rotation on a noisy 32x32 canvas (see `Scatter`).
        config, revision: Configuration and revision of a dataset on the Hub.
        image_column, label_column: Names of the columns; found by type and common names by default.
        classes: Keep only these classes, given by number or name. Labels are renumbered from 0 in the dataset's order.
        train_split, validation_split, test_split: Names of the splits, in `datasets` syntax; found by common names by
            default, except names that serve as another split. Without a test split, the validation split is the test
            split; without either, the test split is cut off the training split. A missing validation split is then
            cut off what remains of the training split. Cuts are stratified by class.
        validation_size, test_size: Fraction of the training split to cut off for a missing split.
        limit: Draw at most this many images of each split.
        shots: Draw this many images of each class for training and validation together; at least 2.
        seed: Random seed for the cuts, the limit, the few-shot subset and the placement of scattered images.

    Returns:
        Splits with the columns `image`, encoded images with unchanged bytes (`convert_image` of the image processor
        handles palettes, CMYK, 16 bits and rotation), and `label`, a `ClassLabel`.

    Raises:
        ValueError, FileNotFoundError: for a dataset, column, split or class that does not exist, an empty split, fewer
            than two classes, or labels that are not classes.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    if shots is not None and shots < 2:
        raise ValueError(f"shots={shots} must be at least 2: some are for validation.")
    scattered = isinstance(name, str) and name.startswith(SCATTERED)
    plain_name = name.removeprefix(SCATTERED) if isinstance(name, str) else name
    source = load_source(plain_name, config=config, revision=revision)
    splits = pick_splits(source, {"train": train_split, "validation": validation_split, "test": test_split})
    for kind, split in splits.items():
        split = select_columns(split, kind, image_column=image_column, label_column=label_column)
        splits[kind] = to_class_labels(split, kind)
    splits = unify_classes(splits)
    if classes is not None:
        splits = select_classes(splits, list(classes))
    splits = complete_splits(splits, validation_size=validation_size, test_size=test_size, shots=shots, seed=seed)
    if limit is not None:
        splits = {kind: limit_split(split, limit, seed) for kind, split in splits.items()}
    for kind, split in splits.items():
        refuse_empty(split, kind)
    numbers = np.unique(read_labels(splits["train"]))
    if len(numbers) < 2:
        only_class = class_names(splits["train"])[numbers[0]]
        raise ValueError(f"the train split has the one class {only_class!r}; a probe needs two.")
    if scattered:
        splits = {kind: scatter_split(split, kind, seed) for kind, split in splits.items()}
    return DatasetDict(splits.items())


def load_stream(
    name: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> IterableDataset:
    """Stream the training split of a dataset, so that it is never stored as a whole.

    The arguments and columns are those of `load_data`; `split` is found by common names by default.

    Raises:
        ValueError: for a dataset that is here as a whole (the digits, or saved by `datasets`), and for labels that are
            no `ClassLabel`, because a stream does not tell beforehand which classes there are.
    """
    source = load_source(name, config=config, revision=revision, streaming=True)
    stream = pick_split(source, "train", split)
    if not isinstance(stream, IterableDataset):
        raise ValueError(f"{name} cannot be streamed: it is here already; set streaming=False.")
    stream = select_columns(stream, "train", image_column=image_column, label_column=label_column)
    feature = read_features(stream)["label"]
    if not isinstance(feature, ClassLabel):
        problem = f"{name} cannot be streamed: its labels are {feature.dtype} and do not list the classes"
        raise ValueError(f"{problem}; cast them to ClassLabel, or set streaming=False.")
    return stream
