"""Recipes: the usual transfer datasets, each a YAML file in `recipes/` that names its columns, splits and metric."""

import difflib
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict

from concat_ensemble.data import class_names, load_data

METRICS = ("top1", "mean_per_class", "macro_f1")  # of `ProbeMetrics`: those that come with an interval
NAMING = ("name", "config", "revision", "image_column", "label_column", "train_split", "validation_split", "test_split")
_FOLDER = files("concat_ensemble") / "recipes"


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """What a recipe's file says: arguments of `load_data`, what must come of them, and the metric that is customary.

    Args:
        recipe: Name of the file, without its ending.
        num_classes, test_images: What the dataset is known to have; `load` checks it.
        metric: One of `METRICS`.
        license: Of the dataset, in words.
    """

    recipe: str
    name: str
    num_classes: int
    test_images: int
    metric: str
    license: str
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None

    @classmethod
    def read(cls, path: Path) -> "DatasetRecipe":
        """
        Raises:
            ValueError: naming the file and the key that is unknown, missing, or of another type.
        """
        try:
            given = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path.name} has no keys.")
        known = {field.name: field.type for field in fields(cls) if field.name != "recipe"}
        for key, value in given.items():
            if key not in known:
                raise ValueError(f"{path.name}: {key!r} is not a key of a recipe; these are {', '.join(known)}.")
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise ValueError(
                    f"{path.name}: {key}={value!r} is not of type {getattr(known[key], '__name__', 'str')}."
                )
        if missing := [key for key in ("name", "num_classes", "test_images", "metric", "license") if key not in given]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
        if given["metric"] not in METRICS:
            raise ValueError(f"{path.name}: metric={given['metric']!r} must be one of {', '.join(METRICS)}.")
        return cls(recipe=path.name.removesuffix(".yaml"), **given)

    @property
    def naming(self) -> dict[str, Any]:
        """The arguments of `load_data`."""
        return {key: getattr(self, key) for key in NAMING}

    @property
    def described(self) -> dict[str, Any]:
        """For the record of a result: how the dataset was named, by which recipe, and the metric to read it by."""
        return {**self.naming, "recipe": self.recipe, "metric": self.metric}

    def load(self, *, limit: int | None = None, shots: int | None = None, seed: int = 0) -> DatasetDict:
        """As `load_data`, and checked.

        Raises:
            ValueError: when the dataset cannot be had, or has not the classes or test images that the recipe knows of.
        """
        data = load_data(**self.naming, limit=limit, shots=shots, seed=seed)
        expected = min(self.test_images, limit or self.test_images)
        for what, found, known in (
            ("classes", len(class_names(data["train"])), self.num_classes),
            ("test images", len(data["test"]), expected),
        ):
            if found != known:
                raise ValueError(
                    f"{self.name} has {found:,} {what} where recipe {self.recipe} expects {known:,}: it is not that dataset; "
                    "name it, its columns and its splits with --dataset instead."
                )
        return data


def dataset_recipe(name: str) -> DatasetRecipe:
    """
    Raises:
        ValueError: for an unknown name, with those that are near and all there are.
    """
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.7)
        meant = f"did you mean {' or '.join(near)}? There" if near else "there"
        raise ValueError(f"no recipe {name!r}; {meant} are {', '.join(known)}.")
    return DatasetRecipe.read(_FOLDER / f"{name}.yaml")


def recipe_names() -> list[str]:
    """Of all recipes, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))
