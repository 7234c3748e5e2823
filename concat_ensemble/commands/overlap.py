"""`compare`: which members repeat each other."""

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
    Output,
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
    new_file,
    print_unfolded,
    studies_of,
)
from concat_ensemble.console import out


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

    concat-ensemble compare three-backbones --recipe flowers102 --limit 5000 --output overlap
    """
    from concat_ensemble.reporting.figures import plot_overlap
    from concat_ensemble.studies.overlap import compare_models

    ((study, (asked, load)), *more) = studies_of(context).items()
    if more:
        raise ValueError("compare looks at one dataset; give one --recipe.")
    path = output / f"{file_name(study, limit)}.json"
    new_file(path, overwrite)
    loaded = {f"{k}: {Path(name).name}": load_model(name, seed + k) for k, name in enumerate(models)}
    found = compare_models(loaded, data := load(), seed=seed, quiet=quiet, batch_size=batch_size, num_workers=workers)
    found.save(path, command=command_line(), dataset=described(asked, data))
    plot_overlap(found, path.with_suffix(".png"))
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        show_overlap(found)
    if not as_json and not quiet:
        out.print(f"written: {path}, {path.with_suffix('.png')}", soft_wrap=True)


def show_overlap(found) -> None:
    """Each subject by itself, what is known of it from others, and the sentences."""
    table = Table("", "from", "features", "dead", "rank", "CKA", "R2", "from untrained", "top-1 (of the rest) in %")
    for k, one in enumerate(found.subjects):
        cells = (
            f"{one.num_features:,}",
            f"{one.dead_share:.1%}",
            f"{one.effective_rank:.1f}",
            "",
            "",
            "",
            f"{100 * one.top1:.1f}",
        )
        table.add_row(one.name, "", *cells, style="bold")
        for r in (r for r in found.relations if r.target == k):
            cells = f"{r.cka:.2f}", f"{r.r2:.2f}", f"{r.untrained_r2:.2f}", f"{100 * r.residual_top1:.1f}"
            table.add_row("", r.source_name, "", "", "", *cells)
    print_unfolded(table)
    out.print("\n".join(found.verdict), soft_wrap=True, markup=False)
