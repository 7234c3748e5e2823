"""Recipes as YAML files: finding them by name, and reading them into dataclasses."""

import dataclasses
from importlib.resources.abc import Traversable
from typing import TypeVar, get_type_hints

import msgspec

from concat_ensemble.errors import suggest
from concat_ensemble.files import read_yaml

T = TypeVar("T")


def recipe_names(folder: Traversable) -> list[str]:
    """Sorted names of the recipes in a folder."""
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def find_recipe(name: str, folder: Traversable) -> Traversable:
    """Find the file of a recipe.

    Raises:
        ValueError: for an unknown name, with similar names and all names.
    """
    names = recipe_names(folder)
    if name not in names:
        raise ValueError(f"no recipe {name!r}{suggest(name, names)} The recipes are {', '.join(names)}.")
    return folder / f"{name}.yaml"


def read_recipe(cls: type[T], path: Traversable) -> T:
    """Read a dataclass from a recipe's file, whose keys are its fields. The field `recipe` gets the file's name.

    Raises:
        ValueError: naming the file and the key that is unknown, missing, or of another type.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} has no keys.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "recipe"}
    for key in content:
        if key not in fields:
            raise ValueError(f"{path.name}: {key!r} is not a key of a recipe; these are {', '.join(fields)}.")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in content]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
    hints = get_type_hints(cls)
    for key, value in content.items():
        try:
            msgspec.convert(value, hints[key])
        except msgspec.ValidationError as error:
            raise ValueError(f"{path.name}: {key}={value!r}: {error}.") from error
    return cls(recipe=path.name.removesuffix(".yaml"), **content)
