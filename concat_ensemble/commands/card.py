"""`card`: an ensemble's README.md and figures."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import AsJson, Quiet, print_written


def card(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of an ensemble with its results.")],
    title: Annotated[
        str | None,
        typer.Option(help="Title of the card; that of the earlier card or the folder's name when left out."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail where the card differs from what the results give.")
    ] = False,
    index: Annotated[
        bool, typer.Option("--index", help="Write README.md for a folder of ensembles, with a table of all of them.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write README.md and the figures of an ensemble's folder from its results; your own sections stay.

    concat-ensemble card two-resnets

    concat-ensemble card two-resnets --check
    """
    from concat_ensemble.reporting.card_index import index_text, write_index
    from concat_ensemble.reporting.model_card import check_card, check_files, write_card

    path = folder / "README.md"
    if index and check:
        check_files({path: index_text(folder)}, f"{folder} --index")
    elif index:
        write_index(folder)
    elif check:
        check_card(folder)
    else:
        write_card(folder, title)
    print_written(str(path), {"file": str(path)}, as_json, quiet)
