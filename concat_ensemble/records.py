"""Files that people write, read with care: YAML that cannot grow, and values of the types that a dataclass wants."""

import dataclasses
import math
import types
import typing
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
