"""The seeds of random draws, and the bytes that they give, do not change with how fast they are made."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concat_ensemble.training.batches import Augmentation, Pixels, derive_seed, seed_all
from concat_ensemble.training.recipe import Settings

PIXELS = Pixels((3, 32, 32), (0.5,) * 3, (0.5,) * 3)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_a_seed_is_that_of_numpys_sequence(numbers):
    """Also of numbers that have more than 32 bits."""
    assert derive_seed(*numbers) == np.random.SeedSequence(numbers).generate_state(1)[0]


def test_views_are_those_of_timms_transform_after_seeding_by_hand():
    settings = Settings(dataset="digits", augmentation="timm", auto_augment="rand-m9-mstd0.5", color_jitter=0.4)
    images = [Image.effect_noise((40 + k, 50), 60).convert("RGB") for k in range(4)]
    draws = [(1, k) for k in range(4)]
    views = Augmentation(PIXELS, settings, [3, 5])(images, draws)
    transform = PIXELS.create_transform(settings, training=True)
    for seed, view in zip((3, 5), views, strict=True):
        for image, draw, got in zip(images, draws, view, strict=True):
            seed_all(int(np.random.SeedSequence((seed, *draw)).generate_state(1)[0]))
            assert got.dtype == torch.uint8 and torch.equal(got, transform(image))


def test_each_size_is_checked_also_after_others():
    augmentation = Augmentation(PIXELS, Settings(dataset="digits", augmentation="timm"), [0])
    small, long = Image.new("RGB", (40, 40)), Image.new("RGB", (1, 300_000))
    augmentation([small, small], [(0, 0), (0, 1)])
    for _ in range(2):
        with pytest.raises(ValueError, match="to resize 1x300000 pixels"):
            augmentation([small, long], [(0, 0), (0, 1)])
