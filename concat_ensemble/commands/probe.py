"""`probe`: an ensemble on a dataset, beside what it is compared with."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from concat_ensemble.commands import options
from concat_ensemble.commands.options import AsJson, Model
from concat_ensemble.console import out
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.studies.options import ProbeOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.probe_study import ProbeStudy
    from concat_ensemble.studies.results import Results, Row


def probe(
    *,
    model: Model,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Name of a dataset recipe, such as cifar100; may be repeated for one table of several."),
    ] = None,
    dataset: DatasetOptions,
    probing: ProbeOptions,
    extraction: ExtractionOptions,
    as_json: AsJson = False,
) -> None:
    """Fit linear probes on an ensemble, its members, what it is compared with, and the controls.

    concat-ensemble probe two-resnets --dataset uoft-cs/cifar100 --label-column fine_label --limit 5000

    concat-ensemble probe two-resnets --recipe cifar100 --recipe flowers102 --shots 10 --repeats 5
    """
    from concat_ensemble.reporting.model_card import write_card
    from concat_ensemble.studies.ensembles import is_local_ensemble
    from concat_ensemble.studies.probe_study import run_probe_studies

    datasets = dataset.with_recipes(recipe or [])
    probing = dataclasses.replace(probing, command=options.command_line())

    def on_study(study: "ProbeStudy") -> None:
        if study.is_new and is_local_ensemble(model):
            write_card(Path(model))

    studies = run_probe_studies(model, datasets, probing, extraction, on_study=on_study)
    paths = [study.path for study in studies.finished.values()]
    if as_json:
        texts = [path.read_text() for path in paths]
        sys.stdout.write(texts[0] if len(datasets) == 1 else f"[{','.join(texts)}]\n")
    elif paths:
        results = {name: study.results for name, study in studies.finished.items()}
        print_recipes(results) if len(datasets) > 1 else print_results(*results.values())
        for path in paths:
            out.print(f"results: {path}")
    if studies.failures:
        reasons = "; ".join(f"{name}: {error}" for name, error in studies.failures.items())
        raise ValueError(f"{len(studies.failures)} of {len(datasets)} recipes failed: {reasons}")


def print_results(results: "Results") -> None:
    """Print the table of a probe as the card shows it."""
    from concat_ensemble.data.naming import describe_dataset
    from concat_ensemble.reporting.tables import headings, row_texts
    from concat_ensemble.reporting.verdicts import verdict

    repeats = f"{results.repeats} repeats" if results.repeats > 1 else "one repeat"
    title = f"{describe_dataset(results.dataset)}; {repeats}; protocol {results.protocol}"
    table = Table(title=title, title_justify="left")
    rows = [row_texts(results, row) for row in results.rows]
    columns = headings(results, rows)
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "name" else "right")
    for row, cells in zip(results.rows, rows, strict=True):
        table.add_row(*(cells[key] for key in columns), style="bold" if row.kind == "ensemble" else None)
    options.print_table(table)
    out.print(verdict(results).replace("**", ""))


def print_recipes(studies: "dict[str, Results]") -> None:
    """Print one table of several recipes' results, each in its own metric: the ensemble, its best member, the
    baselines and the controls."""
    columns = {f"{recipe}\n{study.dataset['metric']}": metric_column(study) for recipe, study in studies.items()}
    table = Table("", title="linear probe in %, with 95% interval", title_justify="left")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    options.print_table(table)


def metric_column(results: "Results") -> dict[str, str]:
    """The cells of a recipe's column, by the names of the rows."""
    metric = results.dataset["metric"]
    members = [percent_in_metric(row, metric) for row in results.rows if row.kind == "member"]
    others = {row.name: percent_in_metric(row, metric) for row in results.rows if row.kind in ("baseline", "control")}
    column = {results.ensemble: percent_in_metric(results.rows[0], metric)}
    if members:
        column["its best member, by test"] = max(members)
    return {name: "{:.1f} [{:.1f}, {:.1f}]".format(*percent) for name, percent in (column | others).items()}


def percent_in_metric(row: "Row", metric: str) -> list[float]:
    """The mean over repeats, and its 95% interval: Student's over the repeats, or over the test images of a single
    one, by bootstrap resamples for a metric that is not a share of them."""
    runs = [dataclasses.replace(run, metrics={"top1": run.metrics[metric]}) for run in row.runs]
    as_top1 = dataclasses.replace(row, runs=runs)
    resampled = metric != "top1" and len(row.runs) == 1
    interval = row.runs[0].intervals[metric] if resampled else as_top1.interval
    return [100 * share for share in (as_top1.mean, *interval)]
