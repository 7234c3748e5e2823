"""Files that people write, read with care: YAML that cannot grow, and values of the types that a dataclass wants."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

LONGEST, DEEPEST = 100_000, 16  # characters, and levels of nesting: far beyond any recipe
_OPENING = (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken, yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def read_yaml(path: Path) -> Any:
    """What a YAML file says, in plain values. Aliases are refused: ten lines of them say a billion words.

    Raises:
        ValueError: naming the file.
    """
    depth = 0
    try:
        text = path.read_text()
        if len(text) > LONGEST:
            raise ValueError(f"{len(text):,} characters are more than {LONGEST:,}")
        for token in yaml.scan(text):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if isinstance(token, yaml.AliasToken) or depth > DEEPEST:
                raise ValueError("it has an alias, or is nested too deeply; write out what you mean")
        return yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # PyYAML's constructors let those of int, datetime and others through
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as annotated. Whole numbers pass for floats, which are finite; dataclasses are looked into."""
    inner = typing.get_args(hint)
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(fits(value, option) for option in inner)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if dataclasses.is_dataclass(hint):
        return type(value) is hint and misfit(value) is None
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    return type(value) is hint


def misfit(record: Any) -> str | None:
    """Name of the first field of a dataclass's instance that is of another type than annotated."""
    hints = typing.get_type_hints(type(record))
    return next((name for name, hint in hints.items() if not fits(getattr(record, name), hint)), None)


def spelled(hint: Any) -> str:
    """A type in words, for messages."""
    return str(hint).replace("NoneType", "None") if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def recipe_names(folder: Path) -> list[str]:
    """Names of all recipes in a folder, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def find_recipe(name: str, folder: Path) -> Path:
    """The file of a recipe by its name."""
    known = recipe_names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.7)
        meant = f"did you mean {' or '.join(near)}? There" if near else "there"
        raise ValueError(f"no recipe {name!r}; {meant} are {', '.join(known)}.")
    return folder / f"{name}.yaml"


def read_recipe(cls: type, path: Path) -> Any:
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
