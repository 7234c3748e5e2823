"""Load any image classification dataset as splits with the columns `image` and `label`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
)

from concat_ensemble.data.columns import read_features, select_columns
from concat_ensemble.data.cuts import Sampling, complete_splits
from concat_ensemble.data.folders import folder_hint
from concat_ensemble.data.groups import check_groups
from concat_ensemble.data.images import HASH_COLUMN, with_hashes
from concat_ensemble.data.labels import class_names, read_labels, select_classes, to_class_labels, unify_classes
from concat_ensemble.data.local_files import confine_files
from concat_ensemble.data.scattered import scatter_split
from concat_ensemble.data.sources import load_source
from concat_ensemble.data.splits import pick_split, pick_splits, refuse_empty
from concat_ensemble.data.streams import resolve_features, take_images

SCATTERED = "scattered:"


def load_data(
    name: str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    classes: Iterable[int | str] | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_size: float = 0.2,
    test_size: float | None = 0.5,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    use_folders: bool = False,
    for_training: bool = False,
    hold_out: bool = True,
    hash_images: bool = False,
) -> DatasetDict:
    """Load an image classification dataset with the splits `train`, `validation` and `test`.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8, gray); a Hub id; `"parquet:FILES"`,
            `"csv:FILES"`, `"json:FILES"`, `"webdataset:FILES"` or `"imagefolder:FOLDER"`; the path of a folder or a
            parquet file; or a `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`.
            `"scattered:NAME"` puts each image of one of these, which must be of one size, in gray at a random place,
            scale and rotation on a noisy 32x32 canvas (see `Scatter`).
        config, revision: Configuration and revision of a dataset on the Hub.
        image_column, label_column: Names of the columns; found by type and common names by default.
        group_column: Name of a column whose images belong together, such as those of one patient: no cut separates
            them. It is the column `group` of the result.
        classes: Keep only these classes, given by number or name. Labels are renumbered from 0 in the dataset's order.
        train_split, validation_split, test_split: Names of the splits, in `datasets` syntax; found by common names by
            default, except names that serve as another split. Without a test split, the validation split is the test
            split; without either, the test split is cut off the training split. A missing validation split is then
            cut off what remains of the training split. Cuts are stratified by class, and copies of an image (rows with
            the same encoded bytes) stay on one side.
        validation_size, test_size: Fraction of the training split to cut off for a missing split.
        limit: Draw at most this many images of each split. Of a stream, or of a folder of tars, only `limit` images of
            each of its own splits are read, in the order of a small shuffled buffer, and missing splits are cut off
            these.
        shots: Draw this many images of each class for training and validation together; at least 2.
        seed: Random seed for the cuts, the limit, the few-shot subset and the placement of scattered images.
        use_folders: Take the classes of a folder of images from its subfolders although it has a metadata file.
        for_training: Load `train` and `validation` alone, to pretrain on. A test split is not looked at; its labels
            may be hidden. If there is neither a validation nor a test split, `test_size` says how much to leave out,
            None for nothing. The images are not read to keep copies together in `validation`.
        hold_out: Without it, the result of `for_training` has all training images in `train`: those that would be cut
            off for `validation` follow the others. The images of a validation split stay out, as later tests may use
            them.
        hash_images: Add the column `image_hash`, so that neither `audit_splits` nor `extract_features` has to read an
            image for its hash. Under `accelerate launch` all processes must make this call; each reads and hashes its
            share of the images. Without it, a process that loads a dataset does not wait for the others.

    Returns:
        Splits with the columns `image`, encoded images with unchanged bytes (`convert_image` of the image processor
        handles palettes, CMYK, 16 bits and rotation), `label`, a `ClassLabel`, and `group` if it was asked for.

    Raises:
        ValueError, FileNotFoundError: for a dataset, column, split or class that does not exist, an empty split, fewer
            than two classes, labels that are hidden or no classes, or images without a group.
    """
    sampling = Sampling(
        validation_size=validation_size,
        test_size=test_size,
        limit=limit,
        shots=shots,
        seed=seed,
        for_training=for_training,
        hash_images=hash_images,
    )
    hold_out = hold_out or not for_training
    scattered = isinstance(name, str) and name.startswith(SCATTERED)
    plain_name = name.removeprefix(SCATTERED) if isinstance(name, str) else name
    source = load_source(plain_name, config=config, revision=revision, use_folders=use_folders, limit=limit)
    names = {"train": train_split, "validation": validation_split, "test": test_split}
    picked = pick_splits(source, names, for_training=for_training)
    has_test = "test" in picked or (for_training and "validation" in picked)
    unused = [*["test"] * for_training, *["validation"] * (not hold_out)]
    columns = {"image_column": image_column, "label_column": label_column, "group_column": group_column}
    try:
        used = {
            kind: _read_split(split, kind, columns, name=plain_name, limit=limit, seed=seed)
            for kind, split in picked.items()
            if kind not in unused
        }
    except ValueError as error:
        raise ValueError(f"{error}{folder_hint(plain_name, use_folders)}") from error
    splits = _match_splits(used, group_column, classes)
    splits = complete_splits(splits, sampling, has_test=has_test)
    _check_splits(splits)
    if for_training:
        splits.pop("test", None)
    if scattered:
        splits = {kind: scatter_split(split, kind, seed) for kind, split in splits.items()}
    if not hold_out:
        train = concatenate_datasets([splits["train"], splits.pop("validation")])
        splits["train"] = train if limit is None else train.select(range(min(limit, len(train))))
    if hash_images:
        splits = {kind: with_hashes(split, shared=True) for kind, split in splits.items()}
    order = ["image", "label"] + ["group"] * (group_column is not None) + [HASH_COLUMN] * hash_images
    return DatasetDict({kind: split.select_columns(order) for kind, split in splits.items()})


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
    return confine_files(stream, "train", name)


def _read_split(
    split: Dataset | IterableDataset,
    kind: str,
    columns: dict[str, str | None],
    *,
    name: Any,
    limit: int | None,
    seed: int,
) -> Dataset:
    """The images of a split with their labels as classes."""
    if isinstance(split, IterableDataset):
        stream = select_columns(resolve_features(split), kind, **columns)
        split = take_images(stream, kind, limit=limit, seed=seed)
    else:
        split = select_columns(split, kind, **columns)
    refuse_empty(split, kind)
    split = confine_files(split, kind, name)
    return to_class_labels(split, kind)


def _match_splits(
    splits: dict[str, Dataset], group_column: str | None, classes: Iterable[int | str] | None
) -> dict[str, Dataset]:
    """Number classes and groups alike in all splits, and keep some classes."""
    splits = unify_classes(splits)
    if group_column is not None:
        splits = check_groups(splits, group_column)
    return splits if classes is None else select_classes(splits, list(classes))


def _check_splits(splits: dict[str, Dataset]) -> None:
    for kind, split in splits.items():
        refuse_empty(split, kind)
    numbers = np.unique(read_labels(splits["train"]))
    if len(numbers) < 2:
        only_class = class_names(splits["train"])[numbers[0]]
        raise ValueError(f"the train split has the one class {only_class!r}; a probe needs two.")
