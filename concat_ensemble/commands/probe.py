"""`probe`: an ensemble on a dataset, beside what it is compared with."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import (
    AsJson,
    BatchSize,
    Classes,
    Column,
    DatasetConfig,
    DatasetName,
    Limit,
    Model,
    Overwrite,
    Quiet,
    Revision,
    Seed,
    Split,
    TestSize,
    Workers,
    command_line,
    described,
    file_name,
    load_model,
    print_unfolded,
    refuse_beside,
    studies_of,
    writable_parent,
)
from concat_ensemble.console import errors, out


def probe(
    context: typer.Context,
    model: Model,
    dataset: DatasetName = "scattered:digits",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A well-known dataset as it is customary, such as cifar100; may be repeated for one table."),
    ] = None,
    config: DatasetConfig = None,
    revision: Revision = None,
    classes: Classes = None,
    image_column: Column = None,
    label_column: Column = None,
    train_split: Split = None,
    validation_split: Split = None,
    test_split: Split = None,
    test_size: TestSize = 0.5,
    limit: Limit = None,
    shots: Annotated[
        int | None, typer.Option(help="Images of each class for training and validation together: few labels.")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Another ensemble to compare with; may be repeated.")
    ] = None,
    save_head: Annotated[
        bool, typer.Option("--save-head", help="Keep the probe as the classification head of the folder.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results file; in the ensemble's own folder when left out.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    seed: Seed = 0,
    repeats: Annotated[
        int,
        typer.Option(
            min=1, help="Draw the images this often, by --seed and the seeds after it: intervals over draws."
        ),
    ] = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fit linear probes on an ensemble, its members, what it is compared with, and the controls.

    concat-ensemble probe two-resnets --dataset uoft-cs/cifar100 --label-column fine_label --limit 5000

    concat-ensemble probe two-resnets --recipe cifar100 --recipe flowers102 --shots 10 --repeats 5
    """
    from concat_ensemble.studies.results import RESULTS

    folder = Path(model)
    is_local = (folder / "config.json").is_file()
    studies = studies_of(context)
    if len(studies) > 1:
        refuse_beside(context, "more than one --recipe", ["output", "save_head"])
    if save_head and not is_local:
        raise ValueError(f"--save-head writes into the ensemble's folder, and {model} is not a folder here.")
    names = [Path(other).name for other in baseline or []]
    if len({folder.name, *names}) <= len(names):
        raise ValueError(f"--baseline {' and '.join(names)} beside {folder.name}: they share a name; rename a folder.")
    ensemble = load_model(model, seed)
    found, paths, failed = {}, {}, {}
    for study, (asked, load) in studies.items():
        path = output or (folder if is_local else Path()) / RESULTS / f"{file_name(study, limit, shots)}.json"
        try:
            found[study] = _probe_on(
                asked, load, path, ensemble, folder, baseline or [],
                repeats=repeats, save_head=save_head, overwrite=overwrite, quiet=quiet, batch_size=batch_size, num_workers=workers,
            )  # fmt: skip
            paths[study] = path
        except (ValueError, OSError) as error:
            if len(studies) == 1:
                raise
            failed[study] = error  # what the others cost is not to be lost
    if as_json:
        texts = [path.read_text() for path in paths.values()]
        sys.stdout.write(texts[0] if len(studies) == 1 else f"[{','.join(texts)}]\n")
    elif found:
        show_recipes(found) if len(studies) > 1 else show(*found.values())
        for path in paths.values():
            out.print(f"results: {path}")
    if failed:
        told = "; ".join(f"{study}: {error}" for study, error in failed.items())
        raise ValueError(f"{len(failed)} of {len(studies)} recipes failed: {told}")


def _probe_on(
    asked: dict,
    load: Callable,
    path: Path,
    ensemble,
    folder: Path,
    baselines: list[str],
    *,
    repeats: int,
    save_head: bool,
    overwrite: bool,
    quiet: bool,
    **extraction,
):
    """Results on one dataset, named by `asked` and had by `load`: probed and saved to `path`, or read from there."""
    from concat_ensemble.data.loading import class_names
    from concat_ensemble.reporting.model_card import write_card
    from concat_ensemble.studies.probing import probe_ensemble, with_head
    from concat_ensemble.studies.provenance import members_sha256
    from concat_ensemble.studies.results import Results

    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a results file, as in --output {path / 'probe.json'}.")
    if path.exists() and not overwrite:
        results = Results.load(path)
        alike = results.members_sha256 == members_sha256(ensemble.config) and asked.items() <= results.dataset.items()
        has_head = (folder / "head.safetensors").is_file()
        alike = alike and results.repeats == repeats and all(Path(other).name in results for other in baselines)
        if not alike or (save_head and not has_head):
            raise ValueError(
                f"{path} holds the results of other weights or data, or not all that is asked for; add --overwrite, or name another --output."
            )
        if not quiet:
            errors.print(f"{path} is there already; --overwrite probes again.", markup=False)
        return results
    writable_parent(path)  # better known before the work than after it
    seeds = range(asked["seed"], asked["seed"] + repeats)
    if repeats > 1 and not asked.get("shots") and len({_test_of(load(seed=seed)) for seed in seeds[:2]}) == 1:
        raise ValueError(
            f"--repeats {repeats} would measure the same images each time, since {asked['name']} has a test split of its own; "
            "draw from it with --limit or --shots, or leave --repeats out."
        )
    compared = {Path(other).name: load_model(other, asked["seed"]) for other in baselines}
    about, measured = {"name": folder.name, "baselines": compared, "quiet": quiet} | extraction, []
    for number, seed in enumerate(seeds, 1):
        if repeats > 1 and not quiet:
            errors.print(f"repeat {number} of {repeats}")
        data = load(seed=seed)
        measured.append(probe_ensemble(ensemble, data, described=described(asked, data), seed=seed, **about))
    results = Results.merged([results for results, _ in measured])
    results.command = command_line()
    results.save(path)
    if save_head:
        with_head(ensemble, measured[0][1], class_names(data["train"])).save_pretrained(folder)
    if (folder / "config.json").is_file():
        write_card(folder)
    return results


def _test_of(data) -> str:
    """What tells one draw of test images, or of their places on a canvas, from another."""
    return repr((list(data["test"]["label"]), data["test"][0]["image"]))


def show(results) -> None:
    """The table of a probe, as the card has it."""
    from concat_ensemble.data.naming import describe_dataset
    from concat_ensemble.reporting.tables import headings, row_texts
    from concat_ensemble.reporting.verdicts import verdict

    over = f"{results.repeats} repeats" if results.repeats > 1 else "one repeat"
    table = Table(
        title=f"{describe_dataset(results.dataset)}; {over}; protocol {results.protocol}", title_justify="left"
    )
    rows = [row_texts(results, row) for row in results.rows]
    shown = headings(results, rows)
    for key in shown:
        table.add_column(shown[key], justify="left" if key == "name" else "right")
    for row, cells in zip(results.rows, rows, strict=True):
        table.add_row(*(cells[key] for key in shown), style="bold" if row.kind == "ensemble" else None)
    print_unfolded(table)
    out.print(verdict(results).replace("**", ""))


def show_recipes(found: dict) -> None:
    """One table of several recipes' results, each in its own metric: the ensemble, its best member, and what they are
    compared with.
    """
    columns = {}
    for recipe, results in found.items():
        metric = results.dataset["metric"]
        rows = {
            row.name: _in_metric(row, metric) for row in results.rows if row.kind not in ("first_members", "member")
        }
        members = [_in_metric(row, metric) for row in results.rows if row.kind == "member"]
        best = {"its best member, by test": max(members)} if members else {}
        columns[f"{recipe}\n{metric}"] = {results.ensemble: rows.pop(results.ensemble)} | best | rows
    table = Table("", title="linear probe in %, with 95% interval", title_justify="left")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        shown = [column.get(name) for column in columns.values()]
        table.add_row(name, *("{:.1f} [{:.1f}, {:.1f}]".format(*percent) if percent else "" for percent in shown))
    print_unfolded(table)


def _in_metric(row, metric: str) -> list[float]:
    """In percent, the mean over repeats and its interval: Student's over them, else over test images, which are redrawn
    where the metric is not a share of them.
    """
    alike = replace(row, runs=[replace(run, metrics={"top1": run.metrics[metric]}) for run in row.runs])
    redrawn = metric != "top1" and len(row.runs) == 1
    interval = row.runs[0].intervals[metric] if redrawn else alike.interval
    return [100 * share for share in (alike.mean, *interval)]
