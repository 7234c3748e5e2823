"""The command line of the training scripts: `SCRIPT RECIPE.yaml --FIELD VALUE ...`."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from concat_ensemble.console import errors
from concat_ensemble.errors import first_line, one_line
from concat_ensemble.files import without_folders
from concat_ensemble.training.recipe import Settings
from concat_ensemble.training.sharing import PARALLELISMS

SMOKE_IMAGES = 200
PARALLELISM = {
    "choices": PARALLELISMS,
    "default": "data",
    "help": "what several processes share: the images of each network (data), the networks (members), or what ends "
    "first (auto)",
}
S = TypeVar("S", bound=Settings)


def read_options(
    kind: type[S], description: str | None, arguments: Sequence[str] | None, **flags: dict[str, Any]
) -> tuple[S, argparse.Namespace]:
    """Settings and further options from a command line, that of this process when left out. Each field of the settings
    is an option; `flags` are further ones, as arguments of `add_argument` by name.

    Returns:
        The settings, and the options `cpu`, `max_images` (of each split, with `--smoke`) and `flags`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe_file", type=Path, help="a YAML file, such as those of training/recipes")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, even if there is a GPU")
    parser.add_argument("--smoke", action="store_true", help="run a few steps on a few images, to see that all runs")
    for name, keywords in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    add_field_options(parser, kind)
    options = parser.parse_args(arguments)
    names = {field.name for field in dataclasses.fields(kind)}
    settings = kind.from_file(options.recipe_file, **{k: v for k, v in vars(options).items() if k in names})
    options.max_images = SMOKE_IMAGES if options.smoke else None
    return settings.shrink() if options.smoke else settings, options


def add_field_options(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Add an option for each field. Values are YAML, as in the file: `--members "[1, 4]"`."""
    group = parser.add_argument_group("fields of the recipe", "each value is YAML, as in the file")
    for field in dataclasses.fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        group.add_argument(name, dest=field.name, type=_parse_yaml, metavar="VALUE", default=argparse.SUPPRESS)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with code 2 and one line on stderr after a user's error, which is a ValueError or an OSError, or
    if a GPU's memory is full."""
    try:
        yield
    except (ValueError, OSError) as error:
        errors.print(f"error: {one_line(error)}", soft_wrap=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        advice = (
            "raise gradient_accumulation, set gradient_checkpointing=true or mixed_precision=bf16, or use more GPUs"
        )
        errors.print(f"error: the GPU's memory is full ({first_line(error)}); {advice}.", soft_wrap=True)
        sys.exit(2)


def launch_command() -> str:
    """The command that starts this process again, for a card: a script, or a module of the installed package, without
    the folders of this machine."""
    program, arguments = sys.argv[0], map(without_folders, sys.argv[1:])
    if Path(program).parent == Path(__file__).parent:  # started by -m
        return shlex.join(["accelerate", "launch", "-m", f"{__package__}.{Path(program).stem}", *arguments])
    return shlex.join(["accelerate", "launch", without_folders(program), *arguments])
