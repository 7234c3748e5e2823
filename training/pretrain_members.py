"""Train the members of time-concatenated ensembles and what they are compared with, then assemble them.

    accelerate launch training/pretrain_members.py training/recipes/scattered_digits_timecat.yaml

writes `members/NAME-K` (timm's own layout) for each network and `cat1`, `cat2`, ..., `w2` (ensembles that
`AutoModel.from_pretrained` loads). A network that is finished is not trained again when the same command is run once
more.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.models import save_for_hf
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from concat_ensemble import assemble, load_data
from concat_ensemble.data import Scatter, class_names, open_image
from concat_ensemble.errors import first_line
from concat_ensemble.modeling.configuration_concat_ensemble import IMAGE_MODES
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from recipe import Recipe

COMMAND = shlex.join(["accelerate", "launch", *sys.argv])


@dataclass(frozen=True)
class Network:
    """One training: a member of the ensemble `name`."""

    name: str
    number: int
    steps: int
    seed: int
    model_args: dict

    @property
    def folder(self) -> str:
        return f"members/{self.name}-{self.number}"


def networks_of(recipe: Recipe) -> list[Network]:
    """Every network that the recipe asks for, each with a seed of its own."""
    plan = [("w2", 1, recipe.wide_steps, recipe.model_args | recipe.wide_model_args)] if recipe.wide_steps else []
    for count in sorted(recipe.members, reverse=True):
        steps = recipe.total_steps // count if count > 1 else round(recipe.total_steps * (1 + recipe.baseline_extra))
        plan.append((f"cat{count}", count, steps, recipe.model_args))
    seeds = itertools.count(recipe.seed * 100)
    return [
        Network(name, number, steps, next(seeds), args)
        for name, count, steps, args in reversed(plan)
        for number in range(count)
    ]


class AugmentedImages(Dataset):
    """(image, label) with timm's training augmentation drawn anew each time."""

    def __init__(self, split, recipe: Recipe):
        self.split, self.mode = split, IMAGE_MODES[recipe.input_size[0]]
        self.transform = timm.data.create_transform(
            tuple(recipe.input_size), is_training=True, mean=recipe.mean, std=recipe.std
        )

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.transform(convert_image(open_image(self.split, index), self.mode)), self.split[index]["label"]


def training_data(recipe: Recipe):
    """The training images, and a function that makes a batch of them into what a network sees."""
    split = load_data(
        recipe.dataset,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        classes=recipe.classes,
        test_size=recipe.test_size,
        validation_size=0.01,
        seed=recipe.seed,
    )["train"]
    if recipe.augmentation == "timm":
        return AugmentedImages(split, recipe), class_names(split), lambda batch: batch
    mode = IMAGE_MODES[recipe.input_size[0]]
    images = (
        torch.stack([pil_to_tensor(convert_image(open_image(split, i), mode)) for i in range(len(split))]).float() / 255
    )
    scatter, mean, std = Scatter(size=recipe.input_size[1]), recipe.mean[0], recipe.std[0]
    return (
        TensorDataset(images, torch.tensor(split["label"])),
        class_names(split),
        lambda batch: (scatter(batch) - mean) / std,
    )


def train(
    network: Network, recipe: Recipe, dataset, names: list[str], augment, accelerator: Accelerator, folder: Path
) -> None:
    """Train one network and save it, written aside and renamed."""
    set_seed(network.seed)
    model = timm.create_model(recipe.architecture, num_classes=len(names), **network.model_args).to(
        memory_format=torch.channels_last
    )
    loader = DataLoader(dataset, recipe.batch_size, shuffle=True, drop_last=len(dataset) >= recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=network.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    bar = tqdm(
        range(1, network.steps + 1), desc=f"{network.folder} ({network.steps} steps)", disable=not sys.stderr.isatty()
    )
    for step in bar:
        images, labels = next(batches)
        loss = cross_entropy(model(augment(images).contiguous(memory_format=torch.channels_last)), labels)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == network.steps:
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"{network.folder}: the loss is {loss.item()} at step {step}; lower learning_rate={recipe.learning_rate}."
                )
            bar.set_postfix(loss=f"{loss.item():.3f}")

    if accelerator.is_main_process:
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        channels = recipe.input_size[0]
        pixels = {
            "input_size": tuple(recipe.input_size),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": tuple(recipe.mean * (channels // len(recipe.mean))),
            "std": tuple(recipe.std * (channels // len(recipe.std))),
        }
        config = {
            "pretrained_cfg": {**pixels, "license": "apache-2.0"},
            "provenance": provenance_of(network, recipe, names) | {"command": COMMAND},
            "label_names": names,
        }
        trained = accelerator.unwrap_model(model).to(memory_format=torch.contiguous_format)
        save_for_hf(
            trained,
            aside,
            model_config=config,
            model_args=network.model_args,
            safe_serialization=True,
            data_config=pixels,
        )
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    accelerator.wait_for_everyone()


def check_buildable(network: Network, recipe: Recipe) -> None:
    """Raise ValueError, before anything is written, where timm cannot build a network or it cannot take an image."""
    try:
        with torch.device("meta"):
            timm.create_model(recipe.architecture, num_classes=2, **network.model_args)(
                torch.zeros(2, *recipe.input_size)
            )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{recipe.architecture} with {network.model_args} and images of {recipe.input_size}: {first_line(error)}."
        ) from error


def provenance_of(network: Network, recipe: Recipe, names: list[str]) -> dict:
    return {
        "source": "trained by training/pretrain_members.py",
        "objective": "supervised classification",
        "pretraining_data": f"{recipe.dataset}, classes {', '.join(names)}"
        + (" (scattered)" if recipe.augmentation == "scatter" else ""),
        "steps": network.steps,
        "seed": network.seed,
        "recipe": {key: value for key, value in dataclasses.asdict(recipe).items() if key not in ("output", "members")},
    }


def is_finished(folder: Path, network: Network, recipe: Recipe, names: list[str]) -> bool:
    """Whether the very same network is there already."""
    if not (folder / "config.json").is_file():
        return False
    found = json.loads((folder / "config.json").read_text()).get("provenance", {})
    return {key: value for key, value in found.items() if key != "command"} == json.loads(
        json.dumps(provenance_of(network, recipe, names))
    )


def holds(folder: Path, ensemble) -> bool:
    """Whether the folder holds an ensemble of the same weights already."""
    if not (folder / "config.json").is_file():
        return False
    there = json.loads((folder / "config.json").read_text())["members"]
    return [m["provenance"]["weights_sha256"] for m in there] == [
        m["provenance"]["weights_sha256"] for m in ensemble.config.members
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe_file", type=Path, help="a YAML file of training/recipes")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    Recipe.add_options(parser)
    options = vars(parser.parse_args(arguments))
    recipe_file, cpu, smoke = (options.pop(name) for name in ("recipe_file", "cpu", "smoke"))
    try:
        recipe = Recipe.from_file(recipe_file, **options)
        if smoke:
            recipe = dataclasses.replace(recipe, total_steps=16, wide_steps=min(recipe.wide_steps, 4))
        run(recipe, Accelerator(cpu=cpu, step_scheduler_with_optimizer=False))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(recipe: Recipe, accelerator: Accelerator) -> None:
    output = Path(recipe.output)
    if output.is_file():
        raise ValueError(f"output={recipe.output} is a file; name a folder.")
    networks = networks_of(recipe)
    for network in {network.name: network for network in networks}.values():
        check_buildable(network, recipe)
    dataset, names, augment = training_data(recipe)
    for network in networks:
        folder = output / network.folder
        if is_finished(folder, network, recipe, names):
            accelerator.print(f"{folder} is finished, skipped")
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        train(network, recipe, dataset, names, augment, accelerator, folder)
    if accelerator.is_main_process:
        for name, group in itertools.groupby(networks, key=lambda network: network.name):
            folders = [output / network.folder for network in group]
            ensemble = assemble(folders)
            if not holds(output / name, ensemble):  # else it may have a head by now, which is to stay
                ensemble.save_pretrained(output / name)
            print(f"{output / name}: {len(folders)} network{'s' if len(folders) > 1 else ''}")


if __name__ == "__main__":
    main()
