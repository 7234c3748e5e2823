"""The order of the training images, and what each network sees of them."""

import itertools
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image
from hypothesis import given
from hypothesis import strategies as st

from concat_ensemble import load_data
from concat_ensemble.data.images import decode_image
from concat_ensemble.training import streams
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.images import Images, _BatchOrder
from concat_ensemble.training.recipe import Settings
from concat_ensemble.training.streams import _Parts

GREY = Pixels((1, 32, 32), (0.5,), (0.5,))
CROPPED = {"dataset": "digits", "augmentation": "timm", "batch_size": 8, "limit": 40}


def first(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a.indices == b.indices
        and all(torch.equal(v, w) and torch.equal(x, y) for (v, x), (w, y) in zip(a.views, b.views, strict=True))
        for a, b in pairs
    )


@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 20),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 3),
    seed=st.integers(0, 99),
    start=st.integers(0, 30),
)
def test_the_order_depends_on_seed_and_step_alone(size, batch, accumulation, processes, seed, start):
    settings = Settings(dataset="digits", batch_size=batch, gradient_accumulation=accumulation)

    def order(shard, first_step):
        return _BatchOrder(size, settings, shard=shard, seed=seed, first_step=first_step)

    orders = [order((rank, processes), 0) for rank in range(processes)]
    per_epoch = size // min(batch, size)
    parts = [first(order, per_epoch * accumulation) for order in orders]
    seen = [place for mine in parts for part in mine for place in part]
    assert {epoch for epoch, _ in seen} == {0}
    assert len(seen) == len(set(seen)) == per_epoch * min(batch, size), (
        "each image of a batch goes to one process, once"
    )
    later = first(order((0, processes), start), accumulation)
    assert later == first(orders[0], (start + 1) * accumulation)[start * accumulation :]


@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 20),
    repeats=st.integers(2, 4),
    processes=st.integers(1, 3),
    start=st.integers(0, 30),
)
def test_repeated_views_go_to_different_processes(size, batch, repeats, processes, start):
    settings = Settings(dataset="digits", batch_size=batch, aug_repeats=repeats)

    def order(shard, first_step=0):
        return _BatchOrder(size, settings, shard=shard, seed=3, first_step=first_step)

    per_epoch = size // min(batch, size)
    shares = [first(order((rank, processes)), per_epoch) for rank in range(processes)]
    whole = [place for part in first(order((0, 1)), per_epoch) for place in part]
    assert sorted(place for mine in shares for part in mine for place in part) == sorted(whole)
    assert len(whole) == len(set(whole)) == per_epoch * min(batch, size), "as many views in an epoch as without"
    images = [index for _, index, _ in whole]
    assert len(set(images)) == -(-len(whole) // repeats) and images == sorted(images, key=images.index)
    if processes == repeats and size >= batch and batch % repeats == 0:
        owners = {place[2] for part in shares[0] for place in part}
        assert owners == {0}, "each process has one view of every image"
    later = first(order((0, processes), start), 1)
    assert later == first(order((0, processes)), start + 1)[start:]


def test_repeated_views_of_an_image_are_augmented_apart():
    batch = next(Images(Settings(**CROPPED, aug_repeats=2), GREY).batches([1]))
    images, labels = batch.views[0]
    assert batch.indices[::2] == batch.indices[1::2] and torch.equal(labels[::2], labels[1::2])
    assert all(not torch.equal(one, other) for one, other in zip(images[::2], images[1::2], strict=True))


@pytest.mark.parametrize("field", ["dataset_config", "dataset_revision"])
def test_what_only_a_dataset_on_the_hub_has_is_refused(field, tmp_path):
    for name in ("digits", "scattered:digits", str(tmp_path)):
        with pytest.raises(ValueError, match=f"{field}='x' must be left out.*which is not on the Hub"):
            Images(Settings(**{"dataset": name, field: "x"}), GREY)


def test_a_canvas_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match=r"input_size=\[1, 32, 48\] must be a square with augmentation=scatter"):
        Images(Settings(**CROPPED | {"augmentation": "scatter"}), Pixels((1, 32, 48), (0.5,), (0.5,)))


@pytest.mark.parametrize("settings", [CROPPED, CROPPED | {"num_workers": 2}, CROPPED | {"augmentation": "scatter"}])
def test_images_and_crops_depend_on_seed_and_step_alone(settings):
    images = Images(Settings(**settings), GREY)
    whole = first(images.batches([3, 4]), 7)
    torch.rand(5), np.random.rand(5)  # whatever else draws from the global generators
    assert same(first(images.batches([3, 4], 4), 3), whole[4:])
    assert not same(first(images.batches([5, 4]), 1), whole[:1])


def test_workers_change_nothing():
    alone, helped = (first(Images(Settings(**CROPPED, num_workers=n), GREY).batches([1]), 6) for n in (0, 2))
    assert same(alone, helped)


@pytest.mark.parametrize("augmentation", ["timm", "scatter"])
def test_each_network_has_its_own_view_of_the_same_images(augmentation):
    images = Images(Settings(**CROPPED | {"augmentation": augmentation}), GREY)
    (batch,) = first(images.batches([1, 2]), 1)
    (one, labels), (other, same_labels) = batch.views
    assert one.shape == other.shape == (8, 1, 32, 32) and torch.equal(labels, same_labels)
    assert not torch.equal(one, other)
    assert torch.equal(labels, images.train_labels[batch.indices])
    ((alone, _),) = first(images.batches([1]), 1)[0].views
    assert torch.equal(alone, one), "the first network's view does not depend on the other networks"


def test_the_global_generators_are_left_alone():
    images = Images(Settings(**CROPPED), GREY)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first(images.batches([1]), 3)
    assert torch.equal(torch.rand(3), expected)


def test_validation_images_are_training_images_without_evaluation():
    settings = {"dataset": "digits", "limit": 100, "validation_size": 0.2}
    watched, unwatched = (Images(Settings(**settings, evaluate_every=n), GREY) for n in (5, 0))
    assert unwatched.size == watched.size + len(watched.labels("validation"))
    ((view,), labels), *_ = watched.held_out(16)
    assert view.shape == (16, 1, 32, 32) and torch.equal(labels, torch.tensor(watched.labels("validation")[:16]))


def test_the_error_for_a_batch_that_cannot_be_shared_evenly_names_it():
    with pytest.raises(ValueError, match=r"batch_size=8 must be a multiple of 3 processes x gradient_accumulation=1"):
        Images(Settings(**CROPPED), GREY, (0, 3))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two files of 30 images, one for each of two workers."""
    folder = tmp_path_factory.mktemp("stream")
    split = load_data("digits", limit=60)["train"].cast(
        Features(image=Image(), label=ClassLabel(names=list("0123456789")))
    )
    for number in range(2):
        split.select(range(30 * number, 30 * number + 30)).to_parquet(folder / f"train-{number}.parquet")
    return f"parquet:{folder}"


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stream_continues_where_it_stopped(parquet, workers):
    settings = CROPPED | {"dataset": parquet, "streaming": True, "limit": None, "num_workers": workers}
    whole = first(Images(Settings(**settings), GREY).batches([1, 2]), 9)  # 72 images: into the second epoch
    for step in (1, 2, 5):  # workers give parts in turn, so that one may be ahead of the other
        position = json.loads(json.dumps(whole[step - 1].position))
        again = Images(Settings(**settings), GREY).batches([1, 2], step, position=position)
        assert same(first(again, 9 - step), whole[step:])
    assert len({tuple(batch.indices) for batch in whole}) > 1 and whole[0].views[0][0].shape == (8, 1, 32, 32)


def test_the_error_for_a_stream_of_fewer_files_than_workers_names_both(parquet):
    settings = CROPPED | {"dataset": parquet, "streaming": True, "limit": None, "num_workers": 3}
    with pytest.raises(ValueError, match=r"num_workers=3 must be at most 2"):
        next(Images(Settings(**settings), GREY).batches([1]))


@pytest.mark.parametrize(("step", "before", "now"), [(1, (1, 1), (2, 1)), (3, (2, 1), (1, 1)), (2, (1, 2), (1, 1))])
def test_a_stream_is_continued_by_as_many_workers_and_processes(parquet, step, before, now):
    """Workers and processes then and now. After one step, the position of one worker looks like that of another."""
    settings = CROPPED | {"dataset": parquet, "streaming": True, "limit": None}

    def open_stream(workers, processes):
        return Images(Settings(**settings, num_workers=workers), GREY, (0, processes))

    position = first(open_stream(*before).batches([1]), step)[-1].position
    text = f"num_workers={now[0]} in {now[1]} processes cannot continue.*had {before[1]} processes of {before[0]} work"
    with pytest.raises(ValueError, match=text):
        next(open_stream(*now).batches([1], step, position=position))


def test_a_stream_reads_on_without_what_it_has_read(parquet, monkeypatch):
    """The time to the first part does not grow with the step: of the images before it, none is read again."""
    monkeypatch.setattr(streams, "BLOCK", 8)
    settings = Settings(**CROPPED | {"dataset": parquet, "streaming": True, "limit": None, "gradient_accumulation": 2})
    whole = first(Images(settings, GREY).batches([1]), 14)
    images, decoded = Images(settings, GREY), []
    monkeypatch.setattr(streams, "decode_image", lambda row, name: decoded.append(name) or decode_image(row, name))
    read, rows = [], _Parts._rows
    monkeypatch.setattr(_Parts, "_rows", lambda self, worker: (read.append(r) or r for r in rows(self, worker)))
    again = images.batches([1], 6, position=whole[11].position)
    assert same(first(again, 2), whole[12:]) and len(decoded) == len(read) == 8


def test_labels_are_the_turns_which_differ_between_networks():
    images = Images(Settings(dataset="digits", augmentation="scatter", batch_size=64, limit=80, turned=True), GREY)
    assert len(images.class_names) == 4
    (batch,) = first(images.batches([3, 4]), 1)
    (one, turns), (_, others) = batch.views
    assert set(turns.tolist()) == {0, 1, 2, 3} and not torch.equal(turns, others)
    plain = Images(Settings(dataset="digits", augmentation="scatter", batch_size=64, limit=80), GREY)
    grey = plain._in_memory[batch.indices]
    for quarters in range(4):  # placed upright again, an image is most like itself as it was
        turned_back = one[turns == quarters].rot90(-quarters, (2, 3)).flatten(1)
        upright = torch.nn.functional.interpolate(grey[turns == quarters], 32).flatten(1)
        assert torch.corrcoef(torch.stack([turned_back.mean(0), upright.mean(0)]))[0, 1] > 0.3


@pytest.mark.parametrize("other", [{"augmentation": "none"}, {"augmentation": "scatter", "evaluate_every": 5}])
def test_turns_need_scattered_images_and_no_evaluation(other):
    with pytest.raises(ValueError, match=r"turned=True needs augmentation=scatter"):
        Settings(dataset="digits", turned=True, **other)


def test_pretraining_does_not_stop_at_a_hidden_test_split(tmp_path, images):
    """ImageNet's labels of the test split are -1."""
    named = ClassLabel(names=["a", "b"])
    known = images(["a", "b"] * 20).cast_column("label", named)
    known.to_parquet(tmp_path / "train.parquet")
    known.select(range(10)).to_parquet(tmp_path / "validation.parquet")
    hidden = images([""] * 6).remove_columns("label").add_column("label", [-1] * 6, feature=named)
    hidden.to_parquet(tmp_path / "test.parquet")
    settings = Settings(**CROPPED | {"dataset": str(tmp_path), "classes": None, "limit": None, "evaluate_every": 5})
    loaded = Images(settings, GREY, with_test=False)
    assert set(loaded.data) == {"train", "validation"} and (loaded.size, len(loaded.data["validation"])) == (40, 10)
    with pytest.raises(ValueError, match=r"the test split's labels are hidden \(-1\)"):
        Images(settings, GREY)
