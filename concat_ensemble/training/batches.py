"""Parts of batches: read and augmented as bytes in worker processes, then normalized and erased on the device, a whole
part at a time, as timm's prefetcher does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import PIL.Image
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from concat_ensemble.modeling.configuration_concat_ensemble import IMAGE_MODES
from concat_ensemble.modeling.image_processing_concat_ensemble import check_resizing, convert_image
from concat_ensemble.training.recipe import NetworkSettings, Settings

Transform = Callable[[PIL.Image.Image], torch.Tensor]
Position = dict[str, Any]  # where a stream stands, as JSON


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

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images of bytes as a network sees them: float32, normalized, channels last in memory."""
        images = images.to(memory_format=torch.channels_last).float().div_(255)
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def create_transform(self, settings: Settings, training: bool) -> Transform:
        """timm's transform from a PIL image to a (C, H, W) tensor of bytes, without what is done on the device."""
        options: dict[str, Any] = {"input_size": self.input_size, "interpolation": self.interpolation}
        options |= {"mean": self.mean, "std": self.std, "use_prefetcher": True}
        if training and settings.augmentation == "timm":
            options |= {"is_training": True, "scale": tuple(settings.crop_scale), "hflip": settings.flip}
            options |= {"color_jitter": settings.color_jitter, "auto_augment": settings.auto_augment}
        else:
            options["crop_pct"] = self.crop_pct
        # timm's return type has also the transforms of options that are not used here.
        return cast(Transform, create_transform(**options))


class Part(NamedTuple):
    """What is read of a batch."""

    draw: tuple[int, ...]  # numbers that distinguish its random draws from those of other parts
    indices: list[int]
    views: list[torch.Tensor]  # (B, C, H, W) bytes for each network
    labels: torch.Tensor  # (B,)
    position: tuple[int, Position] | None = None  # of a stream after this part, and the worker that reads it


@dataclass(frozen=True)
class Batch:
    """A part of a batch as the networks see it."""

    indices: list[int]
    views: list[tuple[torch.Tensor, torch.Tensor]]  # images (B, C, H, W) and labels (B,) for each network
    share: float  # of this process's images of a step
    position: Position | None = None  # of a stream after this part

    def to(self, device: torch.device) -> Batch:
        views = [tuple(tensor.to(device, non_blocking=True) for tensor in view) for view in self.views]
        return replace(self, views=views)


class Augmentation:
    """Images as each network sees them: decoded once, then augmented with the network's seed."""

    def __init__(self, pixels: Pixels, settings: Settings, seeds: Sequence[int], training: bool = True):
        self.mode, self.transform, self.seeds = pixels.mode, pixels.create_transform(settings, training), seeds
        # timm's default, and at least what a random crop takes.
        self.geometry = {"input_size": pixels.input_size, "crop_pct": pixels.crop_pct, "crop_mode": "center"}
        self.checked_sizes: set[tuple[int, int]] = set()

    def __call__(self, images: Iterable[PIL.Image.Image], draws: Iterable[tuple[int, ...]]) -> list[torch.Tensor]:
        """(B, C, H, W) bytes for each seed; `draws` distinguish the random draws of different images."""
        views: list[list[torch.Tensor]] = [[] for _ in self.seeds]
        with keep_random_states():
            for image, draw in zip(images, draws, strict=True):
                if image.size not in self.checked_sizes:
                    check_resizing(image.width, image.height, [self.geometry])
                    self.checked_sizes.add(image.size)
                converted = convert_image(image, self.mode)
                for seed, view in zip(self.seeds, views, strict=True):
                    seed_all(derive_seed(seed, *draw))
                    view.append(self.transform(converted))
        return [torch.stack(view) for view in views]


class Finish:
    """The rest of the augmentation, on the device: normalization, and timm's random erasing."""

    def __init__(self, pixels: Pixels, settings: Settings, seeds: Sequence[int], images_per_step: float):
        self.pixels, self.seeds, self.images_per_step = pixels, seeds, images_per_step
        erases = settings.augmentation == "timm" and settings.random_erasing > 0
        self.probability = settings.random_erasing if erases else 0.0
        self.positions: Position = {}

    def __call__(self, part: Part, device: torch.device) -> Batch:
        views = [self.pixels.normalize(view.to(device, non_blocking=True)) for view in part.views]
        if self.probability:
            erase = RandomErasing(self.probability, device=str(device))
            with keep_random_states():
                for k, seed in enumerate(self.seeds):
                    seed_all(derive_seed(seed, *part.draw))
                    views[k] = erase(views[k])
        if part.position is not None:
            worker, position = part.position
            self.positions = self.positions | {str(worker): position}
        labels = part.labels.to(device, non_blocking=True)
        share = len(part.indices) / self.images_per_step
        return Batch(part.indices, [(view, labels) for view in views], share, self.positions or None)


def prefetch(
    parts: Iterable[Any], device: torch.device, finish: Callable[[Any, torch.device], Batch]
) -> Iterator[Batch]:
    """Finish the parts; on a GPU, the next one in a stream of its own while the networks work on the one before."""
    if device.type != "cuda":
        yield from (finish(part, device) for part in parts)
        return
    stream, ready = torch.cuda.Stream(device), None
    for part in parts:
        with torch.cuda.stream(stream):
            following = finish(part, device)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for view in following.views:
            for tensor in view:  # else its memory could be used again before the networks have read it
                tensor.record_stream(torch.cuda.current_stream(device))
        ready = following


@contextmanager
def keep_random_states() -> Iterator[None]:
    """Restore the states of the generators that `seed_all` seeds."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(seed: int) -> None:
    """Seed every generator that timm's transforms use. `torch.manual_seed` would seed those of all devices, too, which
    takes four hundred times as long."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    entropy: Any = numbers
    if max(numbers) < 2**32:  # then NumPy need not split them, which takes as long as the rest
        entropy = np.array(numbers, np.uint32)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
