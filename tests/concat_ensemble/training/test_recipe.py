import argparse
import dataclasses
import shlex
from pathlib import Path

import pytest
import timm

from concat_ensemble.training.distillation import Distillation
from concat_ensemble.training.finetuning import FineTuning
from concat_ensemble.training.options import add_field_options
from concat_ensemble.training.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[3] / "training" / "recipes").glob("*.yaml"))
GOOD = "dataset: digits\narchitecture: resnet10t\ninput_size: [1, 32, 32]\ntotal_steps: 40\n"


@pytest.fixture
def read(tmp_path):
    """`read(text, **changes)`: the recipe of a file with this text."""

    def read(text: str, **changes) -> Recipe:
        (tmp_path / "mine.yaml").write_text(text)
        return Recipe.from_file(tmp_path / "mine.yaml", **changes)

    return read


def test_a_file_is_read_and_the_rest_has_defaults(read):
    recipe = read(GOOD + "classes: [3, 5]\nlearning_rate: 1\n")
    assert (recipe.dataset, recipe.input_size, recipe.classes, recipe.learning_rate) == (
        "digits",
        [1, 32, 32],
        [3, 5],
        1,
    )
    assert recipe.members == [1, 2, 4] and recipe.model_args == {} and recipe.seed == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1


def test_the_command_line_replaces_the_file(read):
    parser = argparse.ArgumentParser()
    add_field_options(parser, Recipe)
    words = [
        "--total-steps",
        "80",
        "--members",
        "[1, 4]",
        "--model-args",
        "{in_chans: 1}",
        "--dataset-config",
        "null",
        "--seed",
        "7",
    ]
    recipe = read(GOOD + "seed: 3\n", **vars(parser.parse_args(words)))
    assert (recipe.total_steps, recipe.members, recipe.seed) == (80, [1, 4], 7)
    assert recipe.model_args == {"in_chans": 1} and recipe.dataset_config is None and recipe.dataset == "digits"
    assert vars(parser.parse_args([])) == {}, "an option that is left out changes nothing"


def test_no_is_text_for_a_text_field(read):
    assert read(GOOD + "mixed_precision: no\n").mixed_precision == "no", "YAML takes it for false"


def test_every_field_is_an_option():
    parser = argparse.ArgumentParser()
    add_field_options(parser, Recipe)
    options = {
        name.removeprefix("--").replace("-", "_") for action in parser._actions for name in action.option_strings
    }
    assert {field.name for field in dataclasses.fields(Recipe)} <= options


# Text of the file, and what the one-line error must contain: the field, its value, the remedy.
BAD = {
    "unknown field": (
        GOOD + "leraning_rate: 0.1\n",
        r"mine\.yaml: no field 'leraning_rate'; did you mean learning_rate\?",
    ),
    "unlike any field": (GOOD + "zzz: 1\n", r"no field 'zzz'; the fields are dataset, dataset_config"),
    "field that is no name": (GOOD + "3: 1\n", "no field 3"),
    "text for a number": (GOOD + "seed: zero\n", "seed='zero' must be int"),
    "share for a number of steps": (GOOD.replace("40", "40.5"), r"total_steps=40\.5 must be int"),
    "yes for a number": (GOOD + "seed: yes\n", "seed=True must be int"),
    "text for a float": (GOOD + "learning_rate: fast\n", "learning_rate='fast' must be float"),
    "number for a list": (GOOD + "members: 4\n", r"members=4 must be list, got int"),
    "list of something else": (
        GOOD + "members: [1, two]\n",
        r"members\[1\]='two' must be int, got str",
    ),
    "number for a mapping": (GOOD + "model_args: 1\n", "model_args=1 must be mapping"),
    "null where none may be": (GOOD + "dataset: null\n", "dataset=None must be str"),
    "missing fields": ("dataset: digits\ntotal_steps: 40\n", r"mine\.yaml lacks architecture, input_size\."),
    "no steps": (GOOD.replace("40", "0"), "total_steps=0 must be int >= 1"),
    "no images in a batch": (GOOD + "batch_size: 0\n", "batch_size=0 must be int >= 1"),
    "no members": (GOOD + "members: []\n", r"members=\[\] must be numbers of networks from 1 to total_steps=40"),
    "more members than steps": (GOOD + "members: [41]\n", r"members=\[41\] must be numbers"),
    "unknown augmentation": (
        GOOD + "augmentation: mixup\n",
        "augmentation='mixup' must be one of timm, scatter, none",
    ),
    "two channels": (
        GOOD.replace("[1, 32, 32]", "[2, 32, 32]"),
        r"input_size=\[2, 32, 32\] must be \[C, H, W\] with 1 or 3 channels",
    ),
    "two numbers of size": (GOOD.replace("[1, 32, 32]", "[32, 32]"), r"input_size=\[32, 32\] must be \[C, H, W\]"),
    "no pixels": (GOOD.replace("[1, 32, 32]", "[1, 0, 32]"), r"input_size\[1\]=0 must be int >= 1"),
    "negative wide steps": (GOOD + "wide_steps: -1\n", "wide_steps=-1 must be int >= 0"),
    "test share of nothing": (GOOD + "test_size: 0.0\n", r"test_size=0\.0 must be float > 0\.0"),
    "learning rate of nothing": (GOOD + "learning_rate: -0.1\n", r"learning_rate=-0\.1 must be float > 0\.0"),
    "a mean too many": (GOOD + "mean: [0.5, 0.5, 0.5]\n", r"mean=\[0\.5, 0\.5, 0\.5\]"),
    "broken YAML": ("dataset: [digits\n", r"mine\.yaml is not YAML: "),
    "a list": ("- digits\n", r"mine\.yaml holds list; write one 'field: value'"),
    "nothing": ("", r"mine\.yaml holds NoneType; write one 'field: value'"),
    "bytes": ("\0", r"mine\.yaml is not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_error_for_a_bad_recipe_names_the_remedy(case, read):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Recipe.from_file(tmp_path / "none.yaml")


SETTINGS = {"pretrain_members": Recipe, "distill": Distillation, "finetune": FineTuning}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_command_hardware_and_expectation(path):
    head = path.read_text().split("\ndataset:")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    command = next(line for line in head if "accelerate launch" in line).strip("# ")
    words = shlex.split(command)
    kind = SETTINGS[Path(words[2]).stem]
    assert words[:2] == ["accelerate", "launch"] and words[3] == f"training/recipes/{path.name}"
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallelism")
    add_field_options(parser, kind)
    changes = vars(parser.parse_args(words[4:]))
    del changes["parallelism"]
    settings = kind.from_file(path, **changes)
    assert kind is FineTuning or settings.architecture in timm.list_models()
    text = " ".join(head)
    assert "Hardware: " in text and ("Not run here" in text or "Expected" in text)


def test_there_is_a_recipe():
    assert RECIPES
