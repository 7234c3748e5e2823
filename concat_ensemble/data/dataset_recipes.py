"""Dataset recipes: the usual transfer datasets, each a YAML file in `recipes/` that names its columns, splits and metric."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from concat_ensemble.data.loading import class_names, load_data
from concat_ensemble.recipe_files import find_recipe, read_recipe

METRICS = ("top1", "mean_per_class", "macro_f1")  # of `ProbeMetrics`: those that come with an interval
NAMING = (
    "name",
    "config",
    "revision",
    "image_column",
    "label_column",
    "train_split",
    "validation_split",
    "test_split",
)
DATASETS = files("concat_ensemble.data") / "recipes"


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
        recipe = read_recipe(cls, path)
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


def dataset_recipe(name: str) -> DatasetRecipe:
    """
    Raises:
        ValueError: for an unknown name, with those that are near and all there are.
    """
    return DatasetRecipe.read(find_recipe(name, DATASETS))
