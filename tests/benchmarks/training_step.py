"""A training step, the loader alone and evaluation, beside those of timm's `train.py`, on the same files.

    .venv/bin/python tests/benchmarks/training_step.py

Both sides read the same folder of images, with the same augmentation, network, optimizer, learning rates, weight
decay, batch size, threads and number of worker processes. timm's side is the loop of its `train.py` (`create_dataset`,
`create_loader` with its prefetcher, `create_optimizer_v2`, `create_scheduler_v2`); ours is `pretrain_members.py`'s.
Repeats alternate between the two, and each begins with a few steps that are not counted. CPU seconds are those of the
process and its workers. At the end, top-1 accuracy of both on held-out images after the same number of steps; each
repeat has a seed of its own, which both sides use. `--small` is for a trial: its numbers mean nothing.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import timm
import torch
from accelerate.utils import set_seed
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
WHATS = ("step", "loader", "evaluation")
CLASSES, MEAN, STD = 5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
HELD_OUT = 20  # images of each class, a fifth of all
NETWORK = ("resnet18", {"channels": (16, 16, 32, 32)})
LEARNING_RATE, WEIGHT_DECAY = 0.05, 2e-5


class Case(NamedTuple):
    pixels: int  # of the files and of the network
    kind: str  # file format
    batch: int
    steps: int
    workers: int = 0


CASES = {
    "small images": Case(32, "png", 64, 40),
    "224-pixel JPEGs": Case(224, "jpg", 16, 12),
    "small images, 2 workers": Case(32, "png", 64, 40, workers=2),
    "224-pixel JPEGs, 2 workers": Case(224, "jpg", 16, 12, workers=2),
}


def write_images(folder: Path, pixels: int, kind: str, count: int) -> None:
    """Smooth random textures, one direction for each class, of photographs' size in bytes."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:pixels, :pixels] / pixels
    for number in range(count):
        label, phases = number % CLASSES, rng.uniform(0, 2 * np.pi, 3)
        angle = np.pi * (label + rng.normal(0, 0.15)) / CLASSES
        waves = np.sin(12 * (rows * np.cos(angle) + columns * np.sin(angle))[..., None] + phases)
        noise = rng.normal(0, 0.15, (pixels, pixels, 3))
        split = "test" if number < CLASSES else "train" if number // CLASSES % 5 else "validation"
        path = folder / split / str(label) / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * np.clip(0.5 + 0.3 * waves + noise, 0, 1)).astype(np.uint8)).save(path, quality=90)


def make_recipe(folder: Path, case: Case, steps: int) -> Recipe:
    architecture, model_args = NETWORK
    return Recipe(
        dataset=f"imagefolder:{folder}",
        augmentation="timm",
        auto_augment=None,
        color_jitter=0.4,
        architecture=architecture,
        model_args=model_args,
        input_size=[3, case.pixels, case.pixels],
        mean=list(MEAN),
        std=list(STD),
        batch_size=case.batch,
        total_steps=steps,
        members=[1],
        optimizer="sgd",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup=0.0,
        evaluate_every=10**6,
        checkpoint_every=10**6,
        log_every=0,
        num_workers=case.workers,
        output=str(folder / "runs"),
    )


class Timm:
    """The loader and the step of timm's `train.py`."""

    def __init__(self, folder: Path, case: Case, *, steps: int, seed: int):
        set_seed(seed)
        common = {"input_size": (3, case.pixels, case.pixels), "batch_size": case.batch, "mean": MEAN, "std": STD}
        common |= {"interpolation": "bicubic", "num_workers": case.workers, "persistent_workers": case.workers > 0}
        common |= {"device": torch.device("cpu")}
        train, held_out = (create_dataset("", root=str(folder), split=split) for split in ("train", "validation"))
        self.loader = create_loader(train, is_training=True, hflip=0.5, color_jitter=0.4, **common)
        self.held_out = create_loader(held_out, is_training=False, crop_pct=1.0, **common)
        architecture, model_args = NETWORK
        self.model = timm.create_model(architecture, num_classes=CLASSES, **model_args)
        self.optimizer = create_optimizer_v2(self.model, "sgd", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        by_steps = {"num_epochs": steps, "warmup_epochs": 0, "step_on_epochs": False, "updates_per_epoch": 1}
        self.schedule = create_scheduler_v2(self.optimizer, "cosine", **by_steps)[0]
        self.loss = nn.CrossEntropyLoss()

    def batches(self) -> Iterator:
        while True:
            yield from self.loader

    def steps(self) -> Iterator[int]:
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
    def __init__(self, folder: Path, case: Case, *, steps: int, seed: int):
        self.recipe = make_recipe(folder, case, steps)
        self.images = Images(self.recipe, Pixels.from_settings(self.recipe), with_test=False)
        self.seed, network = seed, Network("cat1", 0, steps, seed, self.recipe.model_args)
        checkpoints = folder / f"checkpoints-{seed}"
        self.loop = create_loop([network], self.recipe, self.images, folder=checkpoints, cpu=True)

    def batches(self) -> Iterator:
        return self.images.batches([self.seed])

    def steps(self) -> Iterator[int]:
        objective = Objective(self.recipe)
        return self.loop.run(partial(self.images.batches, [self.seed]), objective, stops=range(self.loop.steps))

    @torch.no_grad()
    def top1(self) -> float:
        network = self.loop.networks_to_save()[0]
        return evaluate(network, self.images, self.loop.accelerator).top1 or 0.0


def used_seconds() -> tuple[float, float]:
    """CPU seconds of this process and its workers so far, and the time."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(used.user + used.system for used in times), time.perf_counter()


def measure(run: Callable[[], object], count: int) -> tuple[float, float]:
    """CPU and wall seconds of one of `count` items."""
    before = used_seconds()
    run()
    cpu, wall = (after - start for after, start in zip(used_seconds(), before, strict=True))
    return cpu / count, wall / count


def measure_items(iterator: Iterator, count: int) -> tuple[float, float]:
    """As `measure`, after a few items that are not counted."""
    next(itertools.islice(iterator, WARMUP - 1, None))
    return measure(lambda: next(itertools.islice(iterator, count - 1, None)), count)


def measure_speeds(folder: Path, case: Case, repeats: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """CPU and wall seconds of a batch in each repeat, by side and by what is measured."""
    speeds = {(side.__name__, what): [] for side in (Timm, Ours) for what in WHATS}
    for seed in range(repeats):
        for side in (Timm, Ours):
            made, name = side(folder, case, steps=case.steps + WARMUP + 1, seed=seed), side.__name__
            speeds[name, "loader"].append(measure_items(iter(made.batches()), case.steps))
            speeds[name, "step"].append(measure_items(iter(made.steps()), case.steps))
            if not case.workers:  # else starting them is most of it
                held_out = HELD_OUT * CLASSES / case.batch
                speeds[name, "evaluation"].append(measure(made.top1, held_out))
    return speeds


def measure_accuracies(folder: Path, case: Case, repeats: int, steps: int) -> dict[str, list[float]]:
    accuracies = {side.__name__: [] for side in (Timm, Ours)}
    for seed in range(repeats):
        for side in (Timm, Ours):
            made = side(folder, case, steps=steps, seed=seed)
            next(itertools.islice(made.steps(), steps - 1, None))
            accuracies[side.__name__].append(round(100 * made.top1(), 1))
    return accuracies


def compare(name: str, case: Case, repeats: int, accuracy_steps: int) -> dict:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_images(folder, case.pixels, case.kind, 5 * (HELD_OUT + 1) * CLASSES)
        speeds = measure_speeds(folder, case, repeats)
        result: dict = {"case": name}
        if accuracy_steps:
            result["top1"] = measure_accuracies(folder, case, repeats, accuracy_steps)
    for what in WHATS:
        theirs, ours = speeds["Timm", what], speeds["Ours", what]
        if not ours:
            continue
        ratios = [our / their for (their, _), (our, _) in zip(theirs, ours, strict=True)]
        result[what] = {"ratio": round(median(ratios), 3), "ratios": np.round(ratios, 2).tolist()}
        for side, values in (("timm", theirs), ("ours", ours)):
            result[what] |= {f"{side}_cpu_ms": round(1e3 * median(cpu for cpu, _ in values), 1)}
            result[what] |= {f"{side}_images_per_s": round(case.batch / median(wall for _, wall in values), 1)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy-steps", type=int, default=150, help="0: leave accuracies out")
    parser.add_argument("--small", action="store_true", help="one repeat of a few steps, to try it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases:
        case, repeats, accuracy_steps = CASES[name], options.repeats, options.accuracy_steps
        if options.small:
            case, repeats, accuracy_steps = case._replace(steps=2), 1, 2
        # With workers, both sides make the same batches as without.
        print(json.dumps(compare(name, case, repeats, 0 if case.workers else accuracy_steps)), flush=True)


if __name__ == "__main__":
    main()
