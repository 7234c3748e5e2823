"""Trainings that start from the weights of another one."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from concat_ensemble.training.networks import _read, check_buildable, create_network, read_initial_weights
from concat_ensemble.training.pretraining import main
from concat_ensemble.training.recipe import Recipe

SMALL = {"in_chans": 1, "channels": [4, 4, 8, 8], "stem_width": 4}
SETTINGS = {
    "dataset": "digits",
    "architecture": "resnet10t",
    "model_args": SMALL,
    "input_size": [1, 32, 32],
    "total_steps": 4,
    "members": [2],
}
RECIPE = str(Path(__file__).parents[3] / "training" / "recipes" / "scattered_digits_timecat.yaml")


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A network of seven classes in timm's layout, under a licence of its own."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=7, **SMALL)
    network.bn1.running_mean.fill_(0.25)
    network.pretrained_cfg = network.pretrained_cfg | {"license": "cc-by-4.0", "input_size": (1, 32, 32)}
    provenance = {"pretraining_data": "letters", "steps": 12}
    folder = tmp_path_factory.mktemp("first")
    save_for_hf(
        network, str(folder), model_args=SMALL, model_config={"provenance": provenance}, safe_serialization=True
    )
    return folder


@pytest.fixture
def source(first, tmp_path):
    """`source(kind)`: the network as a folder, or as a checkpoint of a training script."""

    def source(kind: str) -> str:
        if kind == "folder":
            return str(first)
        weights = load_file(first / "model.safetensors")
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}}, tmp_path / "last.pth")
        return str(tmp_path / "last.pth")

    return source


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_networks_start_from_a_source_under_heads_of_their_own(kind, source, first):
    recipe = Recipe(**SETTINGS, initial_checkpoint=source(kind))
    one, other = (create_network(recipe, 5, recipe.model_args).state_dict() for _ in range(2))
    stored = load_file(first / "model.safetensors")
    heads = [key for key in one if not torch.equal(one[key], other[key])]
    assert heads == ["fc.weight", "fc.bias"] and one["fc.weight"].shape == (5, 8)
    assert all(torch.equal(one[key], stored[key]) for key in one if not key.startswith("fc."))
    assert one["bn1.running_mean"].eq(0.25).all(), "statistics too"


def test_the_seed_alone_determines_a_network_that_starts_from_random_weights():
    recipe = Recipe(**SETTINGS)
    torch.manual_seed(3)
    created = create_network(recipe, 5, SMALL).state_dict()
    torch.manual_seed(3)
    plain = timm.create_model("resnet10t", num_classes=5, **SMALL).state_dict()
    assert all(torch.equal(created[key], plain[key]) for key in plain)
    assert read_initial_weights(recipe).identity == {}


BAD = {
    "another architecture": ({"architecture": "resnet18", "model_args": {"in_chans": 1}}, "must hold one network of"),
    "another width": ({"model_args": SMALL | {"stem_width": 8}}, "does not hold the weights of resnet10t"),
    "nothing": ({"initial_checkpoint": "nowhere/x.pth"}, "no checkpoint file nowhere/x.pth"),
    "no such weights of timm": (
        {"initial_checkpoint": None, "pretrained": True, "architecture": "resnet10t.none"},
        "none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_do_not_fit_are_named_before_the_training(case, first):
    changes, message = BAD[case]
    recipe = Recipe(**SETTINGS | {"initial_checkpoint": str(first)} | changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_initial_weights(recipe)
    assert "\n" not in str(error.value)


def test_a_network_without_gradient_checkpointing_is_refused():
    check_buildable(Recipe(**SETTINGS, gradient_checkpointing=True), SMALL)
    recipe = Recipe(**SETTINGS | {"architecture": "tnt_s_legacy_patch16_224"}, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True must be a network for images"):
        check_buildable(recipe, {"in_chans": 1})


def test_provenance_licence_and_identity_say_where_a_training_started(first, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in first.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    output = tmp_path / "out"
    words = [RECIPE, "--cpu", "--limit", "40", "--batch-size", "16", "--model-args", json.dumps(SMALL)]
    words += ["--members", "[1]", "--snapshots", "0", "--wide-steps", "0", "--total-steps", "2"]
    words += ["--initial-checkpoint", str(copy), "--output", str(output)]
    main(words)
    member = json.loads((output / "cat1" / "config.json").read_text())["members"][0]["provenance"]
    assert member["initial_weights"]["source"] == "copy" and member["initial_weights"]["steps"] == 12
    assert member["pretraining_data"].startswith("letters; then digits, classes 0, 1, 2, 3, 4")
    assert member["license"] == "cc-by-4.0" and member["steps"] == 2
    capsys.readouterr()
    main(words)
    assert "is finished, skipped" in capsys.readouterr().out
    weights = load_file(copy / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    _read.cache_clear()  # as in another process
    with pytest.raises(SystemExit):
        main(words)
    assert "is of another training: its initial_weights_sha256 is" in capsys.readouterr().err
