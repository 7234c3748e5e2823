"""A training step and the loader alone, beside those of timm's `train.py`, on the same files.

    .venv/bin/python tests/benchmarks/training_step.py

Both sides read the same folder of images, with the same augmentation, network, optimizer, batch size and number of
threads, without worker processes. timm's side is the loop of its `train.py` (`create_dataset`, `create_loader` with
its prefetcher, `create_optimizer_v2`, `create_scheduler_v2`); ours is `pretrain_members.py`'s. Repeats alternate
between the two, and each begins with a few steps that are not counted. CPU seconds are those of the whole process. At
the end, top-1 accuracy of both on held-out images after the same number of steps.
"""

import argparse
import itertools
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import evaluate
from concat_ensemble.training.images import Images
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.planning import Network
from concat_ensemble.training.pretraining import create_loop
from concat_ensemble.training.recipe import Recipe

WARMUP = 3  # steps
CLASSES, MEAN, STD = 5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CASES = {  # pixels of the files and of the network, file format, batch size, architecture and arguments, steps
    "small images": (32, "png", 64, "resnet18", {"channels": (16, 16, 32, 32)}, 40),
    "224-pixel JPEGs": (224, "jpg", 16, "resnet18", {"channels": (16, 16, 32, 32)}, 12),
}


def write_images(folder: Path, pixels: int, kind: str, count: int) -> None:
    """Smooth random textures, one direction for each class, of photographs' size in bytes."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:pixels, :pixels] / pixels
    for number in range(count):
        label, phases = number % CLASSES, rng.uniform(0, 2 * np.pi, 3)
        angle = np.pi * (label + rng.normal(0, 0.15)) / CLASSES
        waves = np.sin(12 * (rows * np.cos(angle) + columns * np.sin(angle))[..., None] + phases)
        noise = rng.normal(0, 0.15, (pixels, pixels, 3))
        path = folder / ("validation" if number % 5 == 0 else "train") / str(label) / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * np.clip(0.5 + 0.3 * waves + noise, 0, 1)).astype(np.uint8)).save(path, quality=90)


def make_recipe(folder: Path, case: str, steps: int) -> Recipe:
    pixels, _, batch, architecture, model_args, _ = CASES[case]
    return Recipe(
        dataset=f"imagefolder:{folder}",
        augmentation="timm",
        auto_augment=None,
        color_jitter=0.4,
        architecture=architecture,
        model_args=model_args,
        input_size=[3, pixels, pixels],
        mean=list(MEAN),
        std=list(STD),
        batch_size=batch,
        total_steps=steps,
        members=[1],
        optimizer="sgd",
        learning_rate=0.05,
        evaluate_every=10**6,
        checkpoint_every=10**6,
        num_workers=0,
        output=str(folder / "runs"),
    )


class Timm:
    """The loader and the step of timm's `train.py`."""

    def __init__(self, folder: Path, case: str, steps: int):
        pixels, _, batch, architecture, model_args, _ = CASES[case]
        common = {"input_size": (3, pixels, pixels), "batch_size": batch, "mean": MEAN, "std": STD}
        common |= {"interpolation": "bicubic", "num_workers": 0, "persistent_workers": False}
        common |= {"device": torch.device("cpu")}
        train, held_out = (create_dataset("", root=str(folder), split=split) for split in ("train", "validation"))
        self.loader = create_loader(train, is_training=True, hflip=0.5, color_jitter=0.4, **common)
        self.held_out = create_loader(held_out, is_training=False, crop_pct=1.0, **common)
        self.model = timm.create_model(architecture, num_classes=CLASSES, **model_args)
        self.optimizer = create_optimizer_v2(self.model, "sgd", lr=0.05, weight_decay=2e-5)
        by_steps = {"num_epochs": steps, "step_on_epochs": False, "updates_per_epoch": 1}
        self.schedule = create_scheduler_v2(self.optimizer, "cosine", **by_steps)[0]
        self.loss = nn.CrossEntropyLoss()

    def batches(self):
        while True:
            yield from self.loader

    def steps(self):
        self.model.train()
        for step, (images, labels) in enumerate(self.batches(), 1):
            self.loss(self.model(images), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step_update(step)
            yield step

    @torch.no_grad()
    def top1(self) -> float:
        self.model.eval()
        correct = [self.model(images).argmax(1) == labels for images, labels in self.held_out]
        return torch.cat(correct).float().mean().item()


class Ours:
    def __init__(self, folder: Path, case: str, steps: int):
        self.recipe = make_recipe(folder, case, steps)
        self.images = Images(self.recipe, Pixels.from_settings(self.recipe), with_test=False)
        network = Network("cat1", 0, steps, 0, self.recipe.model_args)
        checkpoints = folder / "checkpoints"
        self.loop = create_loop([network], self.recipe, self.images, folder=checkpoints, cpu=True)

    def batches(self):
        return self.images.batches([0])

    def steps(self):
        objective = Objective(self.recipe)
        return self.loop.run(partial(self.images.batches, [0]), objective, stops=range(self.loop.steps))

    def top1(self) -> float:
        return evaluate(self.loop.networks_to_save()[0], self.images, self.loop.accelerator).top1


def measure(iterator, count: int) -> tuple[float, float]:
    """CPU and wall seconds of one item, after a few that are not counted."""
    next(itertools.islice(iterator, WARMUP - 1, None))
    cpu, wall = time.process_time(), time.perf_counter()
    next(itertools.islice(iterator, count - 1, None))
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def compare(case: str, repeats: int, accuracy_steps: int) -> dict:
    pixels, kind, batch, *_, count = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, pixels, kind, 100 * CLASSES)
        times = {(side.__name__, what): [] for side in (Timm, Ours) for what in ("step", "loader")}
        for _ in range(repeats):
            for side in (Timm, Ours):
                made = side(folder, case, count + WARMUP + 1)
                times[side.__name__, "loader"].append(measure(iter(made.batches()), count))
                times[side.__name__, "step"].append(measure(iter(made.steps()), count))
        accuracies = {side.__name__: [] for side in (Timm, Ours)}
        for seed in range(repeats if accuracy_steps else 0):
            for side in (Timm, Ours):
                torch.manual_seed(seed)
                made = side(folder, case, accuracy_steps)
                next(itertools.islice(made.steps(), accuracy_steps - 1, None))
                accuracies[side.__name__].append(100 * made.top1())
    result = {"case": case, "top1": {name: np.round(values, 1).tolist() for name, values in accuracies.items()}}
    for what in ("step", "loader"):
        theirs, ours = times["Timm", what], times["Ours", what]
        ratios = [ours[0] / theirs[0] for theirs, ours in zip(theirs, ours, strict=True)]
        result[what] = {"ratio": median(ratios), "ratios": np.round(ratios, 2).tolist()}
        for name, values in (("timm", theirs), ("ours", ours)):
            result[what] |= {f"{name}_cpu_ms": round(1e3 * median(cpu for cpu, _ in values), 1)}
            result[what] |= {f"{name}_images_per_s": round(batch / median(wall for _, wall in values), 1)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy-steps", type=int, default=150, help="0: leave accuracies out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        print(json.dumps(compare(case, options.repeats, options.accuracy_steps)), flush=True)


if __name__ == "__main__":
    main()
