"""Every recipe, run for a few steps; those for ImageNet with small images of digits."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from concat_ensemble import load_data
from concat_ensemble.training import distillation, finetuning, pretraining

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
IMAGENET = [path for path in RECIPES if path.stem.startswith("imagenet")]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """Digits as a parquet folder, which takes the place of data on the Hub."""
    folder = tmp_path_factory.mktemp("digits")
    load_data("digits", limit=300)["train"].to_parquet(folder / "train.parquet")
    return f"parquet:{folder}"


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("members")
    recipe = RECIPES[0].parent / "scattered_digits_timecat.yaml"
    run(pretraining, recipe, "--smoke", "--cpu", "--members", "[2]", "--snapshots", "0", "--output", output)
    return output


def run(module, *words) -> None:
    """Run a training in this process; the scripts themselves are launched in the tests of each."""
    module.main(list(map(str, words)))


def few(path: Path):
    """ViT-S and the digits always; ResNet-50 and MNIST, which take the same path, among the slow tests."""
    slow = "resnet50" in path.stem or "mnist" in path.stem
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("path", map(few, RECIPES))
def test_every_recipe_runs(path, digits, members, tmp_path):
    smoke = [path, "--smoke", "--cpu", "--output", tmp_path]
    if path in IMAGENET:
        size = ["--input-size", "[3, 32, 32]", "--total-steps", "5", "--mixed-precision", "no"]
        size += ["--model-args", "{img_size: 32, drop_path_rate: 0.1, depth: 2}"] if "vit" in path.stem else []
        run(pretraining, *smoke, *size, "--dataset", digits, "--batch-size", "4")
        count = yaml.safe_load(path.read_text())["members"][0]
        assert (tmp_path / f"cat{count}" / "model.safetensors.index.json").is_file()
        return
    data = ["--dataset", digits] if "mnist" in path.stem else []
    if path.stem.endswith(("timecat", "seeds")):
        run(pretraining, *smoke, *data)
        made = "cat4-s" if path.stem.endswith("timecat") else "cat4" if "vit" in path.stem else "w2"
        assert (tmp_path / made / "config.json").is_file()
    elif path.stem.endswith("distill"):
        teachers = f"[{members / 'members' / 'cat2-0'}, {members / 'members' / 'cat2-1'}]"
        run(distillation, *smoke, *data, "--teachers", teachers)
        assert (tmp_path / "distilled" / "config.json").is_file()
    else:
        data = ["--dataset", f"scattered:{digits}"] if data else []
        run(finetuning, *smoke, *data, "--model", members / "cat2")
        assert (tmp_path / "two-stage" / "config.json").is_file()


@pytest.mark.slow
def test_a_resnet50_recipe_runs_at_full_width(digits, script, tmp_path):
    words = [
        "training/recipes/imagenet_resnet50_cat4.yaml",
        "--smoke",
        "--cpu",
        "--dataset",
        digits,
        "--batch-size",
        "8",
        "--output",
        tmp_path,
    ]
    run(pretraining, *words)
    assert len(list((tmp_path / "members").iterdir())) == 4


def test_the_wide_network_is_as_wide_and_as_large_as_the_papers():
    args = yaml.safe_load(next(path for path in IMAGENET if "w2" in path.stem).read_text())["model_args"]
    with torch.device("meta"):
        wide = timm.create_model("resnet50", num_classes=0, **args)
        plain = timm.create_model("resnet50", num_classes=0)
    assert wide.num_features == 4_096 == 2 * plain.num_features
    assert sum(parameter.numel() for parameter in wide.parameters()) == pytest.approx(94e6, rel=0.005)


def test_the_papers_steps_and_seeds():
    recipes = [yaml.safe_load(path.read_text()) for path in IMAGENET if "cat" in path.stem and "resnet" in path.stem]
    plans = {
        recipe["members"][0]: (recipe["total_steps"] // recipe["members"][0], recipe["seeds"]) for recipe in recipes
    }
    seeds = [2, 550, 23, 477, 8529]
    assert plans == {1: (450_000, seeds[:1]), 2: (200_000, seeds[:2]), 4: (100_000, seeds[:4]), 5: (80_000, seeds)}
    assert {recipe["optimizer"] for recipe in recipes} == {"schedulefree_adamw"}
