"""Recipes as YAML files: finding them by name, and reading them into dataclasses with checked fields."""

import dataclasses
from importlib.resources.abc import Traversable
from typing import Any, TypeVar, get_type_hints

from concat_ensemble.errors import suggest
from concat_ensemble.files import read_yaml
from concat_ensemble.schema import check_type

T = TypeVar("T")


def recipe_names(folder: Traversable) -> list[str]:
    """Sorted names of the recipes in a folder."""
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def find_recipe(name: str, folder: Traversable) -> Traversable:
    """Find the file of a recipe. Raises ValueError for an unknown name, with similar names and all names."""
    names = recipe_names(folder)
    if name not in names:
        raise ValueError(f"no recipe {name!r}{suggest(name, names)} The recipes are {', '.join(names)}.")
    return folder / f"{name}.yaml"


def read_recipe(cls: type[T], path: Traversable) -> T:
    """Read a dataclass from a recipe's file, whose keys are its fields. The field `recipe` gets the file's name.
    Raises ValueError naming the file and the field that is unknown, missing or not valid."""
    fields = read_fields(cls, path, recipe=path.name.removesuffix(".yaml"))
    try:
        check_fields(cls, fields)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return cls(**fields)


def read_fields(cls: type, path: Traversable, **changes: Any) -> dict[str, Any]:
    """Read the fields of a dataclass from a YAML file, for `check_fields`. `changes` replace the file's values. Raises
    ValueError naming the file and the field that is unknown or missing."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}; write one 'field: value' on each line.")
    content |= changes
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in content:
        if name not in fields:
            hint = suggest(name, fields, limit=1)
            hint = f"; the fields are {', '.join(fields)}." if hint == "." else hint
            raise ValueError(f"{path.name}: no field {name!r}{hint}")
    required = (f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING)
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
    return content


def check_fields(cls: type, values: dict[str, Any]) -> None:
    """Check values against a dataclass's annotations, among them `Literal` and `Annotated[..., msgspec.Meta(...)]`.
    Raises ValueError naming the first field that does not fit, its value, and what is valid."""
    hints = get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        try:
            check_type(value, hints[name], name)
        except ValueError as error:
            raise ValueError(f"{error}.") from error
