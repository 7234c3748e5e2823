"""Files and names that are nearly right, made of good ones. A seed always gives the same."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

SCRIPT = '<script src="//evil.example/x.js"></script>'
LINK = "![x](https://evil.example/x.png)[x](javascript:alert(1))"
CONTROLS = [
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\x00",
    "\r",
    "\n",
    "\t",
    "\x7f",
    "\x9b2J",
    "\u202e",
    "\u2066",
    "\u200f",
    "\u2028",
]
CONTROLS += ["\ud800", "\udcff", "\ufeff"]
MARKUP = [
    "[red]",
    "[/]",
    "[/red]",
    "[link=https://evil.example]x[/link]",
    "|",
    "`",
    "```",
    "**",
    "\\",
    "$",
    "#",
    "{{ 7 * 7 }}",
]
MARKUP += ["---", "<!--", "-->", "&lt;", "%s", "{0}", "=cmd|x", '"', "'", ": ", "- ", "~", SCRIPT, LINK]
STRINGS = [
    "",
    "x",
    "../x",
    "/etc/passwd",
    "https://evil.example/x",
    "os.system",
    "null",
    "NaN",
    "1",
    "9" * 5000,
    "x" * 20_000,
]
NUMBERS = [
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**30),
    1e308,
    1e-320,
    0.1,
    float("nan"),
    float("inf"),
    -float("inf"),
]
OTHERS = [True, False, None, [], {}, [[]], [None], {"x": None}, {"": ""}, [1, "x", None], {"self": 1}]
NESTINGS = (20, 200, 1500, 100_000)
NESTED = re.compile(r"""["']@nested (\d{1,6})@["']""")


class Again(str):
    """A key that a dict can have twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Writer(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class FastWriter(yaml.CSafeDumper):
    ignore_aliases = Writer.ignore_aliases


for writer in (Writer, FastWriter):
    writer.add_multi_representer(str, lambda writer, text: writer.represent_str(str(text)))


def as_json(value: Any) -> str:
    return _nest(json.dumps(value, default=str))


def as_yaml(value: Any) -> str:
    options = {"default_flow_style": None, "width": 10**6, "sort_keys": False}
    try:
        return _nest(yaml.dump(value, Dumper=FastWriter, **options))
    except UnicodeEncodeError:  # of half a character
        return _nest(yaml.dump(value, Dumper=Writer, **options))


def _nest(text: str) -> str:
    return NESTED.sub(lambda match: "[" * int(match[1]) + "]" * int(match[1]), text)


def any_value(random: Random, depth: int = 3) -> Any:
    """Of any type; strings and numbers more often than lists and dicts."""
    kind = random.randrange(12)
    if kind < 3:
        return random.choice(NUMBERS) if random.random() < 0.7 else random.randint(-(10**6), 10**6)
    if kind < 7:
        return any_text(random)
    if kind < 9 or not depth:
        return copy.deepcopy(random.choice(OTHERS))
    if kind == 9:
        return f"@nested {random.choice(NESTINGS)}@" if random.random() < 0.3 else [[[[[[[[[["x"]]]]]]]]]]
    if kind == 10:
        return [any_value(random, depth - 1) for _ in range(random.randrange(4))]
    return {any_text(random): any_value(random, depth - 1) for _ in range(random.randrange(4))}


def any_text(random: Random) -> str:
    """A word, mostly with something in it that is more than text somewhere."""
    if random.random() < 0.2:
        return random.choice(STRINGS)
    parts = [random.choice(CONTROLS if random.random() < 0.5 else MARKUP) for _ in range(random.randint(1, 3))]
    parts.insert(random.randrange(len(parts) + 1), random.choice(["x", "pair", "é", "日本", "1", ""]))
    return "".join(parts)


def any_name(random: Random, good: str) -> str:
    """A good name with something put into it or removed, or another."""
    if random.random() < 0.1:
        return any_text(random)
    at = random.randrange(len(good) + 1)
    return good[:at] + any_text(random) + good[at + random.randrange(3) :]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where in a JSON value something stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def change(value: Any, random: Random, keys: Sequence[Any], kinds_of_key: bool = False) -> Any:
    """The value with up to three things in it replaced, removed, added, doubled, exchanged or renamed.

    Args:
        value: A JSON value.
        random: What chooses.
        keys: Names of keys that may be added.
        kinds_of_key: Whether keys may be of any kind, as in YAML.
    """
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 2, 3])):
        ways = [place for place in places(value) if place]
        if not ways:
            break
        *way, last = random.choice(ways)
        parent = value
        for key in way:
            parent = parent[key]
        _change_at(parent, last, random, keys, kinds_of_key)
    return value


def _change_at(parent: Any, last: Any, random: Random, keys: Sequence[Any], kinds_of_key: bool) -> None:
    action = random.randrange(10)
    if action == 0:
        del parent[last]
    elif action == 1 and isinstance(parent, dict):
        new = random.choice(keys) if random.random() < 0.8 else any_text(random)
        parent[new] = any_value(random)
    elif action == 2 and isinstance(parent, dict):
        parent[Again(last)] = any_value(random)
    elif action == 3 and isinstance(parent, dict):
        new = random.choice([1, None, True, 1.5, "", "self"]) if kinds_of_key else any_text(random)
        parent[new] = parent.pop(last)
    elif action == 4:
        parent[last] = [copy.deepcopy(parent[last])]
    elif action == 5 and isinstance(parent[last], str):
        parent[last] = any_name(random, parent[last])
    else:
        parent[last] = any_value(random)


def damage(content: bytes, random: Random) -> bytes:
    """Some bytes changed, removed, doubled or put in."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(content) + 1)
        end = min(len(content), at + random.choice([1, 1, 2, 8, 100]))
        action = random.randrange(5)
        if action == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
        elif action == 1:
            content = content[:at] + content[end:]
        elif action == 2:
            content = content[:end] + content[at:]
        elif action == 3:
            content = content[:at]
        else:
            content = content[:at] + any_text(random).encode("utf-8", "surrogatepass")[:200] + content[at:]
    return content


def near(goods: Sequence[Any], write: Callable[[Any], str], keys: Sequence[Any] = ("x",)) -> Callable[[Random], bytes]:
    """How to make a file from one of these values: mostly near misses; anything at all; and damaged bytes."""

    def make(random: Random) -> bytes:
        good, chance = random.choice(goods), random.random()
        value = good if chance < 0.2 else any_value(random) if chance < 0.25 else None
        if value is None:
            value = change(good, random, keys, kinds_of_key=write is as_yaml)
        content = write(value).encode("utf-8", "surrogatepass")
        return damage(content, random) if chance < 0.2 or random.random() < 0.1 else content

    return make
