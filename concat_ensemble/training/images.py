"""Training images in an order that depends on the seed and the step alone: a run that was killed continues with the
same images, crops and noise.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets import IterableDataset as Stream
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
from concat_ensemble.modeling.image_processing_concat_ensemble import check_resizing, convert_image
from concat_ensemble.training.recipe import NetworkSettings, Settings

BUFFER = 10_000  # a stream is shuffled within a buffer of this many images
Transform = Callable[[PIL.Image.Image], torch.Tensor]
Shard = tuple[int, int]  # rank, number of processes


@dataclass(frozen=True)
class Pixels:
    """The input of a network."""

    input_size: tuple[int, int, int]  # C, H, W
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @classmethod
    def from_settings(cls, settings: NetworkSettings) -> Pixels:
        channels, height, width = settings.input_size
        mean, std = (tuple(values * (channels // len(values))) for values in (settings.mean, settings.std))
        return cls((channels, height, width), mean, std)

    @property
    def mode(self) -> str:
        """The image mode, such as RGB."""
        return IMAGE_MODES[self.input_size[0]]

    def create_transform(self, settings: Settings, training: bool) -> Transform:
        """timm's transform from a PIL image to a (C, H, W) tensor."""
        options: dict[str, Any] = {"input_size": self.input_size, "interpolation": self.interpolation}
        options |= {"mean": self.mean, "std": self.std}
        if training and settings.augmentation == "timm":
            options |= {"is_training": True, "scale": tuple(settings.crop_scale), "hflip": settings.flip}
            options |= {"color_jitter": settings.color_jitter, "auto_augment": settings.auto_augment}
            options |= {"re_prob": settings.random_erasing}
        else:
            options["crop_pct"] = self.crop_pct
        # timm's return type has also the transforms of options that are not used here.
        return cast(Transform, create_transform(**options))


@dataclass(frozen=True)
class Batch:
    """A part of a batch: indices of its images, and the images as each network sees them."""

    indices: list[int]
    views: list[tuple[torch.Tensor, torch.Tensor]]  # images (B, C, H, W) and labels (B,) for each network


class Images:
    """The images of a training run. This process gets its part of every batch: `shard` is its rank in its team, and
    the number of processes there. `max_images` is a further limit for each split, for a trial. `with_test` says
    whether the test images are needed too.

    Raises:
        ValueError: if a batch cannot be shared evenly.
    """

    def __init__(
        self,
        settings: Settings,
        pixels: Pixels,
        shard: Shard = (0, 1),
        max_images: int | None = None,
        *,
        with_test: bool = True,
    ):
        self.settings, self.pixels, self.shard = settings, pixels, shard
        if settings.batch_size % (shard[1] * settings.gradient_accumulation):
            parts = f"{shard[1]} processes x gradient_accumulation={settings.gradient_accumulation}"
            raise ValueError(f"batch_size={settings.batch_size} must be a multiple of {parts}; change one of them.")
        source: dict[str, Any] = {"config": settings.dataset_config, "revision": settings.dataset_revision}
        source |= {"image_column": settings.image_column, "label_column": settings.label_column}
        if settings.streaming:
            self.stream = load_stream(settings.dataset, split=settings.train_split, **source)
            self.class_names, self.data = class_names(self.stream), DatasetDict()
            return
        self.data = load_data(
            settings.dataset,
            **source,
            train_split=settings.train_split,
            classes=settings.classes,
            limit=min(filter(None, (settings.limit, max_images)), default=None),
            test_size=settings.test_size,
            validation_size=settings.validation_size,
            seed=settings.seed,
            for_training=not with_test,
        )
        self.split = self.data["train"]
        if not settings.evaluate_every:  # then the validation images are training images too
            self.split = concatenate_datasets([self.data["train"], self.data["validation"]])
        self.class_names, self.size = class_names(self.split), len(self.split)
        self.train_labels = torch.as_tensor(read_labels(self.split))
        if settings.augmentation == "scatter":
            self._images = torch.stack([self._read(index) for index in range(self.size)])
        if settings.turned:
            self.class_names = [f"turned by {90 * quarters} degrees" for quarters in range(4)]

    @property
    def identity(self) -> dict:
        """What distinguishes one training set from another: its classes and the label of every image."""
        if self.settings.streaming:
            return {"classes": self.class_names, "streamed": True}
        digest = hashlib.sha256(self.train_labels.numpy().tobytes()).hexdigest()[:16]
        return {"classes": self.class_names, "images": self.size, "labels_sha256": digest}

    def batches(self, seeds: Sequence[int], first_step: int = 0) -> Iterator[Batch]:
        """Parts of batches without end, from step `first_step` on: `gradient_accumulation` parts for each step. There
        is one seed for each network's augmentation; the first one also determines the order of the images.
        """
        settings = self.settings
        if settings.streaming:
            yield from self._stream_batches(seeds, first_step)
            return
        order = _BatchOrder(self.size, settings, shard=self.shard, seed=seeds[0], first_step=first_step)
        if settings.augmentation == "scatter":
            for part in order:
                yield self._scatter(part, seeds)
            return
        loader = DataLoader(
            _Views(self.split, _Augmentation(self.pixels, settings, seeds)),
            batch_sampler=order,
            num_workers=settings.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=settings.num_workers > 0,
            generator=torch.Generator(),  # the global generator is for the networks
        )
        for indices, views, labels in loader:
            yield Batch(indices, [(view, labels) for view in views])

    def held_out(self, batch_size: int, split: str = "validation") -> DataLoader:
        """([images], labels) of the validation or test split, with the transform for evaluation."""
        if split not in self.data:
            raise ValueError(f"a streamed dataset has no {split} split to evaluate on; set evaluate_every=0.")
        views = _Views(self.data[split], _Augmentation(self.pixels, self.settings, [0], training=False))
        places = [(0, index) for index in range(len(self.data[split]))]
        return DataLoader(
            places,  # pyright: ignore[reportArgumentType] (torch takes any sequence)
            batch_size,
            collate_fn=lambda places: _collate([views[place] for place in places])[1:],
        )

    def labels(self, split: str) -> np.ndarray:
        return read_labels(self.data[split])

    def _read(self, index: int) -> torch.Tensor:
        """A training image with values in [0, 1]."""
        return pil_to_tensor(convert_image(read_image(self.split, index), self.pixels.mode)).float() / 255

    def _scatter(self, part: list[tuple[int, int]], seeds: Sequence[int]) -> Batch:
        indices = [index for _, index in part]
        generator, views = torch.Generator(), []
        for seed in seeds:
            generator.manual_seed(_derive_seed(seed, *part[0]))
            images, labels = self._images[indices], self.train_labels[indices]
            if self.settings.turned:
                labels = torch.randint(4, (len(indices),), generator=generator)
                turned = [image.rot90(k, (1, 2)) for image, k in zip(images, labels.tolist(), strict=True)]
                images = torch.stack(turned)
            placed = Scatter(size=self.pixels.input_size[1], generator=generator)(images)
            views.append(((placed - self.pixels.mean[0]) / self.pixels.std[0], labels))
        return Batch(indices, views)

    def _stream_batches(self, seeds: Sequence[int], first_step: int) -> Iterator[Batch]:
        rank, processes = self.shard
        stream = split_dataset_by_node(self.stream.shuffle(seed=seeds[0], buffer_size=BUFFER), rank, processes)
        workers = max(self.settings.num_workers, 1)
        if stream.num_shards < workers:
            files = f"{stream.num_shards}, the number of files that this process streams"
            raise ValueError(f"num_workers={workers} must be at most {files}.")
        size = self.settings.batch_size // (processes * self.settings.gradient_accumulation)
        augmentation = _Augmentation(self.pixels, self.settings, seeds)
        # The loader takes a part from each worker in turn, beginning with the first one.
        rounds, rest = divmod(first_step * self.settings.gradient_accumulation, workers)
        parts = _Stream(stream, augmentation, size=size, skip=rounds)
        loader = DataLoader(parts, batch_size=None, num_workers=self.settings.num_workers, generator=torch.Generator())
        for indices, views, labels in itertools.islice(loader, rest, None):
            yield Batch(indices, [(view, labels) for view in views])


class _BatchOrder:
    """Lists of (epoch, image): this process's parts of every batch, from step `first_step` on. Each epoch is another
    permutation; the images at its end that do not fill a batch are left out.
    """

    def __init__(self, size: int, settings: Settings, *, shard: Shard, seed: int, first_step: int):
        self.size, self.batch, self.seed, self.first_step = size, min(settings.batch_size, size), seed, first_step
        self.parts = settings.gradient_accumulation * shard[1]
        self.own_parts = range(shard[0], self.parts, shard[1])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.size // self.batch
        epoch = -1
        for step in itertools.count(self.first_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            start = step % per_epoch * self.batch
            parts = np.array_split(order[start : start + self.batch], self.parts)
            for number in self.own_parts:
                yield [(epoch, int(index)) for index in parts[number]]


class _Augmentation:
    """An image as each network sees it: decoded once, then augmented with the network's seed."""

    def __init__(self, pixels: Pixels, settings: Settings, seeds: Sequence[int], training: bool = True):
        self.mode, self.transform, self.seeds = pixels.mode, pixels.create_transform(settings, training), seeds
        # timm's default, and at least what a random crop takes.
        self.geometry = {"input_size": pixels.input_size, "crop_pct": pixels.crop_pct, "crop_mode": "center"}

    def __call__(self, image: PIL.Image.Image, *numbers: int) -> list[torch.Tensor]:
        """One view for each seed; `numbers` distinguish the random draws of different images."""
        check_resizing(image.width, image.height, [self.geometry])
        image, views = convert_image(image, self.mode), []
        for seed in self.seeds:
            with _seed_all(_derive_seed(seed, *numbers)):
                views.append(self.transform(image))
        return views


class _Views(TorchDataset):
    """The views of an image in an epoch."""

    def __init__(self, split: Dataset, augmentation: _Augmentation):
        self.split, self.augmentation = split, augmentation

    def __getitem__(self, place: tuple[int, int]):
        epoch, index = place
        views = self.augmentation(read_image(self.split, index), epoch, index)
        return index, views, self.split[index]["label"]


class _Stream(IterableDataset):
    """Parts of `size` images from a stream. Each worker leaves out its first `skip` parts without decoding them."""

    def __init__(self, stream: Stream, augmentation: _Augmentation, *, size: int, skip: int):
        self.stream, self.augmentation, self.size, self.skip = stream, augmentation, size, skip

    def __iter__(self):
        examples = self._examples()
        while True:
            yield _collate(list(itertools.islice(examples, self.size)))

    def _examples(self):
        worker = get_worker_info()  # datasets gives each worker its own files
        worker_id = worker.id if worker else 0
        number = 0
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            for example in self.stream:
                if number >= self.skip * self.size:
                    image = decode_image(example["image"], f"image {number} of the stream")
                    yield number, self.augmentation(image, worker_id, number), example["label"]
                number += 1


def _collate(examples) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    indices, views, labels = zip(*examples, strict=True)
    return list(indices), [torch.stack(view) for view in zip(*views, strict=True)], torch.tensor(labels)


@contextmanager
def _seed_all(seed: int) -> Iterator[None]:
    """Seed every generator that timm's transforms use, and restore their states afterwards."""
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


def _derive_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
