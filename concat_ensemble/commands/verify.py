"""`verify`: whether the numbers on a card come out again."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, print_json, print_table
from concat_ensemble.data.options import ExtractionOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.claims import Check

SHOWN = 3  # rows, and differences of each, in the error; the table has all


def verify(
    *,
    ensemble: Annotated[str, typer.Argument(help="Folder or Hub id of an ensemble with a card and results.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the ensemble on the Hub.")] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="Your own copy of a dataset that is not on the Hub, as for probe; may be repeated. No other local "
            "data are read.",
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="A baseline of the results, as for probe, or NAME=ENSEMBLE; may be repeated."),
    ] = None,
    extraction: ExtractionOptions,
    as_json: AsJson = False,
) -> None:
    """Probe an ensemble again on every dataset of its card, and compare with the numbers there.

    concat-ensemble verify two-resnets

    A number is confirmed if it lies in the 95% interval, over the test images, of what is measured now, and within one
    point of it. The exit code is 2 where one is not confirmed, or where the card differs from what the results give.
    """
    from concat_ensemble.reporting.model_card import check_card
    from concat_ensemble.studies.ensembles import load_ensemble
    from concat_ensemble.studies.verification import fetch_ensemble, verify_ensemble

    folder = fetch_ensemble(ensemble, revision)
    check_card(folder)
    settings = dataclasses.asdict(extraction) | {"quiet": extraction.quiet or as_json}
    model = load_ensemble(str(folder))
    checks = verify_ensemble(folder, model, datasets=datasets or (), baselines=baselines or (), **settings)
    if as_json:
        print_json([dataclasses.asdict(check) | {"holds": check.holds} for check in checks])
    else:
        print_table(check_table(checks))
    failed = [each for each in checks if not each.holds]
    if failed:
        reasons = [f"{each.name} on {each.dataset}: {'; '.join(each.differences[:SHOWN])}" for each in failed[:SHOWN]]
        text = " | ".join(reasons) + (" | ..." if len(failed) > SHOWN else "")
        raise ValueError(f"{len(failed)} of {len(checks)} numbers are not confirmed: {text}")


def check_table(checks: "list[Check]") -> Table:
    """The metric in %: on the card, measured again, in which interval the card's must be, and whether all holds."""
    from concat_ensemble.reporting.tables import METRIC_NAMES

    table = Table("dataset", "", "on the card", "again", "must be within", "confirmed")
    for check in checks:
        card, again = ("" if share is None else f"{100 * share:.1f}" for share in (check.card, check.again))
        low, high = check.interval or (None, None)
        interval = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
        dataset = check.dataset if check.metric == "top1" else f"{check.dataset}: {METRIC_NAMES[check.metric]}"
        confirmed = "yes" if check.holds else "NO: " + "; ".join(check.differences)
        table.add_row(dataset, check.name, card, again, interval, confirmed)
    return table
