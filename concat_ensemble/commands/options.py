"""What the commands share: their options, dataclasses of options, and how they print."""

import dataclasses
import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from rich.table import Table
from typer.models import OptionInfo

from concat_ensemble.console import PlainConsole, out, print_error, stack_lines
from concat_ensemble.errors import name_options, option_name
from concat_ensemble.files import without_folders

Model = Annotated[str, typer.Argument(help="Folder or Hub id of an ensemble, or any member that build accepts.")]
Recipes = Annotated[list[str] | None, typer.Option("--recipe", help="Name of a dataset recipe, such as cifar100.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Repeats = Annotated[int, typer.Option(min=2, help="Number of repeats, with seeds 0, 1, 2, ...; two run at a time.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Train for a few steps only, to see that everything runs.")]


def expand_options(command: Callable) -> Callable:
    """Turn a command's dataclass parameters into one option for each of their fields, which is what typer understands.

    The metadata of a field are arguments of `typer.Option`: `help`, `min`, ..., and `flags` where they do not follow
    from its name. A field without metadata, or with the name of a parameter of the command, is left at its default.
    Messages of errors name the options in place of the parameters and fields.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint, [f for f in dataclasses.fields(hint) if f.metadata and f.name not in hints]
            parameters += [_as_parameter(hint, field) for field in groups[parameter.name][1]]
        else:
            parameters.append(parameter.replace(annotation=hint))

    flags = {parameter.name: flag for parameter in parameters if (flag := _find_flag(parameter))}

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        with name_options(flags.get):
            for name, (cls, fields) in groups.items():
                values[name] = cls(**{field.name: values.pop(field.name) for field in fields})
            command(**values)

    setattr(expanded, "__signature__", inspect.Signature(parameters))  # noqa: B010 (no attribute of a function's type)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _as_parameter(cls: type, field: dataclasses.Field) -> inspect.Parameter:
    settings = dict(field.metadata)
    flags = settings.pop("flags", [option_name(field.name)])
    option = typer.Option(*flags, rich_help_panel=cls.__name__.removesuffix("Options"), **settings)
    annotation = Annotated[get_type_hints(cls)[field.name], option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _find_flag(parameter: inspect.Parameter) -> str | None:
    """The long form of the option that sets a parameter; None for an argument without a name."""
    for each in get_args(parameter.annotation):
        if isinstance(each, OptionInfo):
            names = (each.default, *(each.param_decls or ()))  # in `Annotated`, the first name is the default
            flags = [name for name in names if isinstance(name, str) and name.startswith("--")]
            return flags[0] if flags else option_name(parameter.name)
    return None


def one_of(names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `typer.Argument` and `typer.Option` for a text that must be one of `names`."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} must be one of {', '.join(names)}.")
        return value

    return {"callback": check, "autocompletion": lambda: names}


def command_line() -> str:
    """The command as it was typed, for a card: without the folders of this machine."""
    return shlex.join(["concat-ensemble", *map(without_folders, sys.argv[1:])])


@contextmanager
def training_processes() -> Iterator[None]:
    """Training runs in processes of its own. Where one fails, print its last lines instead of our own traceback."""
    try:
        yield
    except RuntimeError as error:
        print_error(error)
        raise typer.Exit(2) from error


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


def print_file(path: Path) -> None:
    """Print a JSON file, in ASCII whatever it holds."""
    print_json(json.loads(path.read_text()))


def print_written(text: str | Table, facts: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Print what a command has written: for programs, or for people."""
    if as_json:
        print_json(facts)
    elif not quiet:
        out.print(text, soft_wrap=isinstance(text, str))


def number_table(headings: Iterable[Sequence[object]], *, wide: bool = False) -> Table:
    """A table of a name and its numbers, from the lines of each heading: names are folded where the screen is narrow,
    numbers never. Unless `wide`, it has no rules, which saves room."""
    table = Table() if wide else Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, lines in enumerate(headings):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(stack_lines(*lines), justify=justify, no_wrap=bool(number), overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table at its full width, even where the terminal is narrower: folded numbers cannot be read."""
    PlainConsole(width=max(out.width, 250)).print(table)
