"""`concat-ensemble`: build an ensemble, probe it, write its card."""

import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Several image backbones as one richer model.",
)
out = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

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


@app.command()
def build(
    output: Output,
    members: Annotated[
        list[str] | None,
        typer.Argument(help="timm name, random:NAME, hf-hub:ORG/NAME@REVISION, a folder, or [ARCHITECTURE=]FILE."),
    ] = None,
    preprocessing: Annotated[
        str, typer.Option(help="own: each member's evaluation transform. shared: the first one's for all.")
    ] = "own",
    recipe: Annotated[
        str | None, typer.Option(help="A system of the paper, such as swav-cat5, in place of members.")
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Folder of the files that a recipe names.")] = Path(),
    license: Annotated[str | None, typer.Option(help="Of members whose source states none.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights on disk: float32, float16 or bfloat16.")] = "float32",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Concatenate backbones into one model and save it as a Hub folder.

    concat-ensemble build resnet50.a1_in1k resnet50.tv_in1k --output two-resnets

    concat-ensemble build --recipe vit-objectives --output vit-objectives
    """
    import torch

    from concat_ensemble.assemble import assemble
    from concat_ensemble.model_card import write_card
    from concat_ensemble.recipes import ensemble_recipe

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: give {', '.join(dtypes)}.")
    if recipe and members:
        raise ValueError(f"--recipe {recipe} names its members; leave out {' '.join(members)}, or --recipe.")
    asked = ensemble_recipe(recipe).described(checkpoints) if recipe else {}
    with _new_folder(output, overwrite) as folder:
        model = assemble(asked or members or [], preprocessing=preprocessing, seed=seed, license=license)
        if dtype != "float32":  # weights are known by their digest in float32, so what rounding makes of them is
            model = assemble(model.to(dtypes[dtype])).to(dtypes[dtype])
        for member, known in zip(model.config.members, asked.values() or repeat({}), strict=False):
            member["provenance"] = {"command": _typed()} | known | member["provenance"]
        model.save_pretrained(folder)
        write_card(folder, title=output.name)
    if not quiet:
        table = Table(
            "", "architecture", "features", "input", "source", title=f"{output}: {model.config.num_features:,} features"
        )
        for k, member in enumerate(model.config.members):
            size = "x".join(map(str, member["preprocessing"]["input_size"]))
            table.add_row(
                str(k), member["architecture"], f"{member['num_features']:,}", size, member["provenance"]["source"]
            )
        out.print(table)


@app.command()
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
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fit linear probes on an ensemble, its members, what it is compared with, and the controls.

    concat-ensemble probe two-resnets --dataset uoft-cs/cifar100 --label-column fine_label --limit 5000

    concat-ensemble probe two-resnets --recipe cifar100 --recipe flowers102 --limit 5000
    """
    from concat_ensemble.model_card import RESULTS

    folder = Path(model)
    is_local = (folder / "config.json").is_file()
    studies = _studies(context)
    if len(studies) > 1:
        _refuse_beside(context, "more than one --recipe", ["output", "save_head"])
    if save_head and not is_local:
        raise ValueError(f"--save-head writes into the ensemble's folder, and {model} is not a folder here.")
    names = [Path(other).name for other in baseline or []]
    if len({folder.name, *names}) <= len(names):
        raise ValueError(f"--baseline {' and '.join(names)} beside {folder.name}: they share a name; rename a folder.")
    ensemble = _load(model, seed)
    found, paths, failed = {}, {}, {}
    for study, (asked, load) in studies.items():
        path = output or (folder if is_local else Path()) / RESULTS / f"{_file_name(study, limit, shots)}.json"
        try:
            found[study] = _probe_on(
                asked, load, path, ensemble, folder, baseline or [],
                save_head=save_head, overwrite=overwrite, quiet=quiet, batch_size=batch_size, num_workers=workers,
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


@app.command()
def select(
    context: typer.Context,
    model: Model,
    dataset: DatasetName = "scattered:digits",
    recipe: Annotated[list[str] | None, typer.Option(help="A well-known dataset as it is customary.")] = None,
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
    quick: Annotated[
        bool, typer.Option("--quick", help="From 1,500 training images: is it worth extracting the rest?")
    ] = False,
    max_members: Annotated[int | None, typer.Option(min=1)] = None,
    max_gflops: Annotated[float | None, typer.Option(help="Of what is chosen, per image.")] = None,
    max_parameters: Annotated[float | None, typer.Option(help="Of what is chosen, in millions.")] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Project what is chosen to this many principal columns.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the chosen members as a new ensemble.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which members to keep for a dataset: ridge probes of every subset on validation images, then a linear probe of
    what is chosen on the test split.

    concat-ensemble select five-backbones --recipe flowers102 --max-gflops 10 --output chosen
    """
    from datasets import DatasetDict

    from concat_ensemble.features import extract_features
    from concat_ensemble.model_card import RESULTS, write_card
    from concat_ensemble.plots import plot_accuracy_against_cost
    from concat_ensemble.probing import probe_ensemble
    from concat_ensemble.projection import principal_projection, with_projection
    from concat_ensemble.selection import QUICK_FOLDS, member_costs, quick_part, select_members

    if quick and (output or columns):
        raise ValueError("--quick only looks; leave out --output and --columns, or leave out --quick.")
    studies = _studies(context)
    if len(studies) > 1:
        raise ValueError("select chooses for one dataset; give one --recipe.")
    ((study, (asked, load)),) = studies.items()
    folder = Path(model)
    home = folder if (folder / "config.json").is_file() else Path()
    path = home / "selection" / f"{_file_name(study, limit)}{'-quick' if quick else ''}.json"
    _writable_parent(path)
    if output:
        _refuse_taken(output, overwrite)  # better known before the work than after it
    ensemble = _load(model, seed)
    names = [ensemble.config.members[k]["architecture"] for k in ensemble.config.built_members]
    if len(names) < 2:
        raise ValueError(f"{model} has one member; there is nothing to choose among.")
    extraction = {"batch_size": batch_size, "num_workers": workers, "quiet": quiet}
    data = load()
    seen = quick_part(data, seed) if quick else DatasetDict({name: data[name] for name in ("train", "validation")})
    whole = ensemble.export_active(ensemble.config.built_members)  # without a projection, which needs all members
    table = extract_features(whole, seen, **extraction)
    found = select_members(
        table, member_costs(ensemble), names, max_members=max_members, max_gflops=max_gflops, max_parameters=max_parameters,
        folds=QUICK_FOLDS if quick else None, seed=seed,
    )  # fmt: skip
    found.save(path)
    plot_accuracy_against_cost(found, path.with_suffix(".png"))
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        show_selection(found, quick)
        out.print(f"all subsets: {path}, {path.with_suffix('.png')}", soft_wrap=True)
    if quick:
        return
    chosen = ensemble.export_active(list(found.best))
    if columns:
        chosen = with_projection(chosen, principal_projection(table.members(found.best), columns))
    name = output.name if output else "+".join(map(str, found.best))
    all_of_them = {f"all {len(names)} members": whole} if len(found.best) < len(names) else {}
    results, _ = probe_ensemble(
        chosen, data, name=name, described=_described(asked, data), baselines=all_of_them, seed=seed, **extraction
    )
    results.command = _typed()
    if not as_json:
        show(results)
    if output:
        with _new_folder(output, overwrite) as made:
            chosen.save_pretrained(made)
            results.save(made / RESULTS / f"{_file_name(study, limit)}.json")
            write_card(made, title=output.name)
        if not quiet and not as_json:
            out.print(f"written: {output}", soft_wrap=True)


@app.command()
def theory(
    output: Output = Path("theory"),
    initialisations: Annotated[int, typer.Option(min=1, help="Of each kind of network.")] = 100,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check the paper's section 2: which mixtures cancel a correlation, and what a network trained on a mixture drops.

    concat-ensemble theory --output theory
    """
    from concat_ensemble.theory import draw_cancellations, plot_counterexample, save_theory, train_counterexample

    path = output / "theory.json"
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; add --overwrite or name another --output.")
    _writable_parent(path)  # better known before the work than after it
    drawn = draw_cancellations(seed=seed)
    found = train_counterexample(initialisations=initialisations, seed=seed)
    plot_counterexample(found, path.with_suffix(".png"))
    save_theory(drawn, found, path)
    if as_json:
        sys.stdout.write(path.read_text())
        return
    out.print(f"Proposition 2.1: {drawn.cancelled:,} cancellations in {drawn.draws:,} draws; {drawn.exact:,} exact proportions "
              f"that cancel, with a covariance of at most {drawn.largest_covariance:.0e}.", soft_wrap=True)  # fmt: skip
    table = Table("", "columns", "steps", "features", "mixture, %", "components, %", "all fitted, % [95% interval]")
    for row in found.rows:
        share, low, high = (100 * value for value in (row.all_fitted / initialisations, *row.interval))
        table.add_row(row.name, str(row.width), f"{row.steps:,}", f"{row.features:.2f}", f"{100 * row.mixture:.1f}",
                      " ".join(f"{100 * part:.1f}" for part in row.components), f"{share:.0f} [{low:.0f}, {high:.0f}]")  # fmt: skip
    _print_unfolded(table)
    out.print(found.verdict, soft_wrap=True)
    if not quiet:
        out.print(f"written: {path}, {path.with_suffix('.png')}", soft_wrap=True)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="An ensemble's folder, with its results.")],
    title: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Write README.md and the figures of an ensemble's folder anew, from its results.

    concat-ensemble card two-resnets
    """
    from concat_ensemble.model_card import write_card

    out.print(str(write_card(folder, title)))


@app.command()
def compare(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="One ensemble, for its members; or several, each as a whole.")],
    dataset: DatasetName = "scattered:digits", recipe: Annotated[list[str] | None, typer.Option()] = None,
    config: DatasetConfig = None, revision: Revision = None, classes: Classes = None, image_column: Column = None,
    label_column: Column = None, train_split: Split = None, validation_split: Split = None, test_split: Split = None,
    test_size: TestSize = 0.5, limit: Limit = None, output: Output = Path("overlap"), batch_size: BatchSize = 64,
    workers: Workers = 0, seed: Seed = 0, overwrite: Overwrite = False, as_json: AsJson = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Say which members repeat each other, and what each has that the others lack: CKA, held-out R2 both ways, and a
    probe of what the others do not predict.

    concat-ensemble compare five-backbones --recipe flowers102 --limit 5000 --output overlap
    """
    from concat_ensemble.overlap import compare_models
    from concat_ensemble.plots import plot_overlap

    ((study, (asked, load)), *more) = _studies(context).items()
    if more:
        raise ValueError("compare looks at one dataset; give one --recipe.")
    path = output / f"{_file_name(study, limit)}.json"
    _writable_parent(path)  # better known before the work than after it
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; add --overwrite or name another --output.")
    loaded = {f"{k}: {Path(name).name}": _load(name, seed + k) for k, name in enumerate(models)}
    found = compare_models(loaded, data := load(), seed=seed, quiet=quiet, batch_size=batch_size, num_workers=workers)
    found.save(path, command=_typed(), dataset=_described(asked, data))
    plot_overlap(found, path.with_suffix(".png"))
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        show_overlap(found)
    if not as_json and not quiet:
        out.print(f"written: {path}, {path.with_suffix('.png')}", soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="An ensemble's folder; with a head, its logits come first.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2 for torch.export.")],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write an ensemble as one file that runs without this package, checked against PyTorch.

    concat-ensemble export two-resnets --output two-resnets.onnx
    """
    from concat_ensemble.export import export_onnx, export_program, load_for_export

    write = {".onnx": export_onnx, ".pt2": export_program}.get(output.suffix)
    if write is None:
        raise ValueError(f"--output {output}: name a file that ends in .onnx, or in .pt2 for torch.export.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already; add --overwrite or name another --output.")
    _writable_parent(output)
    write(load_for_export(folder), output)
    if not quiet:
        out.print(f"{output}: {output.stat().st_size / 1e6:,.1f} MB", soft_wrap=True, markup=False)


@app.command()
def cache(
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard; damaged ones are removed.")] = False,
    prune: Annotated[int | None, typer.Option(min=0, help="Remove what was not read for this many days.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the stored features of each member, and verify or prune them.

    concat-ensemble cache --prune 90
    """
    from concat_ensemble.feature_store import default_store, stored_blocks

    table = Table("architecture", "images", "width", "MB", "days since read", "key")
    found = stored_blocks(default_store(), verify=verify)
    for block in found:
        if removed := prune is not None and block["idle_days"] >= prune:
            shutil.rmtree(default_store() / block["key"])
        block["removed"] = removed
        note = " (removed)" if removed else f" ({block['damaged']} damaged shards removed)" if block["damaged"] else ""
        size = (block["architecture"], f"{block['images']:,}", f"{block['width']:,}", f"{block['bytes'] / 1e6:,.1f}")
        table.add_row(*size, f"{block['idle_days']:.0f}", block["key"] + note)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        out.print(table)
        out.print(f"{sum(block['bytes'] for block in found) / 1e6:,.1f} MB in {default_store()}", soft_wrap=True)


def show(results) -> None:
    """The table of a probe, as the card has it."""
    from concat_ensemble.model_card import row_texts, verdict
    from concat_ensemble.plots import describe_dataset

    over = f"{results.repeats} repeats" if results.repeats > 1 else "one repeat"
    table = Table(
        title=f"{describe_dataset(results.dataset)}; {over}; protocol {results.protocol}", title_justify="left"
    )
    headings = {
        "name": "",
        "num_members": "members",
        "width": "columns",
        "steps": "steps",
        "top1": "top-1",
        "interval": "95% interval",
        "draws": "deviation over\ntraining draws",
        "paired": f"{results.rows[0].name} minus it, paired",
        "p": "p",
    }
    rows = [row_texts(results, row) for row in results.rows]
    shown = [key for key in headings if any(row[key] for row in rows)]
    for key in shown:
        table.add_column(headings[key], justify="left" if key == "name" else "right")
    for row, cells in zip(results.rows, rows, strict=True):
        table.add_row(*(cells[key] for key in shown), style="bold" if row.kind == "ensemble" else None)
    _print_unfolded(table)
    out.print(verdict(results).replace("**", ""))


def show_selection(found, quick: bool) -> None:
    """What each member is worth, the best subset of each size, and what to do."""

    def points(value: float, interval) -> str:
        return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"

    table = Table(
        title=f"ridge probes fitted on {found.n_train:,} images, top-1 on {found.n_held:,} others in % "
        f"[95% interval]; protocol {found.protocol}",
        title_justify="left",
    )
    for heading in ("", "member", "columns", "GFLOPs", "M parameters", "alone", "added to the chosen", "Shapley value", "advice"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("member", "advice") else "right")
    for part, cost, name, width in zip(found.contributions, found.costs, found.names, found.widths, strict=True):
        alone = found[[part.member]].top1
        shapley = "" if part.shapley is None else points(part.shapley, part.shapley_interval)
        table.add_row(str(part.member), name, f"{width:,}", f"{cost.gflops:.2f}", f"{cost.million_parameters:.1f}",
                      f"{100 * alone:.1f}", points(part.gain, part.gain_interval), shapley, part.advice)  # fmt: skip
    _print_unfolded(table)
    table = Table("best of its size", "top-1", "GFLOPs", "M parameters")
    for size in range(1, len(found.names) + 1):
        best = next((s for s in found.subsets if len(s.members) == size), None)
        if best:
            mark = "  (chosen)" if best.members == found.best else ""
            table.add_row("+".join(map(str, best.members)) + mark, f"{100 * best.top1:.1f}",
                          f"{best.cost.gflops:.2f}", f"{best.cost.million_parameters:.1f}")  # fmt: skip
    _print_unfolded(table)
    out.print(found.verdict, soft_wrap=True)
    if quick:
        steps = "; ".join(f"{member} {points(gain, interval)}" for member, gain, interval in found.order)
        out.print(f"Best first, each to those before it: {steps}.", soft_wrap=True)
        out.print(found.outlook, soft_wrap=True)


def show_overlap(found) -> None:
    """Each subject by itself, what is known of it from others, and the sentences."""
    table = Table("", "from", "features", "dead", "rank", "CKA", "R2", "from untrained", "top-1 (of the rest) in %")
    for k, one in enumerate(found.subjects):
        cells = f"{one.width:,}", f"{one.dead:.1%}", f"{one.effective_rank:.1f}", "", "", "", f"{100 * one.top1:.1f}"
        table.add_row(one.name, "", *cells, style="bold")
        for r in (r for r in found.relations if r.wanted == k):
            cells = f"{r.cka:.2f}", f"{r.r2:.2f}", f"{r.untrained_r2:.2f}", f"{100 * r.rest_top1:.1f}"
            table.add_row("", r.source, "", "", "", *cells)
    _print_unfolded(table)
    out.print("\n".join(found.verdict), soft_wrap=True, markup=False)


def show_recipes(found: dict) -> None:
    """One table of several recipes' results, each in its own metric: the ensemble, its best member, and what they are
    compared with.
    """
    columns = {}
    for recipe, results in found.items():
        metric = results.dataset["metric"]
        rows = {row.name: _in_metric(row, metric) for row in results.rows if row.kind not in ("prefix", "member")}
        members = [_in_metric(row, metric) for row in results.rows if row.kind == "member"]
        best = {"its best member, by test": max(members)} if members else {}
        columns[f"{recipe}\n{metric}"] = {results.ensemble: rows.pop(results.ensemble)} | best | rows
    table = Table("", title="linear probe in %, with 95% interval", title_justify="left")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        shown = [column.get(name) for column in columns.values()]
        table.add_row(name, *("{:.1f} [{:.1f}, {:.1f}]".format(*percent) if percent else "" for percent in shown))
    _print_unfolded(table)


def main() -> None:
    """Run, and answer a user's mistake with one line and exit code 2 (130 for Ctrl-C)."""
    _be_quiet()
    try:
        app()
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)
    except (ValueError, OSError) as error:
        errors.print(f"error: {' '.join(str(error).split())}", soft_wrap=True, markup=False)
        sys.exit(2)


def _be_quiet() -> None:
    """Leave our own progress bars the only ones."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _typed() -> str:
    return shlex.join(["concat-ensemble", *sys.argv[1:]])


def _studies(context: typer.Context) -> dict[str, tuple[dict, Callable]]:
    """What a command's options name: for each dataset a name, how it was asked for, and how it is had."""
    from concat_ensemble.data import load_data
    from concat_ensemble.recipes import dataset_recipe

    given = context.params
    drawn = {"limit": given["limit"], "seed": given["seed"]}
    drawn |= {"shots": given["shots"]} if given.get("shots") else {}
    names = ["config", "revision", "image_column", "label_column", "classes", "train_split", "validation_split", "test_split", "test_size"]  # fmt: skip
    if given["recipe"]:
        _refuse_beside(context, "--recipe", ["dataset", *names])
        recipes = [dataset_recipe(name) for name in dict.fromkeys(given["recipe"])]
        studies = {known.recipe: (known.described | drawn, partial(known.load, **drawn)) for known in recipes}
    else:
        naming = {name: given[name] for name in names} | {"classes": _classes(given["classes"])}
        asked = {"name": given["dataset"], **naming, **drawn}
        words = [given["dataset"], given["config"], given["classes"] and f"classes-{given['classes']}"]
        studies = {"-".join(filter(None, words)): (asked, partial(load_data, **asked))}
    return studies


def _file_name(study: str, limit: int | None, shots: int | None = None) -> str:
    words = [study, f"limit-{limit}" if limit else "", f"shots-{shots}" if shots else ""]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def _probe_on(
    asked: dict,
    load: Callable,
    path: Path,
    ensemble,
    folder: Path,
    baselines: list[str],
    *,
    save_head: bool,
    overwrite: bool,
    quiet: bool,
    **extraction,
):
    """Results on one dataset, named by `asked` and had by `load`: probed and saved to `path`, or read from there."""
    from concat_ensemble.data import class_names
    from concat_ensemble.model_card import write_card
    from concat_ensemble.probing import members_sha256, probe_ensemble, with_head
    from concat_ensemble.results import Results

    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a results file, as in --output {path / 'probe.json'}.")
    if path.exists() and not overwrite:
        results = Results.load(path)
        alike = results.members_sha256 == members_sha256(ensemble.config) and asked.items() <= results.dataset.items()
        has_head = (folder / "head.safetensors").is_file()
        if not alike or any(Path(other).name not in results for other in baselines) or (save_head and not has_head):
            raise ValueError(
                f"{path} holds the results of other weights or data, or not all that is asked for; add --overwrite, or name another --output."
            )
        if not quiet:
            errors.print(f"{path} is there already; --overwrite probes again.", markup=False)
        return results
    _writable_parent(path)  # better known before the work than after it
    data = load()
    results, found = probe_ensemble(
        ensemble,
        data,
        name=folder.name,
        described=_described(asked, data),
        baselines={Path(other).name: _load(other, asked["seed"]) for other in baselines},
        seed=asked["seed"],
        quiet=quiet,
        **extraction,
    )
    results.command = _typed()
    results.save(path)
    if save_head:
        with_head(ensemble, found, class_names(data["train"])).save_pretrained(folder)
    if (folder / "config.json").is_file():
        write_card(folder)
    return results


def _described(asked: dict, data) -> dict:
    """How a dataset was asked for, and what the results say of it besides."""
    on_hub = "/" in asked["name"] and not Path(asked["name"].partition(":")[2] or asked["name"]).exists()
    return asked | {"test_images": len(data["test"]), "on_hub": on_hub}


def _refuse_beside(context: typer.Context, what: str, parameters: list[str]) -> None:
    given = [name for name in parameters if context.get_parameter_source(name).name == "COMMANDLINE"]
    if given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{what} does not go with {options}; leave one out.")


def _print_unfolded(table: Table) -> None:
    """As wide as it is, also where the terminal is narrower or there is none: folded numbers cannot be read."""
    Console(highlight=False, width=max(out.width, 250)).print(table)


def _in_metric(row, metric: str) -> list[float]:
    """In percent, the mean over repeats and its interval: Student's over them, else over test images, which are redrawn
    where the metric is not a share of them.
    """
    alike = replace(row, runs=[replace(run, metrics={"top1": run.metrics[metric]}) for run in row.runs])
    redrawn = metric != "top1" and len(row.runs) == 1
    interval = row.runs[0].intervals[metric] if redrawn else alike.interval
    return [100 * share for share in (alike.mean, *interval)]


def _classes(text: str | None) -> list[int | str] | None:
    """`0,1,2`, `5-9` or names."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(match[1]) > int(match[2]):
            raise ValueError(f"--classes {text} runs backwards; write {match[2]}-{match[1]}.")
        return list(range(int(match[1]), int(match[2]) + 1))
    return [int(part) if part.isdigit() else part for part in text.split(",")]


def _load(name: str, seed: int):
    """An ensemble from a folder or the Hub as it is, or one made of whatever `build` takes."""
    from concat_ensemble.assemble import HUB, assemble

    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) and not Path(name).exists()
    return assemble([HUB + name if is_hub_id else name], seed=seed)


def _refuse_taken(path: Path, overwrite: bool) -> None:
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
def _new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` that takes its place when all went well; what was there stays until then."""
    _refuse_taken(path, overwrite)
    parent = _writable_parent(path)
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


def _writable_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists; ValueError where nothing can be written there."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            return parent
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another --output.") from error
