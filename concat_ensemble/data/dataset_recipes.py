"""Dataset recipes: the usual transfer datasets, each a YAML file in `recipes/` with its columns, splits and metric."""

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Self

from datasets import DatasetDict

from concat_ensemble.data.labels import class_names
from concat_ensemble.data.loading import load_data
from concat_ensemble.data.naming import METRICS
from concat_ensemble.errors import argument
from concat_ensemble.recipe_files import find_recipe, read_recipe

LOAD_ARGUMENTS = ("name", "config", "revision", "image_column", "label_column")
LOAD_ARGUMENTS += ("train_split", "validation_split", "test_split")
DATASETS = files("concat_ensemble.data") / "recipes"


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """The content of a recipe file: arguments of `load_data`, the sizes to expect, and the customary metric."""

    recipe: str  # name of the file without its extension
    name: str
    num_classes: int  # checked by `load`, like the next
    test_images: int
    metric: str  # one of `METRICS`
    license: str  # of the dataset, in words
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    benchmark: str | None = None  # id of the task in `eval.yaml`, if the Hub has registered the dataset as a benchmark

    @classmethod
    def read(cls, path: Traversable) -> Self:
        """Read a recipe file. Raises ValueError for a key that is unknown, missing, or of another type."""
        recipe = read_recipe(cls, path)
        if recipe.metric not in METRICS:
            raise ValueError(f"{path.name}: metric={recipe.metric!r} must be one of {', '.join(METRICS)}.")
        return recipe

    @property
    def load_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data`."""
        return {key: getattr(self, key) for key in LOAD_ARGUMENTS}

    @property
    def record(self) -> dict[str, Any]:
        """What a results file records: the arguments of `load_data`, the recipe and its metric."""
        benchmark = {"benchmark": self.benchmark} if self.benchmark else {}
        return {**self.load_arguments, "recipe": self.recipe, "metric": self.metric, **benchmark}

    def load(self, *, limit: int | None = None, **arguments: Any) -> DatasetDict:
        """Load the dataset with `load_data` and further `arguments` of it, such as `shots`, `seed` and `group_column`.
        Raises ValueError for another number of classes or test images."""
        data = load_data(**self.load_arguments, limit=limit, **arguments)
        actual = {"classes": len(class_names(data["train"])), "test images": len(data["test"])}
        expected = {"classes": self.num_classes, "test images": min(self.test_images, limit or self.test_images)}
        for what, number in actual.items():
            if number != expected[what]:
                problem = f"{self.name} has {number:,} {what} where recipe {self.recipe} expects {expected[what]:,}"
                remedy = f"name it with {argument('name')}, and its columns and splits, instead of the recipe"
                raise ValueError(f"{problem}; it is another dataset: {remedy}.")
        return data


def dataset_recipe(name: str) -> DatasetRecipe:
    """Read one of the package's recipes. Raises ValueError for an unknown name, with similar ones."""
    return DatasetRecipe.read(find_recipe(name, DATASETS))
