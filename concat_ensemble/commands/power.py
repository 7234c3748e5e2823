"""`power`: how many repeats and test images a difference needs."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson
from concat_ensemble.console import out, stack_lines


def power(
    *,
    results: Annotated[Path, typer.Argument(help="A results file, such as two-resnets/results/flowers102.json.")],
    difference: Annotated[float, typer.Option(min=0.01, max=99.0, help="Percentage points of top-1.")] = 2.0,
    versus: Annotated[
        str | None, typer.Option(help="Row to compare the ensemble with. Default: the first baseline, or best member.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many repeats and test images a study like this one needs to find a difference, from its paired outcomes.

    concat-ensemble power two-resnets/results/flowers102.json --difference 2
    """
    from concat_ensemble.reporting.tables import best_member
    from concat_ensemble.studies.power import plan_repeats
    from concat_ensemble.studies.results import Results

    study = Results.load(results)
    default = next((row for row in study.rows if row.kind == "baseline"), None) or best_member(study)
    if versus is None and default is None:
        raise ValueError(f"{results} has neither a baseline nor members to compare with; name a row by --versus.")
    plan = plan_repeats(study, difference / 100, versus or (default.name if default else ""))
    if as_json:
        out.print_json(json.dumps(plan.to_dict()))
        return
    mean, (low, high), _ = study.difference(plan.name, plan.other)
    measured = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    images = "the same" if plan.shares_images else "its own"
    counts = f"{plan.repeats} repeats, each with {images} {plan.designs[0].images:,} test images"
    if plan.repeats == 1:
        counts = f"one repeat, {plan.designs[0].images:,} test images: nothing is known of the spread between repeats"
    out.print(f"{plan.name} minus {plan.other}: {measured} points; {counts}.")
    title = f"To find {difference:g} points (two-sided test at 5%)"
    have, find = ("1 repeat", "finds") if plan.repeats == 1 else (f"{plan.repeats} repeats", "find")
    headings = ("test", "images"), ("repeats for a", "power of 80%"), ("power of", have), (have, f"{find} in 80%")
    table = Table(title=title)
    for lines in headings:
        table.add_column(stack_lines(*lines))
    for design in plan.designs:
        needed = "not known" if plan.spread.repeats is None else design.repeats_needed or "more images"
        cells = [
            f"{design.images:,}",
            str(needed),
            f"{100 * design.power:.0f}%",
            f"{100 * design.smallest:.1f} points",
        ]
        table.add_row(*cells)
    out.print(table)
