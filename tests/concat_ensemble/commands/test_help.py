"""What the commands say of themselves, which must not take long, and how they end."""

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import concat_ensemble
from concat_ensemble.commands.app import COMMANDS
from concat_ensemble.commands.options import expand_options
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions

HEAVY = {"torch", "timm", "transformers", "datasets", "matplotlib", "sklearn", "scipy", "numpy", "huggingface_hub"}
NAMES = [command.__name__ for command in COMMANDS]
MODULES = """
import sys
from concat_ensemble.commands.app import main
try:
    main()
except SystemExit as stop:
    print("\\nmodules", *sys.modules)
    sys.exit(stop.code)
"""


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--help"], {}),
        (["probe", "-h"], {}),
        (["reproduce", "-h"], {}),
        (["--version"], {}),
        ([], {"_CONCAT_ENSEMBLE_COMPLETE": "complete_bash", "COMP_WORDS": "concat-ensemble pro", "COMP_CWORD": "1"}),
    ],
)
def test_help_and_completion_load_nothing_heavy(words, environment):
    # A console script calls itself by its own name, which is how the variable for completion is named.
    program = f"import sys; sys.argv[0] = 'concat-ensemble'\n{MODULES}"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=os.environ | environment, capture_output=True, text=True
    )
    shown, _, modules = done.stdout.partition("\nmodules")
    assert done.returncode == 0 and shown.strip() and done.stderr == ""
    assert "typer" in modules.split() and not HEAVY & set(modules.split())
    assert not environment or shown.split() == ["probe"]


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_an_example(name, run):
    code, out, _ = run(name, "-h")
    assert code == 0 and f"concat-ensemble {name} " in out
    assert run(name, "--help") == (code, out, "")


def test_the_program_lists_its_commands_and_exit_codes(run):
    code, out, _ = run("-h")
    assert code == 0 and all(f"│ {name} " in out for name in NAMES) and "Exit codes: 0 done; 2 a mistake" in out


def test_the_line_ends_of_a_docstring_are_not_those_of_the_screen(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    _, commands, _ = run("-h")
    assert "not looked at: members may be chosen by this." in next(
        line for line in commands.splitlines() if "Report which members repeat each other" in line
    )
    _, verify, _ = run("verify", "-h")
    assert "and within one point of it." in verify


def test_the_version_is_that_of_the_distribution(run):
    assert run("--version") == (0, f"{version('concat-ensemble')}\n", "")
    assert concat_ensemble.__version__ == version("concat-ensemble")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["reproduce", "figure-3"], ["'figure-3'", "figure-4", "all"]),
        (["reproduce", "ntk", "--repeats", "1"], ["--repeats", "2"]),
        (["mixture", "digits"], ["'digits'", "scattered_digits"]),
        (["mixture", "scattered_digits", "--components", "points"], ["'points'", "labels"]),
        (["mixture", "scattered_digits", "--steps", "7"], ["7", "8"]),
    ],
)
def test_a_mistake_in_an_experiment_exits_with_2(words, texts, run, tmp_path):
    code, out, err = run(*words)
    assert code == 2 and out == "" and all(text in err for text in texts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["probe", "select"])
def test_a_dataset_without_its_option_is_told_where_it_goes(command, run):
    code, out, err = run(command, "pair", "photos")
    said = " ".join(err.replace("│", " ").split())
    assert code == 2 and out == "" and "(photos). A dataset is named with --dataset." in said


def test_every_field_of_an_options_class_is_an_option():
    """A field that has the name of a parameter of the command keeps its default."""
    received = []

    @expand_options
    def command(
        *,
        words: Annotated[list[str], typer.Argument()],
        recipe: Annotated[str, typer.Option()] = "dtd",
        dataset: DatasetOptions,
        extraction: ExtractionOptions,
    ) -> None:
        received.append((words, recipe, dataset, extraction))

    app = typer.Typer()
    app.command()(command)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for cls in (DatasetOptions, ExtractionOptions):
        for field in dataclasses.fields(cls):
            assert field.name == "recipe" or field.metadata["help"].split(",")[0] in shown
    words = ["a", "b", "--dataset", "digits", "--test-size", "0.25", "--workers", "2", "-q"]
    assert CliRunner().invoke(app, words).exit_code == 0
    dataset, extraction = DatasetOptions(name="digits", test_size=0.25), ExtractionOptions(num_workers=2, quiet=True)
    assert received == [(["a", "b"], "dtd", dataset, extraction)]
    assert CliRunner().invoke(app, ["a", "--workers", "-1"]).exit_code == 2
