"""`verify`: whether the numbers on a card come out again."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, print_json, print_table
from concat_ensemble.data.options import ExtractionOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.verification import Check


def verify(
    *,
    ensemble: Annotated[str, typer.Argument(help="Folder or Hub id of an ensemble with a card and results.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the ensemble on the Hub.")] = None,
    extraction: ExtractionOptions,
    as_json: AsJson = False,
) -> None:
    """Probe an ensemble again on every dataset of its card, and compare with the numbers there.

    concat-ensemble verify two-resnets

    A number is confirmed if it lies in the 95% interval, over the test images, of the run that used these weights. The
    exit code is 2 where one is not confirmed, or where the card differs from what the results give.
    """
    from concat_ensemble.reporting.model_card import check_card
    from concat_ensemble.studies.ensembles import load_ensemble
    from concat_ensemble.studies.verification import fetch_ensemble, verify_ensemble

    folder = fetch_ensemble(ensemble, revision)
    check_card(folder)
    settings = dataclasses.asdict(extraction) | {"quiet": extraction.quiet or as_json}
    checks = verify_ensemble(folder, load_ensemble(str(folder)), **settings)
    if as_json:
        print_json([dataclasses.asdict(check) | {"holds": check.holds} for check in checks])
    else:
        print_table(check_table(checks))
    failed = [f"{check.name} on {check.dataset} {100 * check.again:.1f}" for check in checks if not check.holds]
    if failed:
        unconfirmed = f"{len(failed)} of {len(checks)} numbers are not confirmed: {'; '.join(failed)}"
        raise ValueError(f"{unconfirmed}; measure again with concat-ensemble probe --overwrite.")


def check_table(checks: "list[Check]") -> Table:
    """The metric in %: on the card, of the run that used these weights with its interval, and measured again."""
    from concat_ensemble.reporting.tables import METRIC_NAMES

    table = Table("dataset", "", "on the card", "its run here", "95% interval", "again", "confirmed")
    for check in checks:
        low, high = check.interval
        card, run, again = (f"{100 * share:.1f}" for share in (check.card, check.run, check.again))
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        dataset = check.dataset if check.metric == "top1" else f"{check.dataset}: {METRIC_NAMES[check.metric]}"
        table.add_row(dataset, check.name, card, run, interval, again, "yes" if check.holds else "NO")
    return table
