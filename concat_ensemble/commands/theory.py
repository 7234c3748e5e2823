"""`theory`: the paper's section 2 on a computer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, Output, Overwrite, Quiet, print_file, print_table
from concat_ensemble.console import out


def theory(
    *,
    output: Output = Path("theory"),
    initialisations: Annotated[int, typer.Option(min=1, help="Random initializations of each kind of network.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed for the components, proportions and networks.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check the paper's section 2: which mixtures cancel a correlation, and what a network trained on a mixture drops.

    concat-ensemble theory --output theory
    """
    from concat_ensemble.experiments import theory
    from concat_ensemble.studies.outputs import check_file

    path, figure = output / "theory.json", output / "theory.png"
    check_file(path, overwrite)
    cancellations = theory.sample_cancellations(seed=seed)
    counterexample = theory.train_counterexample(initializations=initialisations, seed=seed)
    theory.plot_counterexample(counterexample, figure)
    theory.save_theory(cancellations, counterexample, path)
    if as_json:
        print_file(path)
        return
    low, high = cancellations.slope_interval
    found = f"in {cancellations.num_mixtures:,} mixtures, the share within a bound of zero falls with the bound "
    found += f"to the power of {cancellations.slope:.3f} [{low:.3f}, {high:.3f}]"
    exact = f"{cancellations.exact:,} exact proportions that cancel"
    largest = f"{cancellations.largest_covariance:.0e}"
    out.print(f"Proposition 2.1: {found}; {exact}, with a covariance of at most {largest}.", soft_wrap=True)
    print_table(counterexample_table(counterexample.rows, initialisations))
    out.print(counterexample.verdict, soft_wrap=True)
    if not quiet:
        out.print(f"written: {path}, {figure}", soft_wrap=True)


def counterexample_table(rows: list, initialisations: int) -> Table:
    """For each kind of network the accuracies in %, and how many of the initializations fit all components."""
    accuracies = ("mixture, %", "components, %", "all fitted, % [95% interval]")
    table = Table("", "units", "steps", "features in use", *accuracies)
    for row in rows:
        share, low, high = (100 * value for value in (row.all_fitted / initialisations, *row.interval))
        components = " ".join(f"{100 * part:.1f}" for part in row.components)
        sizes = str(row.width), f"{row.steps:,}", f"{row.features:.2f}"
        table.add_row(row.name, *sizes, f"{100 * row.mixture:.1f}", components, f"{share:.0f} [{low:.0f}, {high:.0f}]")
    return table
