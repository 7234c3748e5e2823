"""`select`: which members to keep."""

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from concat_ensemble.commands import options
from concat_ensemble.commands.options import AsJson, Model, Recipes
from concat_ensemble.commands.probe import print_results
from concat_ensemble.console import out, stack_lines
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
    """Recommend which members to keep for a dataset: ridge probes of every subset by cross-validation, then a linear
    probe of what is chosen on the test split.

    concat-ensemble select three-backbones --recipe flowers102 --max-gflops 10 --output chosen
    """
    from concat_ensemble.reporting.figures import plot_accuracy_against_cost
    from concat_ensemble.reporting.model_card import renew_card
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

    output = selecting.output
    study = run_select_study(
        model,
        dataset,
        selecting,
        extraction,
        on_selection=on_selection,
        write_card=lambda folder: renew_card(folder, output or folder),
    )
    if study.results and not as_json:
        print_results(study.results)
    if output and not (extraction.quiet or as_json):
        out.print(f"written: {output}", soft_wrap=True)


def print_selection(selection: "Selection", quick: bool) -> None:
    """Print what is lost without each member, the best subset of each size, and what to do."""
    from concat_ensemble.data.audit import Audit
    from concat_ensemble.studies.results import format_points

    out.print(contribution_table(selection))
    out.print(best_table(selection))
    audit = Audit.from_dict(selection.audit or {}).sentences()
    paragraphs = [" ".join(audit), *selection.paragraphs]
    if quick:
        steps = [f"{member} {format_points(gain, interval)}" for member, gain, interval in selection.greedy_order]
        paragraphs += [f"Best first, each to those before it: {'; '.join(steps)}.", selection.outlook]
    for paragraph in filter(None, paragraphs):
        out.print(paragraph)


def contribution_table(selection: "Selection") -> Table:
    """What each member costs and what is lost without it; within 80 columns unless names are long."""
    from concat_ensemble.studies.selection_results import format_interval

    title = f"ridge probes by cross-validation, {selection.n_held_out:,} images, {selection.metric} in %"
    loss = stack_lines("added to", "the others") if selection.over_budget else stack_lines("loss", "without it")
    table = _new_table(title, "member", "features", "GFLOPs", "alone", loss, "95% interval", "advice")
    for part in selection.contributions:
        k = part.member
        cells = f"{selection.feature_dims[k]:,}", f"{selection.costs[k].gflops:.2g}"
        cells += f"{100 * selection[[k]].score:.1f}", f"{100 * part.gain:.1f}", format_interval(part.gain_interval)
        table.add_row(f"{k} {selection.names[k]}", *cells, part.advice)
    return table


def best_table(selection: "Selection") -> Table:
    """The best subset of each size."""
    from concat_ensemble.studies.selection_results import format_interval, format_members

    table = _new_table("", "best of its size", selection.metric, "loss", "95% interval", "GFLOPs", "M parameters")
    best = {}
    for subset in selection.subsets:  # from the best to the worst
        best.setdefault(len(subset.members), subset)
    best[len(selection.best)] = selection[selection.best]
    for _, subset in sorted(best.items()):
        name = format_members(subset.members) + (" (chosen)" if subset.members == selection.best else "")
        loss = "" if subset.loss is None else f"{100 * subset.loss:.1f}"
        interval = format_interval(subset.loss_interval) if subset.loss_interval else ""
        cost = f"{subset.cost.gflops:.2g}", f"{subset.cost.million_parameters:.3g}"
        table.add_row(name, f"{100 * subset.score:.1f}", loss, interval, *cost)
    return table


def _new_table(title: str, *headings: str | Text) -> Table:
    """A table whose first column holds names, and the others numbers."""
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, heading in enumerate(headings):
        is_text = place == 0 or heading == "advice"
        overflow, justify = "fold" if place == 0 else "ellipsis", "left" if is_text else "right"
        table.add_column(heading, overflow=overflow, no_wrap=place > 0, justify=justify)
    return table
