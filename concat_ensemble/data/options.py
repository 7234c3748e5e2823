"""The options that studies and commands share: which dataset, and how features are extracted from it."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concat_ensemble.errors import argument, check_at_least
from concat_ensemble.files import without_folders

if TYPE_CHECKING:
    from datasets import DatasetDict

    from concat_ensemble.data.audit import AuditedData

DEFAULT_NAME, DEFAULT_TEST_SIZE = "scattered:digits", 0.5


def option(default: Any, description: str, **settings: Any) -> Any:
    """A field with its help text, as in transformers' `TrainingArguments`, and settings of its command-line option."""
    return dataclasses.field(default=default, metadata={"help": description, **settings})


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """A labelled image dataset: its name, columns and splits, and how many of its images are used.

    The fields are arguments of `load_data`, except that `classes` is a text, and that a `recipe` may take the place of
    the name, columns and splits. Raises ValueError for classes that cannot be parsed, or a recipe together with a
    field that it determines, and for sizes that no subset can have.
    """

    name: str | None = option(
        None,
        "digits, scattered:digits (when left out), a Hub id, parquet:FILES, imagefolder:FOLDER, webdataset:FILES, or "
        "a path.",
        flags=["--dataset"],
    )
    config: str | None = option(None, "Configuration of a Hub dataset.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    image_column: str | None = option(None, "Column with the images; found by its type when left out.")
    label_column: str | None = option(None, "Column with the labels; found by its type and name when left out.")
    classes: str | None = option(None, "Use only these classes: 0,1,2 or 5-9 or names.")
    train_split: str | None = option(None, "Split to train on, such as train or train[:80%].")
    validation_split: str | None = option(None, "Split to choose the regularization on.")
    test_split: str | None = option(None, "Split to test on.")
    test_size: float | None = option(
        None, "Share of the training images to test on where there is no test split; half of them when left out."
    )
    limit: int | None = option(None, "Use at most this many images of each split.")
    shots: int | None = option(None, "Use this many images of each class for training and validation together.")
    group_column: str | None = option(
        None, "Column whose images belong together, such as those of one patient; no split separates them."
    )
    use_folders: bool = option(False, "Take the classes from the folders although there is a metadata file.")
    seed: int = option(0, "Random seed for the splits, the subset and the few-shot draw.")
    recipe: str | None = option(None, "Name of a dataset recipe, such as cifar100.")

    def __post_init__(self):
        _parse_classes(self.classes)
        check_at_least("limit", self.limit, 1)
        check_at_least("shots", self.shots, 2, ": some are for validation")
        if self.test_size is not None and not 0 < self.test_size < 1:
            raise ValueError(f"{argument('test_size', self.test_size)} must be a fraction between 0 and 1.")
        chosen = [name for name in self._naming if getattr(self, name) is not None]
        if self.recipe and chosen:
            others = " and ".join(map(argument, chosen))
            raise ValueError(f"{argument('recipe', self.recipe)} does not go with {others}; leave one out.")

    @property
    def _naming(self) -> list[str]:
        names = [field.name for field in dataclasses.fields(self)]
        return names[: names.index("limit")]

    @property
    def _subset(self) -> dict[str, Any]:
        subset = {"limit": self.limit, "seed": self.seed, "shots": self.shots, "group_column": self.group_column}
        return {name: value for name, value in subset.items() if value is not None or name == "limit"}

    @property
    def record(self) -> dict[str, Any]:
        """How the dataset is named: arguments of `load_data`, or what a recipe records."""
        if self.recipe:
            from concat_ensemble.data.dataset_recipes import dataset_recipe

            return dataset_recipe(self.recipe).record | self._subset
        naming = {name: getattr(self, name) for name in self._naming}
        naming["name"] = self.name or DEFAULT_NAME
        naming["classes"] = _parse_classes(self.classes)
        naming["test_size"] = DEFAULT_TEST_SIZE if self.test_size is None else self.test_size
        return naming | self._subset | ({"use_folders": True} if self.use_folders else {})

    @property
    def _public_record(self) -> dict[str, Any]:
        """The record with the last part alone of an absolute path. Eight characters stand for the whole of it, so that
        two folders of one name are not taken for the same."""
        record = self.record
        name = without_folders(record["name"])
        if name != record["name"]:
            record |= {"name": name, "path_sha256": hashlib.sha256(os.fsencode(record["name"])).hexdigest()[:8]}
        return record

    def is_recorded(self, recorded: dict[str, Any]) -> bool:
        """Whether a results file was measured on this very dataset, by what it records."""
        record = self._public_record
        optional = ("shots", "group_column", "use_folders", "path_sha256")
        return record.items() <= recorded.items() and all(name in record for name in optional if name in recorded)

    @property
    def study(self) -> str:
        """A name for what is measured on this dataset."""
        classes = self.classes and f"classes-{self.classes}"
        return self.recipe or "-".join(
            filter(None, [without_folders(self.name or DEFAULT_NAME), self.config, classes])
        )

    @property
    def file_stem(self) -> str:
        """Name of the results files, without their ending: lower-case letters, digits and dashes."""
        limit = "" if self.limit is None else f"limit-{self.limit}"
        shots = "" if self.shots is None else f"shots-{self.shots}"
        groups = "" if self.group_column is None else f"groups-{self.group_column}"
        return re.sub(r"[^a-z0-9]+", "-", f"{self.study}-{limit}-{shots}-{groups}".lower()).strip("-") or "dataset"

    def load(self) -> "AuditedData":
        """The splits `train`, `validation` and `test` without the rows that leak, and the audit of what was found.
        Errors are those of `load_data`, `DatasetRecipe.load` and `audit_splits`."""
        from concat_ensemble.data.audit import audit_splits

        return audit_splits(self.load_splits())

    def load_splits(self) -> "DatasetDict":
        """The splits as they are, without an audit, with the column `image_hash`. Under `accelerate launch` all
        processes must make this call; each reads its share of the images."""
        from concat_ensemble.data.dataset_recipes import dataset_recipe
        from concat_ensemble.data.loading import load_data

        if self.recipe:
            return dataset_recipe(self.recipe).load(**self._subset, hash_images=True)
        return load_data(**self.record, hash_images=True)

    def describe(self, audited: "AuditedData") -> dict[str, Any]:
        """What results files record: how the dataset is named, without the folders of this machine, the number of test
        images that are scored, and whether the dataset is on the Hub."""
        name = self.record["name"]
        on_hub = "/" in name and not Path(name.partition(":")[2] or name).exists()
        return self._public_record | {"test_images": len(audited.data["test"]), "on_hub": on_hub}

    def with_recipes(self, recipes: Sequence[str]) -> list["DatasetOptions"]:
        """One dataset for each of several recipes, or this one where there are none."""
        return [dataclasses.replace(self, recipe=recipe) for recipe in dict.fromkeys(recipes)] or [self]


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """How features are extracted: arguments of `extract_features`."""

    batch_size: int = option(64, "Images in a batch.", min=1)
    num_workers: int = option(0, "Processes that read images.", flags=["--workers"], min=0)
    skip_bad: bool = option(False, "Go on without images that cannot be read; they are counted.", flags=["--skip-bad"])
    quiet: bool = option(False, "Print results and errors only.", flags=["--quiet", "-q"])


def _parse_classes(text: str | None) -> list[int | str] | None:
    """The classes in "0,1,2", "5-9" or names: numbers from 0, or names."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError(f"{argument('classes', text)} runs backwards; write {last}-{first}.")
        return list(range(first, last + 1))
    return [int(part) if part.isdigit() else part for part in text.split(",")]
