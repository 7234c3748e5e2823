"""`theory`, `mixture` and `reproduce`: the paper's evidence."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, Output, Overwrite, Quiet, Seed, new_file, print_unfolded
from concat_ensemble.console import out


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
    from concat_ensemble.experiments.theory import (
        draw_cancellations,
        plot_counterexample,
        save_theory,
        train_counterexample,
    )

    path = output / "theory.json"
    new_file(path, overwrite)
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
    print_unfolded(table)
    out.print(found.verdict, soft_wrap=True)
    if not quiet:
        out.print(f"written: {path}, {path.with_suffix('.png')}", soft_wrap=True)


def mixture(context: typer.Context) -> None:
    """Train on the components of a mixture and on the mixture, and say what transfer loses and concatenation recovers.

    concat-ensemble mixture scattered_digits --components labels
    """
    _run_script("mixture.py", context.args)


def reproduce(context: typer.Context) -> None:
    """Run the paper's figures at desk scale, beside the paper's numbers: figure-1, ..., or all.

    concat-ensemble reproduce all
    """
    _run_script("reproduce.py", context.args)


def _run_script(name: str, words: list[str]) -> None:
    """Become a script of `training/`, which is cloned and not installed: its Ctrl-C and its exit code are then its own."""
    script = Path(__file__).parents[1] / "experiments" / name
    if not script.is_file():
        raise ValueError(f"this trains networks, with scripts that a clone has and an installed package has not: clone the repository, pip install -e '.[train]' there, and run it again ({script} is missing).")  # fmt: skip
    os.execv(sys.executable, [sys.executable, str(script), *words])
