"""`reproduce`: the paper's figures at desk scale."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import Repeats, Smoke, one_of, training_processes
from concat_ensemble.experiments.names import FIGURES, MINUTES

FIGURE_NAMES = (*FIGURES, "all")
FIGURE_HELP = f"{', '.join(FIGURES)} or all, which takes about {MINUTES} minutes on 2 cores."


def reproduce(
    *,
    figure: Annotated[str, typer.Argument(help=FIGURE_HELP, **one_of(FIGURE_NAMES))],
    repeats: Repeats = 4,
    first_seed: Annotated[
        int, typer.Option(min=0, help="Seeds of the repeats are this one and the next ones (Figure 6: 100 more).")
    ] = 0,
    smoke: Smoke = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figures and numbers; the page is written beside it.")
    ] = Path("runs/reproduction"),
) -> None:
    """Run the paper's figures at desk scale, beside the paper's numbers.

    concat-ensemble reproduce all
    """
    from concat_ensemble.experiments.reproduce import reproduce as reproduce_figure

    with training_processes():
        reproduce_figure(figure, output=output, repeats=repeats, first_seed=first_seed, smoke=smoke)
