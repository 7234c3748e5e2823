"""`concat-ensemble`: build an ensemble, probe it, write its card."""

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.rich_utils import rich_format_error

from concat_ensemble.commands.build import build
from concat_ensemble.commands.cache import cache
from concat_ensemble.commands.card import card
from concat_ensemble.commands.compare import compare
from concat_ensemble.commands.export import export
from concat_ensemble.commands.mixture import mixture
from concat_ensemble.commands.options import expand_options
from concat_ensemble.commands.page import app as show_page
from concat_ensemble.commands.power import power
from concat_ensemble.commands.predict import predict
from concat_ensemble.commands.probe import probe
from concat_ensemble.commands.push import push
from concat_ensemble.commands.report import report
from concat_ensemble.commands.reproduce import reproduce
from concat_ensemble.commands.select import select
from concat_ensemble.commands.theory import theory
from concat_ensemble.commands.verify import verify
from concat_ensemble.console import (
    MEASURED_KEPT,
    be_quiet,
    errors,
    let_main_process_speak,
    print_stopped,
    printable,
)
from concat_ensemble.errors import one_line
from concat_ensemble.processes import refuse_several

UsageError: Any = typer.BadParameter.__base__  # click's; recent versions of typer have a copy of click
# In the order of --help.
COMMANDS = [
    build,
    probe,
    select,
    compare,
    predict,
    show_page,
    card,
    power,
    verify,
    report,
    push,
    export,
    theory,
    cache,
    mixture,
    reproduce,
]
SHARED = ("probe", "select", "compare")  # whose extraction the processes of `accelerate launch` share
FEATURES_KEPT = "goes on: features that were extracted are kept"
# How a command that was stopped by Ctrl-C goes on; the others write each file whole or not at all.
KEPT = {
    "probe": f"{FEATURES_KEPT}, and so are the results of finished datasets",
    "select": FEATURES_KEPT,
    "compare": FEATURES_KEPT,
    "verify": FEATURES_KEPT,
    "predict": "begins again: predictions are not kept",
    "push": "goes on: files that have arrived are not sent again",
    "mixture": MEASURED_KEPT,
    "reproduce": MEASURED_KEPT,
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Several image backbones as one richer model.\n\n"
    "concat-ensemble build resnet50.a1_in1k resnet50.tv2_in1k --output two-resnets",
    epilog="Exit codes: 0 done; 2 a mistake, which one line explains, or a check that failed; 130 stopped by Ctrl-C: "
    "what is finished is kept, and the same command goes on.",
)


def _help_text(command: Callable) -> str:
    """The docstring of a command, each paragraph on one line: typer would keep the line ends of the source."""
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


for command in COMMANDS:
    app.command(help=_help_text(command))(expand_options(command))


def _print_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"{version('concat-ensemble')}\n")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand not in SHARED:
        refuse_several(str(context.invoked_subcommand))


def describe_kept(words: list[str]) -> str:
    """How a command line that was stopped goes on, and with what."""
    command = next((word for word in words if not word.startswith("-")), "")
    return KEPT.get(command, "goes on: no file is left half-written")


def _dataset_hint(message: str, words: list[str]) -> str:
    """What to add to the message about a dataset that stands after the model, without its option."""
    misplaced = message.startswith("Got unexpected extra argument") and words[:1] in (["probe"], ["select"])
    return ". A dataset is named with --dataset." if misplaced else ""


def main() -> None:
    """Run a command. A user's mistake is answered by one line and exit code 2, Ctrl-C by exit code 130."""
    be_quiet()
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except UsageError as error:
        let_main_process_speak()
        message = printable(error.message)  # it repeats what was typed, or what the shell made of a *
        error.message = f"{message}{_dataset_hint(message, sys.argv[1:])}"
        rich_format_error(error)
        code = 2
    except (ValueError, OSError) as error:
        let_main_process_speak()
        errors.print(f"error: {one_line(error)}", soft_wrap=True)
        code = 2
    if code == 130:
        print_stopped(describe_kept(sys.argv[1:]))
    sys.exit(code)


if __name__ == "__main__":
    main()
