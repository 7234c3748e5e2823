"""What the commands have in common: their options, and how these are read."""

import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from concat_ensemble.console import out

Model = Annotated[
    str, typer.Argument(help="Folder or Hub id of an ensemble, or anything that build takes as a member.")
]
DatasetName = Annotated[
    str, typer.Option(help="digits, scattered:digits, a Hub id, parquet:FILES, imagefolder:FOLDER, or a path.")
]
DatasetConfig = Annotated[str | None, typer.Option(help="Of a Hub dataset.")]
Revision = Annotated[str | None, typer.Option(help="Of a Hub dataset.")]
Classes = Annotated[str | None, typer.Option(help="Keep these: 0,1,2 or 5-9 or names.")]
Column = Annotated[str | None, typer.Option()]
Split = Annotated[str | None, typer.Option()]
TestSize = Annotated[float, typer.Option(help="Share cut off for the test where there is no test split.")]
Limit = Annotated[int | None, typer.Option(help="At most this many images of each split.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything drawn at random.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def command_line() -> str:
    return shlex.join(["concat-ensemble", *sys.argv[1:]])


def studies_of(context: typer.Context) -> dict[str, tuple[dict, Callable]]:
    """What a command's options name: for each dataset a name, how it was asked for, and how it is had."""
    from concat_ensemble.data.dataset_recipes import dataset_recipe
    from concat_ensemble.data.loading import load_data

    given = context.params
    drawn = {"limit": given["limit"], "seed": given["seed"]}
    drawn |= {"shots": given["shots"]} if given.get("shots") else {}
    names = ["config", "revision", "image_column", "label_column", "classes", "train_split", "validation_split", "test_split", "test_size"]  # fmt: skip
    if given["recipe"]:
        refuse_beside(context, "--recipe", ["dataset", *names])
        recipes = [dataset_recipe(name) for name in dict.fromkeys(given["recipe"])]
        studies = {known.recipe: (known.record | drawn, partial(known.load, **drawn)) for known in recipes}
    else:
        naming = {name: given[name] for name in names} | {"classes": _classes(given["classes"])}
        asked = {"name": given["dataset"], **naming, **drawn}
        words = [given["dataset"], given["config"], given["classes"] and f"classes-{given['classes']}"]
        studies = {"-".join(filter(None, words)): (asked, partial(load_data, **asked))}
    return studies


def file_name(study: str, limit: int | None, shots: int | None = None) -> str:
    words = [study, f"limit-{limit}" if limit else "", f"shots-{shots}" if shots else ""]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") or "dataset"


def described(asked: dict, data) -> dict:
    """How a dataset was asked for, and what the results say of it besides."""
    on_hub = "/" in asked["name"] and not Path(asked["name"].partition(":")[2] or asked["name"]).exists()
    return asked | {"test_images": len(data["test"]), "on_hub": on_hub}


def refuse_beside(context: typer.Context, what: str, parameters: list[str]) -> None:
    given = [name for name in parameters if context.get_parameter_source(name).name == "COMMANDLINE"]
    if given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{what} does not go with {options}; leave one out.")


def load_model(name: str, seed: int):
    """An ensemble from a folder or the Hub as it is, or one made of whatever `build` takes."""
    from concat_ensemble.members.assemble import HUB, assemble

    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) and not Path(name).exists()
    return assemble([HUB + name if is_hub_id else name], seed=seed)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ValueError where a new folder may not take the place of what is there."""
    if path.is_file():
        raise ValueError(f"{path} is a file; name a folder with --output.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} holds something already; add --overwrite or name another --output.")
        if not (path / "model.safetensors.index.json").is_file():
            raise ValueError(
                f"{path} holds something other than an ensemble, which --overwrite does not delete; name another --output."
            )


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` that takes its place when all went well; what was there stays until then."""
    refuse_taken(path, overwrite)
    parent = writable_parent(path)
    aside = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    aside.chmod(0o755)  # mkdtemp's folders are for the owner alone
    try:
        yield aside
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(aside / ".replaced")
        aside.rename(path)
        shutil.rmtree(path / ".replaced", ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def writable_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists; ValueError where nothing can be written there."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            return parent
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another --output.") from error


def new_file(path: Path, overwrite: bool) -> None:
    """Raise ValueError where a file may not take the place of what is there, or none can be written: better known before
    the work than after it."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; add --overwrite or name another --output.")
    writable_parent(path)


def tell(what: str | Table, facts: dict, as_json: bool, quiet: bool = False) -> None:
    """How a command that writes something ends: for people, or for machines."""
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    elif not quiet:
        out.print(what, soft_wrap=isinstance(what, str), markup=False)


def print_unfolded(table: Table) -> None:
    """As wide as it is, also where the terminal is narrower or there is none: folded numbers cannot be read."""
    Console(highlight=False, width=max(out.width, 250)).print(table)


def _classes(text: str | None) -> list[int | str] | None:
    """`0,1,2`, `5-9` or names."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(match[1]) > int(match[2]):
            raise ValueError(f"--classes {text} runs backwards; write {match[2]}-{match[1]}.")
        return list(range(int(match[1]), int(match[2]) + 1))
    return [int(part) if part.isdigit() else part for part in text.split(",")]
