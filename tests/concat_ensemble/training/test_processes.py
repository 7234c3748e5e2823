"""What several processes of one training share. The processes are forked, which saves the seconds of their imports."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from timm.models import save_for_hf

from concat_ensemble import load_data
from concat_ensemble.training import distillation
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.distillation import Distillation, Teachers, create_student
from concat_ensemble.training.images import Images
from concat_ensemble.training.logbook import read_log
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.recipe import Recipe

GREY = Pixels((1, 32, 32), (0.5,), (0.5,))
BATCH_NORM = {"architecture": "resnet10t", "model_args": {"in_chans": 1, "channels": [4, 4, 8, 8], "stem_width": 4}}
NO_BATCH_NORM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"in_chans": 1, "img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2},
}
BASE = {
    "dataset": "digits",
    "limit": 40,
    "augmentation": "none",
    "input_size": [1, 32, 32],
    "total_steps": 3,
    "members": [1],
    "batch_size": 16,
    "warmup": 0.0,
    "optimizer": "momentum",
    "learning_rate": 0.5,
    "log_every": 1,
    **NO_BATCH_NORM,
}


def in_processes(count: int, function: Callable[[int], object], folder: Path) -> list:
    """What the function returns in each of several processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            result = function(rank)
        except BaseException as error:
            traceback.print_exc()
            result = error
        torch.save(result, folder / f"result-{rank}")
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(count)]


def train(
    folder: Path, shard: tuple[int, int] = (0, 1), *, at_step: Callable[[int], None] = lambda step: None, **changes
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights of a network after a few steps, and the loss of each step."""
    recipe = Recipe(**BASE | changes)
    images = Images(recipe, GREY, shard, with_test=False)
    set_seed(0)
    network = timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args)
    accelerator = create_accelerator(recipe, cpu=True)
    log = folder / "net.csv"
    options = {"folder": folder / "checkpoints", "identity": {}, "name": "run", "logs": [log]}
    loop = Loop(accelerator, recipe, [network], steps=recipe.total_steps, **options)
    for step in loop.run(partial(images.batches, [0]), Objective(recipe), stops=range(1, recipe.total_steps)):
        at_step(step)
    (saved,) = loop.networks_to_save()
    weights = {key: tensor.detach().clone() for key, tensor in saved.state_dict().items()}
    loop.finish()
    return weights, [row["loss"] for row in read_log(log)]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each batch is all images, in one part."""
    return train(tmp_path_factory.mktemp("whole"), limit=21, batch_size=64)


def count_images(**changes) -> int:
    return Images(Recipe(**BASE | changes), GREY, with_test=False).size


@pytest.mark.parametrize("parts", [2, 4])
def test_uneven_parts_give_the_mean_over_the_images_of_a_step(parts, whole, tmp_path):
    assert count_images(limit=21) % parts, "the parts are of different sizes"
    weights, losses = train(tmp_path, limit=21, batch_size=64, gradient_accumulation=parts)
    assert_close(weights, whole[0])
    assert losses == pytest.approx(whole[1], rel=1e-4), "the loss that is logged is the mean over the images, too"


def test_uneven_parts_on_two_processes_give_the_mean_over_the_images_of_a_step(whole, tmp_path):
    results = in_processes(
        2, lambda rank: train(tmp_path, (rank, 2), limit=21, batch_size=64, gradient_accumulation=2), tmp_path
    )
    for weights, losses in results:
        assert_close(weights, whole[0])
        assert losses == pytest.approx(whole[1], rel=1e-4), "the loss of all processes"


def test_the_processes_of_a_step_see_as_many_images_as_are_counted():
    for shard, parts in itertools.product(((0, 1), (1, 2)), (1, 2)):
        recipe = Recipe(**BASE | {"limit": 20, "batch_size": 64, "gradient_accumulation": parts})
        seen = set()
        for rank in range(shard[1]):
            images = Images(recipe, GREY, (rank, shard[1]), with_test=False)
            step = list(itertools.islice(images.batches([0]), parts))
            assert {len(part.indices) for part in step} <= images.part_sizes
            seen |= {index for part in step for index in part.indices}
        assert len(seen) == images.images_per_step == images.size < recipe.batch_size


def test_fewer_images_than_parts_are_refused():
    recipe = Recipe(**BASE | {"limit": 5, "batch_size": 64, "gradient_accumulation": 16})
    with pytest.raises(ValueError, match=r"\d+ training images cannot be shared by 1 processes x grad.*16 parts"):
        Images(recipe, GREY, with_test=False)


def test_batchnorms_statistics_are_the_mean_over_processes(tmp_path):
    """After one step from running means of 0, they are a tenth of the means over the halves of the batch."""
    changes = BATCH_NORM | {"total_steps": 1, "warmup": 0.0, "limit": 40}
    (tmp_path / "alone").mkdir()

    def compare(rank: int) -> list[dict[str, torch.Tensor]]:
        kinds = {"reduce": {}, "broadcast": {"dist_bn": "broadcast"}, "average": {"ema_decay": 0.5}}
        found = [train(tmp_path / name, (rank, 2), **changes | kind)[0] for name, kind in kinds.items()]
        free = {"optimizer": "schedulefree_adamw", "learning_rate": 1e-3}
        return [*found, train(tmp_path / "free", (rank, 2), **changes | free)[0]]

    first, second = in_processes(2, compare, tmp_path)
    whole, _ = train(tmp_path / "alone", **changes)
    key = "conv1.0.weight"
    assert torch.equal(first[0][key], second[0][key])
    # The mean of two equal halves is that of the whole batch; the first convolution sees no other BatchNorm.
    for weights in (first[0], second[0], first[2]):
        torch.testing.assert_close(weights["conv1.1.running_mean"], whole["conv1.1.running_mean"])
    assert not torch.allclose(first[1]["conv1.1.running_mean"], whole["conv1.1.running_mean"]), "of the first alone"
    names = [name for name in whole if "running" in name]
    for kind in (0, 2, 3):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in names)
    assert not all(torch.equal(first[1][name], second[1][name]) for name in names)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_in_the_next_step_and_they_continue(tmp_path):
    changes = BATCH_NORM | {"total_steps": 5, "ema_decay": 0.9, "learning_rate": 0.1, "gradient_accumulation": 2}
    changes |= {"augmentation": "timm", "random_erasing": 0.5}

    def send(rank: int, step: int) -> None:
        if (rank, step) == (1, 1):
            signal.raise_signal(signal.SIGTERM)

    def interrupt(rank: int) -> tuple:
        whole = train(tmp_path / "whole", (rank, 2), **changes)
        with pytest.raises(SystemExit) as ended:
            train(tmp_path / "cut", (rank, 2), at_step=partial(send, rank), **changes)
        there = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
        return ended.value.code, there, whole[0], train(tmp_path / "cut", (rank, 2), **changes)[0]

    for code, there, whole, again in in_processes(2, interrupt, tmp_path):
        assert code == 128 + signal.SIGTERM and there == ["step-00000002"]
        assert all(torch.equal(whole[key], again[key]) for key in whole), "bit for bit"


@pytest.mark.slow
def test_teachers_statistics_are_those_of_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(distillation, "STATISTICS_BATCHES", 2)
    fields = {key: value for key, value in BASE.items() if key not in ("total_steps", "members")}
    teacher = tmp_path / "teacher"
    network = timm.create_model("resnet10t", num_classes=0, **BATCH_NORM["model_args"])
    save_for_hf(network, str(teacher), model_args=BATCH_NORM["model_args"], safe_serialization=True)

    def measure(rank: int, count: int = 2, **changes) -> tuple[torch.Tensor, torch.Tensor]:
        settings = Distillation(**fields | {"teachers": [str(teacher)], "steps": 1} | changes)
        accelerator = create_accelerator(settings, cpu=True)
        images, teachers = Images(settings, GREY, (rank, count), with_test=False), Teachers(settings)
        create_student(settings, images, teachers, accelerator)
        return teachers.mean, teachers.scale

    first, second = in_processes(2, measure, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for alone in (measure(0, 1), measure(0, 1, gradient_accumulation=2)):
        for a, b in zip(first, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_continue_their_streams(workers, tmp_path):
    """Each reads its own two of four files, in several epochs."""
    split = load_data("digits", limit=40)["train"].cast(
        Features(image=ImageFeature(), label=ClassLabel(names=list("0123456789")))
    )
    for number in range(4):
        split.select(range(10 * number, 10 * number + 10)).to_parquet(tmp_path / f"train-{number}.parquet")
    changes = {"dataset": f"parquet:{tmp_path}", "streaming": True, "limit": None, "num_workers": workers}
    changes |= {"total_steps": 7, "gradient_accumulation": 2, "batch_size": 16}

    def send(rank: int, step: int) -> None:
        if (rank, step) == (0, 3):
            signal.raise_signal(signal.SIGTERM)

    def interrupt(rank: int) -> tuple:
        whole, _ = train(tmp_path / "whole", (rank, 2), **changes)
        with pytest.raises(SystemExit):
            train(tmp_path / "cut", (rank, 2), at_step=partial(send, rank), **changes)
        return whole, train(tmp_path / "cut", (rank, 2), **changes)[0]

    for whole, again in in_processes(2, interrupt, tmp_path):
        assert all(torch.equal(whole[key], again[key]) for key in whole)
