"""Training images in an order that depends on the seed and the step alone: a run that was killed continues with the
same images, crops and noise.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from concat_ensemble.data.images import decode_image, describe_encoded, read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.data.loading import SCATTERED, load_data, load_stream
from concat_ensemble.data.scattered import Scatter, scatter_split
from concat_ensemble.data.sources import DIGITS, identify_source
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.training.batches import Augmentation, Batch, Finish, Part, Pixels, Position, derive_seed, prefetch
from concat_ensemble.training.objective import Mixing
from concat_ensemble.training.recipe import Settings
from concat_ensemble.training.signals import outlive_signals
from concat_ensemble.training.streams import read_stream

Shard = tuple[int, int]  # rank, number of processes
Place = tuple[int, ...]  # epoch, index of an image and, with aug_repeats, number of its view: the seed of its draws
CPU = torch.device("cpu")
TEST_SIZE = 0.3  # share of the images to test on, where they are needed and the dataset has no test split


class Images:
    """The images of a training run. This process gets its part of every batch: `shard`, which may be set later, is its
    rank in its team and the number of processes there. `max_images` is a further limit for each split, for a trial.
    `with_test` says whether the test images are needed too, of the split `test_split` if it is named; else the test
    split is not looked at, and the images of a validation split are never trained on.

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
        test_split: str | None = None,
    ):
        self.settings, self.pixels, self.shard = settings, pixels, shard
        if settings.augmentation == "scatter" and pixels.input_size[1] != pixels.input_size[2]:
            raise ValueError(f"input_size={list(pixels.input_size)} must be a square with augmentation=scatter.")
        self._check_batches()
        name = settings.dataset.removeprefix(SCATTERED)
        if name == DIGITS or identify_source(name)[0] != "hub":
            settings.refuse(f"with dataset={name}, which is not on the Hub", "dataset_config", "dataset_revision")
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
            validation_split=settings.validation_split,
            test_split=test_split,
            classes=settings.classes,
            limit=min(filter(None, (settings.limit, max_images)), default=None),
            test_size=settings.test_size or (TEST_SIZE if with_test else None),
            validation_size=settings.validation_size,
            seed=settings.seed,
            for_training=not with_test,
            hold_out=with_test or settings.evaluate_every > 0,
        )
        self.split = self.data["train"]
        if with_test and settings.learns_validation:
            self.split = concatenate_datasets([self.data["train"], self.data["validation"]])
        self.class_names, self.size = class_names(self.split), len(self.split)
        if (parts := shard[1] * settings.gradient_accumulation) > self.images_per_step:
            shares = f"{shard[1]} processes x gradient_accumulation={settings.gradient_accumulation}"
            raise ValueError(f"{self.size} training images cannot be shared by {shares}, {parts} parts; use fewer.")
        self.train_labels = torch.as_tensor(read_labels(self.split))
        if settings.augmentation == "scatter":
            self._in_memory = torch.stack([self._read(index) for index in range(self.size)])
        if settings.turned:
            self.class_names = [f"turned by {90 * quarters} degrees" for quarters in range(4)]

    @property
    def identity(self) -> dict:
        """What distinguishes one training set from another: its classes and the label of every image."""
        if self.settings.streaming:
            return {"classes": self.class_names, "streamed": True}
        digest = hashlib.sha256(self.train_labels.numpy().tobytes()).hexdigest()[:16]
        return {"classes": self.class_names, "images": self.size, "labels_sha256": digest}

    def batches(
        self,
        seeds: Sequence[int],
        first_step: int = 0,
        device: torch.device = CPU,
        position: Position | None = None,
        *,
        steps: int | None = None,
    ) -> Iterator[Batch]:
        """Parts of batches without end, from step `first_step` on: `gradient_accumulation` parts for each step. There
        is one seed for each network's augmentation; the first one also determines the order of the images. A stream
        goes on at the `position` of the last part before `first_step`. `steps` of the training are what `mixup_off` is
        a share of.
        """
        self._check_batches()
        batches = self._plain_batches(seeds, first_step, device, position)
        if not self.settings.mixes:
            return batches
        self._check_pairs()
        count = self.settings.gradient_accumulation
        own_parts = range(self.shard[0], count * self.shard[1], self.shard[1])
        places = ((step, number) for step in itertools.count(first_step) for number in own_parts)
        return Mixing(self.settings, seeds, len(self.class_names), steps)(batches, places)

    def _plain_batches(
        self, seeds: Sequence[int], first_step: int, device: torch.device, position: Position | None
    ) -> Iterator[Batch]:
        """Parts of batches whose images are not mixed with each other."""
        if self.settings.augmentation == "scatter":
            order = self._order(seeds, first_step)
            return prefetch((self._scatter(places, seeds) for places in order), device, Batch.to)
        augmentation, pinned = Augmentation(self.pixels, self.settings, seeds), device.type == "cuda"
        if self.settings.streaming:
            count = self.settings.gradient_accumulation
            parts: Iterable[Part] = read_stream(
                self.stream,
                augmentation,
                size=self.settings.batch_size // (self.shard[1] * count),
                workers=self.settings.num_workers,
                shard=self.shard,
                done=first_step * count,
                positions=position,
                pin_memory=pinned,
            )
        else:
            loader: Any = (
                DataLoader  # a batch is a part, which is collated when it is read, as its types do not have it
            )
            parts = loader(
                _Views(self.split, self.train_labels, augmentation),
                batch_sampler=self._order(seeds, first_step),
                num_workers=self.settings.num_workers,
                collate_fn=_as_it_is,
                pin_memory=pinned,
                persistent_workers=self.settings.num_workers > 0,
                worker_init_fn=outlive_signals,
                generator=torch.Generator(),  # the global generator is for the networks
            )
        return prefetch(parts, device, Finish(self.pixels, self.settings, seeds, self._own_images))

    def held_out(self, batch_size: int, split: str = "validation") -> DataLoader:
        """([images], labels) of the validation or test split, with the transform for evaluation. The images are bytes,
        for `Pixels.normalize`. Scattered images have one place each, the same in every evaluation."""
        images = self.data[split]
        if self.settings.augmentation == "scatter":
            images = scatter_split(images, split, self.settings.seed, size=self.pixels.input_size[1])
        augmentation = Augmentation(self.pixels, self.settings, [0], training=False)
        labels = torch.as_tensor(self.labels(split))
        places: Any = [(0, index) for index in range(len(labels))]  # types have row numbers in their place
        return DataLoader(
            _Views(images, labels, augmentation),
            batch_sampler=BatchSampler(places, batch_size, drop_last=False),
            num_workers=self.settings.num_workers,
            collate_fn=operator.attrgetter("views", "labels"),
            worker_init_fn=outlive_signals,
        )

    @property
    def images_per_step(self) -> int:
        """Images of a step on all processes: fewer than a batch if there are not as many."""
        batch = self.settings.batch_size
        return batch if self.settings.streaming else min(batch, self.size)

    @property
    def part_sizes(self) -> set[int]:
        """Numbers of images in the parts of a batch, which differ by one where the images are fewer than a batch."""
        parts = self.shard[1] * self.settings.gradient_accumulation
        smaller, rest = divmod(self.images_per_step, parts)
        return {smaller, smaller + 1} if rest else {smaller}

    @property
    def _own_images(self) -> float:
        return self.images_per_step / self.shard[1]

    def _check_batches(self) -> None:
        """Raise ValueError if a batch cannot be shared evenly."""
        parts = self.shard[1] * self.settings.gradient_accumulation
        if self.settings.batch_size % parts:
            counts = f"{self.shard[1]} processes x gradient_accumulation={self.settings.gradient_accumulation}"
            problem = f"batch_size={self.settings.batch_size} must be a multiple of {counts}"
            raise ValueError(f"{problem}; change one of them.")

    def _check_pairs(self) -> None:
        """Raise ValueError if timm's Mixup, which mixes pairs, would get an odd number of images."""
        images, parts = self.images_per_step, self.shard[1] * self.settings.gradient_accumulation
        if images % (2 * parts):
            problem = f"mixup and cutmix need an even number of images in a part, not {images} in {parts} parts"
            raise ValueError(f"{problem}; change batch_size, or leave mixup and cutmix out.")

    def labels(self, split: str) -> np.ndarray:
        return read_labels(self.data[split])

    def _read(self, index: int) -> torch.Tensor:
        """A training image with values in [0, 1]."""
        return pil_to_tensor(convert_image(read_image(self.split, index), self.pixels.mode)).float() / 255

    def _scatter(self, part: list[Place], seeds: Sequence[int]) -> Batch:
        indices = [place[1] for place in part]
        generator, views = torch.Generator(), []
        for seed in seeds:
            generator.manual_seed(derive_seed(seed, *part[0]))
            images, labels = self._in_memory[indices], self.train_labels[indices]
            if self.settings.turned:
                labels = torch.randint(4, (len(indices),), generator=generator)
                turned = [image.rot90(k, (1, 2)) for image, k in zip(images, labels.tolist(), strict=True)]
                images = torch.stack(turned)
            placed = Scatter(size=self.pixels.input_size[1], generator=generator)(images)
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.pixels.mean, self.pixels.std))
            views.append(((placed - mean) / std, labels))
        return Batch(indices, views, len(indices) / self._own_images)

    def _order(self, seeds: Sequence[int], first_step: int) -> _BatchOrder:
        return _BatchOrder(self.size, self.settings, shard=self.shard, seed=seeds[0], first_step=first_step)


class _BatchOrder:
    """Lists of places: this process's parts of every batch, from step `first_step` on. Each epoch is another
    permutation; the images at its end that do not fill a batch are left out. With `aug_repeats`, each image is there
    so many times in a row, the parts take turns, and an epoch has as many views as it has without (as timm's
    RepeatAugSampler, arXiv:1901.09335).
    """

    def __init__(self, size: int, settings: Settings, *, shard: Shard, seed: int, first_step: int):
        self.size, self.batch, self.seed, self.first_step = size, min(settings.batch_size, size), seed, first_step
        self.repeats = settings.aug_repeats
        self.parts = settings.gradient_accumulation * shard[1]
        self.own_parts = range(shard[0], self.parts, shard[1])

    def __iter__(self) -> Iterator[list[Place]]:
        per_epoch = self.size // self.batch
        epoch = -1
        for step in itertools.count(self.first_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order_epoch(epoch)
            start = step % per_epoch * self.batch
            batch = order[start : start + self.batch]
            parts = [batch[number :: self.parts] for number in range(self.parts)]
            if self.repeats == 1:
                parts = np.array_split(batch, self.parts)
            for number in self.own_parts:
                yield [(epoch, *map(int, place)) for place in parts[number]]

    def _order_epoch(self, epoch: int) -> np.ndarray:
        """(size, 1) images, or (size, 2) images and the number of each one's view."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        if self.repeats == 1:
            return order[:, None]
        images, views = order.repeat(self.repeats), np.tile(np.arange(self.repeats), self.size)
        return np.stack([images, views], 1)[: self.size]


class _Views(TorchDataset):
    """Parts of batches from a split, by the places of their images. Each image is read and decoded once."""

    def __init__(self, split: Dataset, labels: torch.Tensor, augmentation: Augmentation):
        self.split, self.labels, self.augmentation = split.select_columns("image"), labels, augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: Sequence[Place]) -> Part:
        indices = [place[1] for place in places]
        rows = self.split[indices]["image"]
        images = [decode_image(row, describe_encoded(row, index)) for row, index in zip(rows, indices, strict=True)]
        return Part(places[0], indices, self.augmentation(images, places), self.labels[indices])


def _as_it_is(part: Part) -> Part:
    """Parts are collated when they are read."""
    return part
