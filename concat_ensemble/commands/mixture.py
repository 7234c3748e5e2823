"""`mixture`: direct training against transfer."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import Repeats, Smoke, one_of, training_processes
from concat_ensemble.experiments.names import COMPONENTS, STUDIES


def mixture(
    *,
    study: Annotated[str, typer.Argument(help=f"{' or '.join(STUDIES)}.", **one_of(STUDIES))],
    components: Annotated[
        str, typer.Option(help="What the components are made of: labels or classes.", **one_of(COMPONENTS))
    ] = "labels",
    steps: Annotated[int, typer.Option(help="Training steps of each direct network.")] = 400,
    repeats: Repeats = 3,
    smoke: Smoke = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; runs/STUDY-mixture-COMPONENTS when left out."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The images, such as parquet:FOLDER; from the Hub when left out.")
    ] = None,
) -> None:
    """Train on the components of a mixture and on the mixture: what does transfer lose, and concatenation recover?

    concat-ensemble mixture scattered_digits --components labels
    """
    from concat_ensemble.experiments.mixture import run_mixture

    settings = {"components": components, "steps": steps, "repeats": repeats, "smoke": smoke}
    with training_processes():
        run_mixture(study, output=output, dataset=dataset, **settings)
