"""`concat-ensemble`: build an ensemble, probe it, write its card."""

import sys

import typer

from concat_ensemble.commands.cache import cache
from concat_ensemble.commands.card import card, verify
from concat_ensemble.commands.ensembles import build, export
from concat_ensemble.commands.evidence import mixture, reproduce, theory
from concat_ensemble.commands.hub import push
from concat_ensemble.commands.overlap import compare
from concat_ensemble.commands.probe import probe
from concat_ensemble.commands.report import report
from concat_ensemble.commands.select import select
from concat_ensemble.console import be_quiet, errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Several image backbones as one richer model.\n\nconcat-ensemble build resnet50.a1_in1k resnet50.tv2_in1k --output two-resnets",
    epilog="Exit codes: 0 done; 2 a mistake, said in one line, or a check that does not hold; 130 stopped by Ctrl-C, what was finished is kept.",
)
COMMANDS = (build, probe, select, compare, card, verify, report, push, export, theory, cache)  # in the order of --help
for command in COMMANDS:
    app.command()(command)
# These leave their options to a script's own parser.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for command in (mixture, reproduce):
    app.command(context_settings=PASSED_ON)(command)


def main() -> None:
    """Run, and answer a user's mistake with one line and exit code 2 (130 for Ctrl-C)."""
    be_quiet()
    try:
        app()
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)
    except (ValueError, OSError) as error:
        errors.print(f"error: {' '.join(str(error).split())}", soft_wrap=True, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
