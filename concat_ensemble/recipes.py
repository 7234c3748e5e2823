"""Recipes: the usual transfer datasets, each a YAML file in `recipes/` that names its columns, splits and metric; and the
paper's systems, each one in `recipes/ensembles/` that names its members.
"""

import difflib
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from concat_ensemble.data import class_names, load_data
from concat_ensemble.records import fits, read_yaml, spelled

METRICS = ("top1", "mean_per_class", "macro_f1")  # of `ProbeMetrics`: those that come with an interval
NAMING = ("name", "config", "revision", "image_column", "label_column", "train_split", "validation_split", "test_split")
_FOLDER = files("concat_ensemble") / "recipes"
ENSEMBLES = _FOLDER / "ensembles"


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """What a recipe's file says: arguments of `load_data`, what must come of them, and the metric that is customary.

    Args:
        recipe: Name of the file, without its ending.
        num_classes, test_images: What the dataset is known to have; `load` checks it.
        metric: One of `METRICS`.
        license: Of the dataset, in words.
        benchmark: The task's id in the dataset's `eval.yaml`, where the Hub has registered it as a benchmark.
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
    benchmark: str | None = None

    @classmethod
    def read(cls, path: Path) -> "DatasetRecipe":
        """
        Raises:
            ValueError: naming the file and the key that is unknown, missing, or of another type.
        """
        recipe = _read(cls, path)
        if recipe.metric not in METRICS:
            raise ValueError(f"{path.name}: metric={recipe.metric!r} must be one of {', '.join(METRICS)}.")
        return recipe

    @property
    def naming(self) -> dict[str, Any]:
        """The arguments of `load_data`."""
        return {key: getattr(self, key) for key in NAMING}

    @property
    def described(self) -> dict[str, Any]:
        """For the record of a result: how the dataset was named, by which recipe, and the metric to read it by."""
        registered = {"benchmark": self.benchmark} if self.benchmark else {}
        return {**self.naming, "recipe": self.recipe, "metric": self.metric, **registered}

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


@dataclass(frozen=True, kw_only=True)
class EnsembleRecipe:
    """What an ensemble's file says: `members` as `assemble` takes them, with what is known of each alone; the `provenance`
    of them all; and in words where their `checkpoints` come from.
    """

    recipe: str
    members: dict
    provenance: dict | None = None
    checkpoints: str | None = None

    def described(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Each member, its file in `folder` if it has one, and its provenance.

        Raises:
            ValueError: for a file that is not there, saying where it comes from.
        """
        found = {}
        for source, own in self.members.items():
            architecture, is_file, name = source.rpartition("=")
            if is_file and not (folder / name).is_file():
                raise ValueError(
                    f"no {folder / name}; it is in {self.checkpoints}; say where with --checkpoints FOLDER."
                )
            member = f"{architecture}={folder / name}" if is_file else name
            found[member] = {"ensemble_recipe": self.recipe} | (self.provenance or {}) | (own or {})
        return found


def dataset_recipe(name: str) -> DatasetRecipe:
    """
    Raises:
        ValueError: for an unknown name, with those that are near and all there are.
    """
    return DatasetRecipe.read(_named(name, _FOLDER))


def ensemble_recipe(name: str) -> EnsembleRecipe:
    """As `dataset_recipe`."""
    return _read(EnsembleRecipe, _named(name, ENSEMBLES))


def recipe_names(folder: Path = _FOLDER) -> list[str]:
    """Of all recipes in a folder, sorted; of the datasets' when left out."""
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _named(name: str, folder: Path) -> Path:
    known = recipe_names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.7)
        meant = f"did you mean {' or '.join(near)}? There" if near else "there"
        raise ValueError(f"no recipe {name!r}; {meant} are {', '.join(known)}.")
    return folder / f"{name}.yaml"


def _read(cls: type, path: Path) -> Any:
    """A recipe of a class from its file, whose keys are the class's fields and of their types."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path.name} has no keys.")
    known = {field.name: field for field in fields(cls) if field.name != "recipe"}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path.name}: {key!r} is not a key of a recipe; these are {', '.join(known)}.")
        if not fits(value, known[key].type):
            raise ValueError(f"{path.name}: {key}={value!r} is not of type {spelled(known[key].type)}.")
    if missing := [key for key, field in known.items() if field.default is MISSING and key not in given]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
    return cls(recipe=path.name.removesuffix(".yaml"), **given)
