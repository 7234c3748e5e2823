"""What networks are trained on: timm's mixed images, and its losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from concat_ensemble.training.batches import Batch, derive_seed, keep_random_states, seed_all
from concat_ensemble.training.recipe import Settings

DRAW = 1  # tells the random draws of mixing from those of the same seed for images


class Objective:
    """The loss of a network, timm's: cross-entropy or, with `bce_loss`, binary cross-entropy of each class. Labels are
    class numbers, or (B, classes) where images were mixed, which are smoothed then.
    """

    def __init__(self, settings: Settings):
        smoothing = settings.label_smoothing
        self.loss: nn.Module = SoftTargetCrossEntropy() if settings.mixes else LabelSmoothingCrossEntropy(smoothing)
        if settings.bce_loss:
            self.loss = BinaryCrossEntropy(smoothing, target_threshold=settings.bce_target_thresh)

    def __call__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(read_logits(network(images)), labels)


def read_logits(output: Any) -> torch.Tensor:
    """The (B, classes) logits in the output of a network of timm or transformers."""
    return output if isinstance(output, torch.Tensor) else output.logits


class Mixing:
    """Mix the images of each part of a batch with timm's Mixup. What is drawn depends on the network's seed, the step,
    and the number of the part in it alone.

    Args:
        seeds: One for each network.
        steps: Of the training, the `mixup_off` share of which is mixed; it is mixed to the end when left out.
    """

    def __init__(self, settings: Settings, seeds: Sequence[int], num_classes: int, steps: int | None = None):
        self.seeds = seeds
        self.last_step = float("inf") if steps is None else settings.mixup_off * steps
        self.mixup = Mixup(
            settings.mixup,
            settings.cutmix,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            mode=settings.mixup_mode,
            label_smoothing=settings.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batches: Iterable[Batch], places: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Mix parts of batches, each with its step and its number in it."""
        for batch, (step, number) in zip(batches, places, strict=False):
            self.mixup.mixup_enabled = step < self.last_step
            views = []
            with keep_random_states():
                for seed, (images, labels) in zip(self.seeds, batch.views, strict=True):
                    seed_all(derive_seed(seed, step, number, DRAW))
                    views.append(self.mixup(images, labels))
            yield replace(batch, views=views)
