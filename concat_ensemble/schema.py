"""Types for what files say: checked once, where their content comes in, so that nothing further inside has to.

`check_type` and `read_json` take any type that msgspec knows: dataclasses, `Literal`, `Annotated[int, Meta(ge=0)]`.
"""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

T = TypeVar("T")
MAX_JSON_BYTES, MAX_JSON_DEPTH = 2**25, 32  # far beyond any results file

Count = Annotated[int, Meta(ge=0, le=10**18)]
PositiveCount = Annotated[int, Meta(ge=1, le=10**18)]
Amount = Annotated[float, Meta(ge=0, le=1e30)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Text = Annotated[str, Meta(max_length=100_000)]


def check_type(value: Any, expected: type[T], name: str = "") -> T:
    """`value` as a value of the type `expected`, without the keys that a dataclass does not have.

    Raises:
        ValueError: "name.key[0]='x' must be int, got str", without a full stop, for callers to add what to do.
    """
    try:
        return msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        raise ValueError(_describe(value, expected, name, str(error))) from error


def read_json(path: Path, expected: type[T], remedy: str) -> T:
    """Read a JSON file as a value of a type. Raises ValueError naming the file, the key and the remedy for one that is
    not, and OSError for a file that cannot be opened."""
    try:
        return check_type(decode_json(path), expected)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {remedy}.") from error


def decode_json(path: Path) -> Any:
    """The plain values in a JSON file. Raises ValueError, without the file's name, for no regular file, no JSON, and
    for one that is too large or nested too deeply."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes are more than {MAX_JSON_BYTES:,}")
    try:
        content = msgspec.json.decode(path.read_bytes())
        _check_depth(content, MAX_JSON_DEPTH)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep") from error
    return content


def shorten(value: Any) -> str:
    """The value as a message shows it, however long it is."""
    try:
        return reprlib.repr(value)[:200]
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "a huge number"


def _check_depth(value: Any, depth: int) -> None:
    if not depth:
        raise RecursionError
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, depth - 1)


def _describe(value: Any, expected: Any, name: str, message: str) -> str:
    """msgspec's message in the words of JSON and YAML, with the place and the value."""
    problem, _, place = message.replace("`", "").partition(" - at ")
    if place.startswith("key in "):
        place = place.removeprefix("key in ")
        keys = [key for key in _find(value, place) if not isinstance(key, str)] or list(_find(value, place))
        return f"{_join(name, place)} has the key {shorten(keys[0])}, where {_in_words(problem)} must be"
    if missing := re.fullmatch(r"Object missing required field (.+)", problem):
        return f"{_join(name, place)} lacks {missing[1]}"
    is_choice = get_origin(expected) is Literal and not place
    wanted = f"one of {', '.join(get_args(expected))}" if is_choice else _in_words(problem)
    return f"{_join(name, place)}={shorten(_find(value, place))} must be {wanted}"


def _in_words(problem: str) -> str:
    words = problem.removeprefix("Expected ").replace("array", "list").replace("object", "mapping")
    if "float" in words and "got str" in words:
        return f"{words} (YAML takes 1e-3 for text: write 0.001 or 1.0e-3)"
    return "a smaller number" if words == "Number out of range" else words


def _join(name: str, place: str) -> str:
    """`dataset` and `$.limit` as `dataset.limit`; the whole value without a name is "its content"."""
    return f"{name}{place.removeprefix('$')}".removeprefix(".") or "its content"


def _find(value: Any, place: str) -> Any:
    """What stands at a place such as `$.rows[0].runs`; up to the mapping where msgspec does not say which key."""
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", place.partition("[...]")[0]):
        value = value[key] if key else value[int(index)]
    return value
