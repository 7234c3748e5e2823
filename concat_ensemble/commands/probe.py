"""`probe`: an ensemble on a dataset, beside what it is compared with."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from concat_ensemble.commands import options
from concat_ensemble.commands.options import AsJson, Model
from concat_ensemble.console import out, stack_lines
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.studies.options import ProbeOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.probe_study import ProbeStudy
    from concat_ensemble.studies.results import Results

# The columns of a screen of 80 characters, and the lines of their headings.
SCREEN = {"name": (), "value": (), "beside": (), "interval": ("95%", "interval"), "paired": ("ensemble", "minus it")}
NAME_LENGTH = 52  # two lines of a name that leaves room for the numbers


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
    wide: Annotated[bool, typer.Option("--wide", help="Print all columns, however wide the screen is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit linear probes on an ensemble, its members, what it is compared with, and the controls.

    concat-ensemble probe two-resnets --dataset uoft-cs/cifar100 --label-column fine_label --limit 5000

    concat-ensemble probe two-resnets --recipe cifar100 --recipe flowers102 --shots 10 --repeats 5
    """
    from concat_ensemble.reporting.error_page import write_error_page
    from concat_ensemble.reporting.model_card import write_card
    from concat_ensemble.studies.ensembles import is_local_ensemble
    from concat_ensemble.studies.probe_study import run_probe_studies

    datasets = dataset.with_recipes(recipe or [])
    probing = dataclasses.replace(probing, command=options.command_line())

    def on_study(study: "ProbeStudy") -> None:
        if study.is_new and is_local_ensemble(model):
            write_card(Path(model), redraw=False)  # with many datasets, only the figures of this one
        if study.errors_page and study.predictions and probing.errors:
            write_error_page(study.errors_page, *study.predictions, probing.errors)

    studies = run_probe_studies(model, datasets, probing, extraction, on_study=on_study)
    paths = [study.path for study in studies.finished.values()]
    if as_json:
        texts = [path.read_text() for path in paths]
        sys.stdout.write(texts[0] if len(datasets) == 1 else f"[{','.join(texts)}]\n")
    elif paths:
        results = {name: study.results for name, study in studies.finished.items()}
        print_recipes(results) if len(datasets) > 1 else print_results(*results.values(), wide=wide)
        for study in studies.finished.values():
            out.print(f"results: {study.path}", soft_wrap=True)
            if study.errors_page:
                out.print(f"errors: {study.errors_page}", soft_wrap=True)
        if probing.save_head:
            out.print(f"classification head: {Path(model) / 'head.safetensors'}", soft_wrap=True)
    if studies.failures:
        reasons = "; ".join(f"{name}: {error}" for name, error in studies.failures.items())
        raise ValueError(f"{len(studies.failures)} of {len(datasets)} recipes failed: {reasons}")


def print_results(results: "Results", *, wide: bool = False) -> None:
    """Print the table of a probe, what to know about its data and its numbers, and a verdict in words."""
    from concat_ensemble.data.naming import describe_dataset
    from concat_ensemble.reporting.data_sentences import audit_sentences
    from concat_ensemble.reporting.verdicts import doubts, notes, verdict

    repeats = f"{results.repeats} repeats" if results.repeats > 1 else "one repeat"
    out.print(f"{describe_dataset(results.dataset)}; {repeats}; protocol {results.protocol}")
    table = probe_table(results, wide=wide)
    options.print_table(table) if wide else out.print(table)
    conclusions = filter(None, [verdict(results), *doubts(results)])
    for paragraph in filter(None, map(" ".join, (audit_sentences(results), notes(results), conclusions))):
        out.print()
        out.print(paragraph)
    out.print()


def probe_table(results: "Results", *, wide: bool) -> Table:
    """The table of the card, with all columns, or with those that fit into 80 characters and shortened names."""
    from concat_ensemble.reporting.tables import headings, ordered_rows, row_texts

    rows = ordered_rows(results)
    texts = [row_texts(results, row) for row in rows]
    columns = headings(results.metric, results.rows[0].name, texts)
    if not wide:
        columns = {key: columns[key] for key in SCREEN if key in columns}
    lines = [
        [heading] if wide else SCREEN[key] or heading.replace(" per ", "\nper ").split("\n")
        for key, heading in columns.items()
    ]
    table = options.number_table(lines, wide=wide)
    for row, cells in zip(rows, texts, strict=True):
        name = cells["name"] if wide else shorten_middle(cells["name"], NAME_LENGTH)
        shown = cells | {"name": name}
        table.add_row(*(shown[key] for key in columns), style="bold" if row.kind == "ensemble" else None)
    return table


def shorten_middle(text: str, length: int) -> str:
    """The text, or its start and its end with dots in between: names often differ at the end."""
    if len(text) <= length:
        return text
    start, end = (length - 2) // 2, (length - 3) // 2
    return f"{text[:start]}...{text[-end:]}"


def print_recipes(studies: "dict[str, Results]") -> None:
    """Print one table of several recipes' results, each in its own metric: the ensemble, its best member, the
    baselines and the controls."""
    columns = [metric_column(study) for study in studies.values()]
    table = Table("", title="linear probe in %, with 95% interval", title_justify="left")
    for recipe, study in studies.items():
        table.add_column(stack_lines(recipe, study.metric), justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    options.print_table(table)


def metric_column(results: "Results") -> dict[str, str]:
    """The cells of a recipe's column, by the names of the rows."""
    from concat_ensemble.reporting.tables import best_member

    rows = {results.ensemble: results.rows[0]}
    if best := best_member(results):
        rows["its best member, by test"] = best
    rows |= {row.name: row for row in results.rows if row.kind in ("baseline", "control")}
    return {
        name: "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * share for share in (row.mean, *row.interval)))
        for name, row in rows.items()
    }
