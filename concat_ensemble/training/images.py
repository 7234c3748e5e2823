"""Training images, in an order that is a function of the seed and the step alone: a run that was killed goes on with the very images, crops
and noise that it would have seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from datasets import concatenate_datasets
from datasets.distributed import split_dataset_by_node
from timm.data import create_transform
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from concat_ensemble.data.images import decode_image, read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.data.loading import load_data, load_stream
from concat_ensemble.data.scattered import Scatter
from concat_ensemble.modeling.configuration_concat_ensemble import IMAGE_MODES
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.training.recipe import Settings

BUFFER = 10_000  # images of a stream that are shuffled among each other


@dataclass(frozen=True)
class Pixels:
    """What a network takes."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @property
    def mode(self) -> str:
        return IMAGE_MODES[self.input_size[0]]

    def transform(self, settings: Settings, training: bool):
        """timm's, from a PIL image to (C, H, W)."""
        common = {
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
        }
        if not training or settings.augmentation != "timm":
            return create_transform(**common, crop_pct=self.crop_pct)
        return create_transform(
            **common,
            is_training=True,
            scale=tuple(settings.crop_scale),
            hflip=settings.flip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.auto_augment,
            re_prob=settings.random_erasing,
        )


@dataclass(frozen=True)
class Batch:
    """A part of a batch: which images they are, and these as each network sees them."""

    numbers: list[int]
    views: list[tuple[torch.Tensor, torch.Tensor]]  # (B, C, H, W) and (B,) for each network that trains on it


class Images:
    """The images of a training run.

    Args:
        settings: Of the run.
        pixels: What the networks take.
        share: (rank, processes) of this process's team: each gets its part of every batch.
        few: Keep so many at most, for a trial.
    """

    def __init__(self, settings: Settings, pixels: Pixels, share: tuple[int, int] = (0, 1), few: int | None = None):
        self.settings, self.pixels, self.share = settings, pixels, share
        parts = share[1] * settings.gradient_accumulation
        if settings.batch_size % parts:
            raise ValueError(
                f"batch_size={settings.batch_size} cannot be shared evenly by {share[1]} processes x "
                f"gradient_accumulation={settings.gradient_accumulation}."
            )
        if settings.streaming:
            self.stream = load_stream(
                settings.dataset,
                config=settings.dataset_config,
                revision=settings.dataset_revision,
                image_column=settings.image_column,
                label_column=settings.label_column,
                split=settings.train_split,
            )
            self.names, self.data = class_names(self.stream), {}
            return
        data = load_data(
            settings.dataset,
            config=settings.dataset_config,
            revision=settings.dataset_revision,
            image_column=settings.image_column,
            label_column=settings.label_column,
            train_split=settings.train_split,
            classes=settings.classes,
            limit=min(filter(None, (settings.limit, few)), default=None),
            test_size=settings.test_size,
            validation_size=settings.validation_size,
            seed=settings.seed,
        )
        self.data, self.split = data, data["train"]
        if not settings.evaluate_every:  # nobody looks at the validation images: they are trained on, too
            self.split = concatenate_datasets([data["train"], data["validation"]])
        self.names, self.size = class_names(self.split), len(self.split)
        self.labels = torch.as_tensor(read_labels(self.split))
        if settings.augmentation == "scatter":
            self._grey = torch.stack([self._placeable(n) for n in range(self.size)])
        if settings.turned:
            self.names = [f"turned by {90 * quarters} degrees" for quarters in range(4)]

    def batches(self, seeds: Sequence[int], first_step: int = 0) -> Iterator[Batch]:
        """Parts of batches without end, from that of step `first_step` on: `gradient_accumulation` of them for each step.

        The first seed draws the order of the images, which all networks share; each network's own seed draws its augmentation
        and its order within the batch.
        """
        if self.settings.streaming:
            yield from self._streamed(seeds, first_step)
            return
        order = _Order(
            self.size, self.settings.batch_size, self.settings.gradient_accumulation, self.share, seeds[0], first_step
        )
        if self.settings.augmentation == "scatter":
            for part in order:
                yield self._scattered(part, seeds)
            return
        loader = DataLoader(
            _Views(self.split, self.pixels, self.pixels.transform(self.settings, training=True), seeds),
            batch_sampler=order,
            num_workers=self.settings.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.settings.num_workers > 0,
            generator=torch.Generator(),  # its own: the global one belongs to the networks
        )
        for numbers, views, labels in loader:
            yield Batch(numbers, [(view, labels) for view in views])

    def held_out(self, batch_size: int, split: str = "validation") -> DataLoader:
        """([images], labels) of the validation or test split, as networks see them when they are used."""
        if split not in self.data:
            raise ValueError(
                f"there is no {split} split to evaluate on: a streamed dataset has images for training alone; set evaluate_every=0."
            )
        views = _Views(self.data[split], self.pixels, self.pixels.transform(self.settings, training=False), [0])
        return DataLoader(
            [(0, number) for number in range(len(self.data[split]))],
            batch_size,
            collate_fn=lambda places: _collate([views[place] for place in places])[1:],
        )

    def labels(self, split: str) -> np.ndarray:
        return read_labels(self.data[split])

    def _placeable(self, number: int) -> torch.Tensor:
        return pil_to_tensor(convert_image(read_image(self.split, number), self.pixels.mode)).float() / 255

    def _scattered(self, part: list[tuple[int, int]], seeds: Sequence[int]) -> Batch:
        numbers = [number for _, number in part]
        generator, views = torch.Generator(), []
        for seed in seeds:
            generator.manual_seed(_mixed(seed, *part[0]))
            grey, labels = self._grey[numbers], self.labels[numbers]
            if self.settings.turned:
                labels = torch.randint(4, (len(numbers),), generator=generator)
                grey = torch.stack([image.rot90(k, (1, 2)) for image, k in zip(grey, labels.tolist(), strict=True)])
            placed = Scatter(size=self.pixels.input_size[1], generator=generator)(grey)
            views.append(((placed - self.pixels.mean[0]) / self.pixels.std[0], labels))
        return Batch(numbers, views)

    def _streamed(self, seeds: Sequence[int], first_step: int) -> Iterator[Batch]:
        rank, processes = self.share
        stream = split_dataset_by_node(self.stream.shuffle(seed=seeds[0], buffer_size=BUFFER), rank, processes)
        workers = max(self.settings.num_workers, 1)
        if stream.num_shards < workers:
            raise ValueError(
                f"num_workers={workers}: this process's part of the stream has {stream.num_shards} files; lower it."
            )
        size = self.settings.batch_size // (processes * self.settings.gradient_accumulation)
        transform = self.pixels.transform(self.settings, training=True)
        # Parts come from the workers in turn, beginning with the first one.
        rounds, done = divmod(first_step * self.settings.gradient_accumulation, workers)
        parts = _Stream(stream, size, rounds, self.pixels, transform, seeds)
        loader = DataLoader(parts, batch_size=None, num_workers=self.settings.num_workers, generator=torch.Generator())
        for numbers, views, labels in itertools.islice(loader, done, None):
            yield Batch(numbers, [(view, labels) for view in views])


class _Order:
    """Lists of (epoch, image): this process's parts of every batch, from that of step `first_step` on. Each epoch is a permutation of its own;
    what does not fill a batch is left out of it.
    """

    def __init__(self, size: int, batch: int, accumulation: int, share: tuple[int, int], seed: int, first_step: int):
        self.size, self.batch, self.seed, self.first_step = size, min(batch, size), seed, first_step
        self.mine = range(share[0], accumulation * share[1], share[1])
        self.parts = accumulation * share[1]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.size // self.batch
        epoch = -1
        for step in itertools.count(self.first_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            start = step % per_epoch * self.batch
            parts = np.array_split(order[start : start + self.batch], self.parts)
            for number in self.mine:
                yield [(epoch, int(image)) for image in parts[number]]


class _Views(TorchDataset):
    """An image as each of the networks sees it in an epoch: decode_image once, augmented for each anew."""

    def __init__(self, split, pixels: Pixels, transform, seeds: Sequence[int]):
        self.split, self.pixels, self.transform, self.seeds = split, pixels, transform, seeds

    def __getitem__(self, place: tuple[int, int]):
        epoch, number = place
        image = convert_image(read_image(self.split, number), self.pixels.mode)
        return number, _seen(image, self.transform, self.seeds, epoch, number), self.split[number]["label"]


class _Stream(IterableDataset):
    """Parts of batches from a stream, the first `skip` of each worker left out: these images are read past, not decode_image."""

    def __init__(self, stream, size: int, skip: int, pixels: Pixels, transform, seeds: Sequence[int]):
        self.stream, self.size, self.skip, self.pixels = stream, size, skip, pixels
        self.transform, self.seeds = transform, seeds

    def __iter__(self):
        examples = self._examples()
        while True:
            yield _collate(list(itertools.islice(examples, self.size)))

    def _examples(self):
        worker = get_worker_info()  # datasets itself gives each worker files of its own
        number = 0
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            for example in self.stream:
                if number >= self.skip * self.size:
                    image = convert_image(
                        decode_image(example["image"], f"image {number} of the stream"), self.pixels.mode
                    )
                    drawn = (worker.id if worker else 0, number)
                    yield number, _seen(image, self.transform, self.seeds, *drawn), example["label"]
                number += 1


def _seen(image: PIL.Image.Image, transform, seeds: Sequence[int], *drawn: int) -> list[torch.Tensor]:
    views = []
    for seed in seeds:
        with _randomness(_mixed(seed, *drawn)):
            views.append(transform(image))
    return views


def _collate(examples) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    numbers, views, labels = zip(*examples, strict=True)
    return list(numbers), [torch.stack(view) for view in zip(*views, strict=True)], torch.tensor(labels)


@contextmanager
def _randomness(seed: int):
    """All the generators that timm's transforms draw from, seeded; afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
