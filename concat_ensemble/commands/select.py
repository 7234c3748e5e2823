"""`select`: which members to keep."""

import sys
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
    new_folder,
    print_unfolded,
    refuse_taken,
    studies_of,
    writable_parent,
)
from concat_ensemble.commands.probe import show
from concat_ensemble.console import out


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

    concat-ensemble select three-backbones --recipe flowers102 --max-gflops 10 --output chosen
    """
    from datasets import DatasetDict

    from concat_ensemble.features.extraction import extract_features
    from concat_ensemble.features.projection import principal_projection, with_projection
    from concat_ensemble.reporting.figures import plot_accuracy_against_cost
    from concat_ensemble.reporting.model_card import write_card
    from concat_ensemble.studies.cost import member_costs
    from concat_ensemble.studies.probing import probe_ensemble
    from concat_ensemble.studies.results import RESULTS
    from concat_ensemble.studies.selection import QUICK_FOLDS, quick_part, select_members

    if quick and (output or columns):
        raise ValueError("--quick only looks; leave out --output and --columns, or leave out --quick.")
    studies = studies_of(context)
    if len(studies) > 1:
        raise ValueError("select chooses for one dataset; give one --recipe.")
    ((study, (asked, load)),) = studies.items()
    folder = Path(model)
    home = folder if (folder / "config.json").is_file() else Path()
    path = home / "selection" / f"{file_name(study, limit)}{'-quick' if quick else ''}.json"
    writable_parent(path)
    if output:
        refuse_taken(output, overwrite)  # better known before the work than after it
    ensemble = load_model(model, seed)
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
        chosen, data, name=name, described=described(asked, data), baselines=all_of_them, seed=seed, **extraction
    )
    results.command = command_line()
    if not as_json:
        show(results)
    if output:
        with new_folder(output, overwrite) as made:
            chosen.save_pretrained(made)
            results.save(made / RESULTS / f"{file_name(study, limit)}.json")
            write_card(made, title=output.name)
        if not quiet and not as_json:
            out.print(f"written: {output}", soft_wrap=True)


def show_selection(found, quick: bool) -> None:
    """What each member is worth, the best subset of each size, and what to do."""
    from concat_ensemble.studies.results import format_points

    table = Table(
        title=f"ridge probes fitted on {found.n_train:,} images, top-1 on {found.n_held_out:,} others in % "
        f"[95% interval]; protocol {found.protocol}",
        title_justify="left",
    )
    for heading in ("", "member", "columns", "GFLOPs", "M parameters", "alone", "added to the chosen", "Shapley value", "advice"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("member", "advice") else "right")
    for part, cost, name, width in zip(found.contributions, found.costs, found.names, found.feature_dims, strict=True):
        alone = found[[part.member]].top1
        shapley = "" if part.shapley is None else format_points(part.shapley, part.shapley_interval)
        table.add_row(str(part.member), name, f"{width:,}", f"{cost.gflops:.2f}", f"{cost.million_parameters:.1f}",
                      f"{100 * alone:.1f}", format_points(part.gain, part.gain_interval), shapley, part.advice)  # fmt: skip
    print_unfolded(table)
    table = Table("best of its size", "top-1", "GFLOPs", "M parameters")
    for size in range(1, len(found.names) + 1):
        best = next((s for s in found.subsets if len(s.members) == size), None)
        if best:
            mark = "  (chosen)" if best.members == found.best else ""
            table.add_row("+".join(map(str, best.members)) + mark, f"{100 * best.top1:.1f}",
                          f"{best.cost.gflops:.2f}", f"{best.cost.million_parameters:.1f}")  # fmt: skip
    print_unfolded(table)
    out.print(found.verdict, soft_wrap=True)
    if quick:
        steps = "; ".join(f"{member} {format_points(gain, interval)}" for member, gain, interval in found.greedy_order)
        out.print(f"Best first, each to those before it: {steps}.", soft_wrap=True)
        out.print(found.outlook, soft_wrap=True)
