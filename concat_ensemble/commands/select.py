"""`select`: which members to keep."""

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from concat_ensemble.commands import options
from concat_ensemble.commands.options import AsJson, Model, Recipes
from concat_ensemble.commands.probe import print_results
from concat_ensemble.console import out
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.studies.options import SelectOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.select_study import SelectStudy
    from concat_ensemble.studies.selection_results import Selection


def select(
    *,
    model: Model,
    recipe: Recipes = None,
    dataset: DatasetOptions,
    selecting: SelectOptions,
    extraction: ExtractionOptions,
    as_json: AsJson = False,
) -> None:
    """Recommend which members to keep for a dataset: ridge probes of every subset on validation images, then a linear
    probe of what is chosen on the test split.

    concat-ensemble select three-backbones --recipe flowers102 --max-gflops 10 --output chosen
    """
    from concat_ensemble.reporting.figures import plot_accuracy_against_cost
    from concat_ensemble.reporting.model_card import write_card
    from concat_ensemble.studies.select_study import run_select_study

    dataset, *others = dataset.with_recipes(recipe or [])
    if others:
        raise ValueError("select chooses for one dataset; give one --recipe.")
    selecting = dataclasses.replace(selecting, command=options.command_line())

    def on_selection(study: "SelectStudy") -> None:
        figure = study.path.with_suffix(".png")
        plot_accuracy_against_cost(study.selection, figure)
        if as_json:
            options.print_file(study.path)
        else:
            print_selection(study.selection, selecting.quick)
            out.print(f"all subsets: {study.path}, {figure}", soft_wrap=True)

    study = run_select_study(model, dataset, selecting, extraction, on_selection=on_selection)
    if study.results and not as_json:
        print_results(study.results)
    if output := selecting.output:
        write_card(output, title=output.name)
        if not (extraction.quiet or as_json):
            out.print(f"written: {output}", soft_wrap=True)


def print_selection(selection: "Selection", quick: bool) -> None:
    """Print what each member is worth, the best subset of each size, and what to do."""
    from concat_ensemble.studies.results import format_points

    options.print_table(contribution_table(selection))
    options.print_table(best_table(selection))
    out.print(selection.verdict, soft_wrap=True)
    if quick:
        steps = [f"{member} {format_points(gain, interval)}" for member, gain, interval in selection.greedy_order]
        out.print(f"Best first, each to those before it: {'; '.join(steps)}.", soft_wrap=True)
        out.print(selection.outlook, soft_wrap=True)


def contribution_table(selection: "Selection") -> Table:
    """What each member costs and adds."""
    from concat_ensemble.studies.results import format_points

    title = (
        f"ridge probes fitted on {selection.n_train:,} images, top-1 on {selection.n_held_out:,} others in % "
        f"[95% interval]; protocol {selection.protocol}"
    )
    table = Table(title=title, title_justify="left")
    costs = ("features", "GFLOPs", "M parameters")
    for heading in ("", "member", *costs, "alone", "added to the chosen", "Shapley value", "advice"):
        table.add_column(heading, justify="left" if heading in ("member", "advice") else "right")
    for part in selection.contributions:
        k, cost = part.member, selection.costs[part.member]
        sizes = f"{selection.feature_dims[k]:,}", f"{cost.gflops:.2f}", f"{cost.million_parameters:.1f}"
        alone, gain = f"{100 * selection[[k]].top1:.1f}", format_points(part.gain, part.gain_interval)
        shapley = format_points(part.shapley, part.shapley_interval)
        table.add_row(str(k), selection.names[k], *sizes, alone, gain, shapley, part.advice)
    return table


def best_table(selection: "Selection") -> Table:
    """The best subset of each size."""
    table = Table("best of its size", "top-1", "GFLOPs", "M parameters")
    best = {}
    for subset in selection.subsets:  # from the best to the worst
        best.setdefault(len(subset.members), subset)
    for _, subset in sorted(best.items()):
        mark = "  (chosen)" if subset.members == selection.best else ""
        name, cost = "+".join(map(str, subset.members)) + mark, subset.cost
        table.add_row(name, f"{100 * subset.top1:.1f}", f"{cost.gflops:.2f}", f"{cost.million_parameters:.1f}")
    return table
