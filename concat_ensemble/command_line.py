"""`concat-ensemble`: build an ensemble, probe it, write its card."""

import sys

import typer

from concat_ensemble.commands.cache import cache
from concat_ensemble.commands.ensembles import build, card, export
from concat_ensemble.commands.evidence import theory
from concat_ensemble.commands.options import errors
from concat_ensemble.commands.overlap import compare
from concat_ensemble.commands.probe import probe
from concat_ensemble.commands.report import report
from concat_ensemble.commands.select import select

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Several image backbones as one richer model.",
)
for command in (build, probe, select, compare, card, report, export, theory, cache):  # in the order of --help
    app.command()(command)


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
