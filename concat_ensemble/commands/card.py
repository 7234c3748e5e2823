"""`card` and `verify`: what an ensemble's README.md says, and whether it is so."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import (
    AsJson,
    BatchSize,
    Quiet,
    Revision,
    Workers,
    load_model,
    print_unfolded,
    tell,
)


def card(
    folder: Annotated[Path, typer.Argument(help="An ensemble's folder, with its results.")],
    title: Annotated[str | None, typer.Option(help="The earlier card's, or the folder's name, when left out.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail where the card is not what the results give.")
    ] = False,
    index: Annotated[
        bool, typer.Option("--index", help="Write README.md of a folder of ensembles, with a table of them all.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write README.md and the figures of an ensemble's folder anew, from its results; your own sections stay.

    concat-ensemble card two-resnets

    concat-ensemble card two-resnets --check
    """
    from concat_ensemble.reporting.card_index import index_text, write_index
    from concat_ensemble.reporting.model_card import check_card, check_files, write_card

    if index:
        check_files({folder / "README.md": index_text(folder)}, f"{folder} --index") if check else write_index(folder)
    elif check:
        check_card(folder)
    else:
        write_card(folder, title)
    path = str(folder / "README.md")
    tell(path, {"file": path}, as_json, quiet)


def verify(
    ensemble: Annotated[str, typer.Argument(help="Folder or Hub id of an ensemble with a card and results.")],
    revision: Revision = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Probe an ensemble again on every dataset of its card, and compare with the numbers there.

    concat-ensemble verify two-resnets

    A number holds that lies in the 95% interval, over the test images, of the run that these weights made. Exit code 2 where
    one does not, or where the card is not what the results give.
    """
    from concat_ensemble.reporting.model_card import check_card
    from concat_ensemble.studies.verification import fetch_ensemble, verify_ensemble

    folder = fetch_ensemble(ensemble, revision)
    check_card(folder)
    found = verify_ensemble(
        folder, load_model(str(folder), 0), quiet=quiet or as_json, batch_size=batch_size, num_workers=workers
    )
    if as_json:
        sys.stdout.write(json.dumps([check.as_dict() for check in found], indent=1) + "\n")
    else:
        table = Table("dataset", "", "on the card", "its run here", "95% interval", "again", "holds")
        for check in found:
            low, high = check.interval
            table.add_row(check.dataset, check.name, f"{100 * check.card:.1f}", f"{100 * check.run:.1f}",
                          f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * check.again:.1f}", "yes" if check.holds else "NO")  # fmt: skip
        print_unfolded(table)
    if failed := [check for check in found if not check.holds]:
        told = "; ".join(f"{check.name} on {check.dataset} {100 * check.again:.1f}" for check in failed)
        raise ValueError(
            f"{len(failed)} of {len(found)} numbers do not hold: {told}; measure again with concat-ensemble probe --overwrite."
        )
