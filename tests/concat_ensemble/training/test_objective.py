"""What networks are trained on: mixed images and losses, which are timm's."""

import copy
import dataclasses
import itertools

import pytest
import timm.data
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional

from concat_ensemble.training.batches import Pixels, keep_random_states, seed_all
from concat_ensemble.training.images import Images
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.recipe import Settings

GREY = Pixels((1, 32, 32), (0.5,), (0.5,))
PLAIN = {"dataset": "digits", "limit": 64, "augmentation": "scatter", "batch_size": 16}
MIXED = PLAIN | {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.9, "label_smoothing": 0.1}


def read(images, seeds, count=4, first_step=0, **options) -> list:
    return list(itertools.islice(images.batches(seeds, first_step, **options), count))


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def mixed() -> Images:
    return Images(Settings(**MIXED), GREY)


@pytest.fixture
def loaded(mixed):
    """`loaded(**settings)`: the same images under other settings."""

    def loaded(**settings) -> Images:
        other = copy.copy(mixed)
        other.settings = Settings(**settings)
        return other

    return loaded


def test_mixing_depends_on_seed_and_step_alone(mixed):
    batches = read(mixed, [0, 1])
    torch.rand(3), torch.manual_seed(77)
    again = read(mixed, [0, 1], 2, first_step=2)
    assert all(same(a.views[k], b.views[k]) for a, b in zip(again, batches[2:], strict=True) for k in range(2))
    alone = read(mixed, [0])
    assert all(same(a.views[0], b.views[0]) for a, b in zip(alone, batches, strict=True))
    first, second = ([batch.views[k][1].max(1).values for batch in batches] for k in range(2))
    assert not same(first, second), "each network has its own draws"
    assert not torch.equal(first[0], first[1]), "and each step"


def test_processes_have_draws_of_their_own(loaded):
    images = loaded(**MIXED)
    shares = []
    for rank in range(2):
        images.shard = (rank, 2)
        shares.append([batch.views[0][1].max(1).values for batch in read(images, [0], 3)])
    assert not same(*shares)


def test_mixing_leaves_the_global_generators_alone(mixed):
    with keep_random_states():
        seed_all(5)
        batches, before = mixed.batches([0]), torch.get_rng_state()
        next(batches)
        assert torch.equal(torch.get_rng_state(), before)


def test_images_are_mixed_by_timm_with_soft_labels(mixed, loaded):
    plain = read(loaded(**PLAIN), [0], 3)
    by_class = set()
    for batch, unmixed in zip(read(mixed, [0], 3), plain, strict=True):
        (images, labels), (whole, numbers) = batch.views[0], unmixed.views[0]
        torch.testing.assert_close(labels.sum(1), torch.ones(16))
        own = labels[torch.arange(16), numbers]
        by_class.add(bool((own < 0.9).any()))
        assert torch.equal(images, whole) == (labels.max(1).values > 0.9).all().item()
    assert True in by_class


def test_mixing_ends_after_its_share_of_the_steps(loaded):
    images = loaded(**MIXED | {"mixup_prob": 1.0, "mixup_off": 0.5})
    plain = read(loaded(**PLAIN), [0])
    unmixed = [
        torch.equal(a.views[0][0], b.views[0][0]) for a, b in zip(read(images, [0], steps=4), plain, strict=True)
    ]
    assert unmixed == [False, False, True, True]
    labels = read(images, [0], steps=4)[-1].views[0][1]
    torch.testing.assert_close(labels.max(1).values, torch.full((16,), 0.91))  # smoothed to the end


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_each_mode_is_timms(mode, loaded):
    images = loaded(**PLAIN, mixup=0.5, mixup_mode=mode)
    values = {round(value, 5) for value in read(images, [0], 1)[0].views[0][1].max(1).values.tolist()}
    assert len(values) > 4 if mode != "batch" else len(values) <= 2


def test_turned_images_are_mixed_too():
    images = Images(Settings(**PLAIN, turned=True, mixup=0.5), GREY)
    assert read(images, [0], 1)[0].views[0][1].shape == (16, 4)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [({"batch_size": 15}, "15 in 1"), ({"batch_size": 66}, "65 in 1"), ({"gradient_accumulation": 16}, "16 in 16")],
    ids=str,
)
def test_parts_that_cannot_be_mixed_in_pairs_are_refused(changes, numbers, loaded):
    images = loaded(**PLAIN | changes, cutmix=1.0)
    images.size = 65
    with pytest.raises(ValueError, match=f"even number of images in a part, not {numbers} parts; change batch_size"):
        images.batches([0])


def test_without_mixing_the_loss_is_cross_entropy():
    torch.manual_seed(0)
    network, images, labels = nn.Linear(6, 5), torch.randn(8, 6), torch.randint(5, (8,))
    for smoothing in (0.0, 0.2):
        loss = Objective(Settings(dataset="digits", label_smoothing=smoothing))(network, images, labels)
        torch.testing.assert_close(loss, functional.cross_entropy(network(images), labels, label_smoothing=smoothing))


@pytest.mark.parametrize("mixes", [False, True])
def test_binary_cross_entropy_is_timms(mixes):
    torch.manual_seed(0)
    network, images, labels = nn.Linear(6, 5), torch.randn(8, 6), torch.randint(5, (8,))
    options = {"bce_loss": True, "bce_target_thresh": 0.2, "label_smoothing": 0.1, "mixup": 0.5 * mixes}
    if mixes:
        labels = timm.data.mixup.mixup_target(labels, 5, lam=0.7, smoothing=0.1)
    loss = Objective(Settings(dataset="digits", **options))(network, images, labels)
    expected = BinaryCrossEntropy(0.1, target_threshold=0.2)(network(images), labels)
    hard = labels > 0.2 if mixes else functional.one_hot(labels, 5)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(loss, functional.binary_cross_entropy_with_logits(network(images), hard.float()))


def test_an_ensembles_logits_are_what_the_loss_takes():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    objective, labels = Objective(Settings(dataset="digits")), torch.tensor([0, 2])
    logits = torch.randn(2, 3)
    assert torch.equal(
        objective(lambda _: Output(logits), logits, labels), objective(lambda _: logits, logits, labels)
    )
