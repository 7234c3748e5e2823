"""`compare`: which members repeat each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from concat_ensemble.commands import options
from concat_ensemble.commands.options import AsJson, Output, Overwrite, Recipes
from concat_ensemble.console import out
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions

if TYPE_CHECKING:
    from concat_ensemble.studies.overlap_results import Overlap


def compare(
    *,
    models: Annotated[list[str], typer.Argument(help="One ensemble, for its members; or several, each as a whole.")],
    recipe: Recipes = None,
    dataset: DatasetOptions,
    output: Output = Path("overlap"),
    extraction: ExtractionOptions,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Report which members repeat each other, and what each has that the others lack: CKA, held-out R2 both ways, and
    a probe of what the others do not predict. The test images are not looked at: members may be chosen by this.

    concat-ensemble compare three-backbones --recipe flowers102 --limit 5000 --output overlap
    """
    from concat_ensemble.reporting.figures import plot_overlap
    from concat_ensemble.studies.compare_study import run_compare_study

    dataset, *others = dataset.with_recipes(recipe or [])
    if others:
        raise ValueError("compare looks at one dataset; give one --recipe.")
    command = options.command_line()
    study = run_compare_study(models, dataset, extraction, output=output, overwrite=overwrite, command=command)
    figure = study.path.with_suffix(".png")
    plot_overlap(study.overlap, figure)
    if as_json:
        options.print_file(study.path)
        return
    out.print(overlap_table(study.overlap))
    for sentence in study.overlap.verdict:
        out.print()
        out.print(sentence, soft_wrap=True)
    out.print()
    if not extraction.quiet:
        out.print(f"written: {study.path}, {figure}", soft_wrap=True)


def overlap_table(overlap: "Overlap") -> Table:
    """Each member or ensemble by itself, and below it how well the others predict it."""
    headings = "", "features", "dead", "rank", "CKA", "R2", "R2 un-\ntrained", "top-1\n(rest)"
    table = options.number_table(heading.split("\n") for heading in headings)
    for k, subject in enumerate(overlap.subjects):
        own = f"{subject.num_features:,}", f"{subject.dead_share:.1%}", f"{subject.effective_rank:.1f}"
        table.add_row(subject.name, *own, "", "", "", f"{100 * subject.top1:.1f}", style="bold")
        for relation in overlap.relations:
            if relation.target == k:
                untrained = "" if relation.untrained_r2 is None else f"{relation.untrained_r2:.2f}"
                r2 = f"{relation.r2:.2f}", untrained
                rest = f"{100 * relation.residual_top1:.1f}"
                table.add_row(f"  from {relation.source_name}", "", "", "", f"{relation.cka:.2f}", *r2, rest)
    return table
