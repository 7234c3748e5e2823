"""The loop, on real digits and tiny networks: interruptions, and what is saved."""

import dataclasses
import json
import multiprocessing
import os
import signal
from functools import partial

import pytest
import timm
import torch
from accelerate.utils import set_seed
from torch import nn

from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.images import Images
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.objective import Objective
from concat_ensemble.training.recipe import Recipe
from concat_ensemble.training.signals import Signals, outlive_signals
from tests.concat_ensemble.training.conftest import SMALL

GREY = Pixels((1, 32, 32), (0.5,), (0.5,))
BASE = SMALL | {
    "total_steps": 12,
    "batch_size": 16,
    "warmup": 0.25,
    "checkpoint_every": 3,
}
VARIANTS = {
    "plain": {},
    "schedule-free": {"optimizer": "schedulefree_adamw"},
    "moving average": {"ema_decay": 0.9},
    "mixup": {"mixup": 0.5, "cutmix": 0.5, "mixup_prob": 0.9, "mixup_off": 0.6, "bce_loss": True},
    "drop path": {"model_args": BASE["model_args"] | {"drop_path_rate": 0.3}},
    "accumulation": {"gradient_accumulation": 2, "clip_norm": 1.0, "aug_repeats": 3},
    "two together": {"members_per_process": 2, "members": [2]},
    "timm's augmentation, workers": {
        "augmentation": "timm",
        "auto_augment": "rand-m9-mstd0.5",
        "num_workers": 2,
        "random_erasing": 0.3,
    },
    "bf16": {"mixed_precision": "bf16"},
    "cycles": {"snapshots": 3},
}


class Cut(Exception):
    """Stands for a kill within one process."""


def cut() -> None:
    raise Cut


def loop_of_one(recipe, folder, **options) -> tuple[nn.Module, Loop]:
    """A new network and the loop that trains it."""
    network = timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args)
    accelerator = create_accelerator(recipe, cpu=True)
    return network, Loop(accelerator, recipe, [network], folder=folder, identity={}, name="run", **options)


@pytest.fixture
def trained(tmp_path):
    """`trained(cut_at=None, **changes)`: the weights at each stop; interrupted before the part `cut_at` of a batch."""

    def trained(cut_at=None, by=cut, folder="run", **changes) -> list[dict[str, torch.Tensor]]:
        recipe = Recipe(**BASE | changes)
        images = Images(recipe, GREY)
        count = recipe.members_per_process
        networks = []
        for seed in range(count):
            set_seed(seed)
            networks.append(timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args))
        loop = Loop(
            create_accelerator(recipe, cpu=True),
            recipe,
            networks,
            steps=recipe.total_steps,
            folder=tmp_path / folder,
            identity=recipe.identity,
            name="run",
            cycles=max(recipe.snapshots, 1),
        )

        def batches(step, *place):
            for number, part in enumerate(images.batches(range(count), step, *place, steps=recipe.total_steps)):
                if number == cut_at:
                    by()
                yield part

        weights = []
        for _ in loop.run(batches, Objective(recipe), stops=loop.cycle_ends):
            weights += [
                {k: v.detach().clone() for k, v in network.state_dict().items()} for network in loop.networks_to_save()
            ]
        loop.finish()
        return weights

    return trained


def equal(one, other) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interruption_changes_nothing(variant, trained, tmp_path):
    changes = VARIANTS[variant]
    whole = trained(folder="whole", **changes)
    parts = changes.get("gradient_accumulation", 1)
    with pytest.raises(Cut):
        trained(cut_at=8 * parts, **changes)
    saved = [path.name for path in sorted((tmp_path / "run").iterdir())]
    assert saved == ["step-00000003", "step-00000006"], "the last two"
    with pytest.raises(Cut):
        trained(cut_at=5 * parts, **changes)  # counted from step 6: the second cut
    again = trained(**changes)
    assert equal(again[-1:], whole[-1:]) and not (tmp_path / "run").exists()
    if variant != "cycles":  # there the first stops are behind the last checkpoint
        assert equal(again, whole)


def test_the_first_of_two_networks_is_the_one_that_is_trained_alone(trained):
    one, other = trained(members_per_process=2, members=[2])
    assert not torch.equal(one["conv1.0.weight"], other["conv1.0.weight"])
    assert equal([one], trained(folder="alone")), "its images, their augmentation and order"


def test_a_schedule_free_network_is_saved_with_averaged_weights_and_their_statistics(tmp_path):
    recipe = Recipe(**BASE | {"optimizer": "schedulefree_adamw", "learning_rate": 0.05})
    images = Images(recipe, GREY)
    set_seed(0)
    network, loop = loop_of_one(recipe, tmp_path / "run", steps=12)
    for _ in loop.run(partial(images.batches, [0]), Objective(recipe)):
        trained = {key: value.detach().clone() for key, value in network.named_parameters()}
        moving = network.bn1.running_mean.clone()
        (saved,) = loop.networks_to_save()
    assert not saved.training
    averaged = dict(saved.named_parameters())
    assert not torch.equal(trained["conv1.0.weight"], averaged["conv1.0.weight"]), (
        "the average, not where the steps are taken"
    )
    assert not torch.equal(moving, saved.bn1.running_mean)
    copy = timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args)
    copy.load_state_dict(saved.state_dict())
    for module in copy.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    copy.train()
    with torch.no_grad():
        for _, batch in zip(range(50), images.batches([0], 12), strict=False):
            copy(batch.views[0][0])
    torch.testing.assert_close(copy.bn1.running_mean, saved.bn1.running_mean, rtol=1e-4, atol=1e-6)


def test_cycles_start_at_the_peak_and_end_near_zero(tmp_path):
    recipe = Recipe(**BASE | {"total_steps": 27, "snapshots": 4, "warmup": 0.1})
    images, rates = Images(recipe, GREY), []
    _, loop = loop_of_one(recipe, tmp_path / "run", steps=27, cycles=4)
    assert loop.cycle_ends == [9, 15, 21, 27]
    for step in loop.run(partial(images.batches, [0]), Objective(recipe), stops=range(1, 27)):
        rates.append(loop.optimizers[0].param_groups[0]["lr"])  # of the step after this one
        assert step == len(rates)
    peak = recipe.learning_rate
    assert rates[2] == peak and [rates[end - 1] for end in (9, 15, 21)] == [peak] * 3, "each cycle starts at the peak"
    assert all(rates[end - 2] < 0.1 * peak for end in (9, 15, 21)), "and ends near zero"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_the_exit(number, trained, tmp_path, capsys):
    whole = trained(folder="whole")
    with pytest.raises(SystemExit) as ended:
        trained(cut_at=4, by=lambda: signal.raise_signal(number))
    assert ended.value.code == 128 + number
    assert f"ended by {number.name} after step 5, which is saved" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "step-00000005" / "training.json").read_text())["step"] == 5
    assert equal(trained(), whole)


def test_the_error_for_a_loss_that_is_not_finite_names_the_step_and_its_images(trained, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"run: the loss of network 0 is (nan|inf) at step \d+, images \d+.*lower learning_rate=1e\+30",
    ):
        trained(learning_rate=1e30, warmup=0.0)
    assert not list((tmp_path / "run").glob("step-00000006")), "no checkpoint after it"


def test_a_checkpoint_of_another_training_is_refused_and_stays(trained, tmp_path):
    with pytest.raises(Cut):
        trained(cut_at=4)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(
        ValueError,
        match=r"step-00000003 is of another training: its weight_decay is 0.05, here 0.1.*name another output=",
    ):
        trained(weight_decay=0.1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    with pytest.raises(Cut):
        trained(cut_at=4)
    (tmp_path / "run" / "step-00000003" / "training.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"step-00000003 has no readable training.json.*name another output=, or delete"
    ):
        trained()


def test_every_setting_belongs_to_the_identity_or_to_the_place():
    one = Recipe(**BASE)
    other = dataclasses.replace(
        one, output="elsewhere", num_workers=3, checkpoint_every=7, keep_checkpoints=1, log_with=None
    )
    assert one.identity == other.identity != dataclasses.replace(one, seed=1).identity


def test_networks_in_one_pass_share_one_scale_of_fp16_and_train_as_alone(tmp_path):
    """accelerate has no scale on the CPU; this one grows in every second step, between no two optimizers of a step."""

    def train(seeds: list[int], scale: float | None, clip_norm: float | None) -> list[dict[str, torch.Tensor]]:
        recipe = Recipe(**BASE | {"total_steps": 6, "clip_norm": clip_norm})
        images, networks = Images(recipe, GREY), []
        for seed in seeds:
            set_seed(seed)
            networks.append(timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args))
        accelerator = create_accelerator(recipe, cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        loop = Loop(accelerator, recipe, networks, steps=6, folder=tmp_path, identity={}, name="run")
        for _ in loop.run(lambda *place: images.batches([0] * len(seeds), *place), Objective(recipe)):
            weights = [network.state_dict() for network in loop.networks_to_save()]
        loop.finish()
        if scale is not None:
            assert accelerator.scaler.get_scale() == 8 * scale, "it grew with the steps, not with the networks"
        return weights

    for clip_norm in (0.1, None):  # without one, the second network took its step in another scale
        together = train([0, 1], 1024.0, clip_norm)
        assert equal(together, train([0], None, clip_norm) + train([1], None, clip_norm)), "powers of two are exact"


@pytest.mark.parametrize(
    ("change", "message"), [({"mixed_precision": "fp16"}, "bf16"), ({"sync_bn": True}, "dist_bn")]
)
def test_what_needs_a_gpu_is_refused_without_one(change, message):
    with pytest.raises(ValueError, match=rf"{next(iter(change))}=\w+ needs .*GPU.*{message}"):
        create_accelerator(Recipe(**BASE | change), cpu=True)


def test_a_number_of_parts_that_the_launcher_sets_is_refused(monkeypatch):
    """accelerate would divide each loss by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4 must be left out"):
        create_accelerator(Recipe(**BASE), cpu=True)


def test_a_signal_after_the_last_step_ends_when_the_networks_are_saved(tmp_path, capsys):
    recipe, handler = Recipe(**BASE | {"total_steps": 2}), signal.getsignal(signal.SIGTERM)
    images = Images(recipe, GREY)
    _, loop = loop_of_one(recipe, tmp_path / "run", steps=2)
    for _ in loop.run(partial(images.batches, [0]), Objective(recipe)):
        signal.raise_signal(signal.SIGTERM)
        loop.networks_to_save()
    signal.raise_signal(signal.SIGTERM)  # while results are computed
    with pytest.raises(SystemExit) as ended:
        loop.finish()
    assert ended.value.code == 128 + signal.SIGTERM and not (tmp_path / "run").exists()
    assert "ended by SIGTERM after the last step; the networks are saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler


def test_workers_outlive_a_signal_to_all_processes(trained, tmp_path):
    """As Ctrl-C and scancel send it; only their training ends them."""
    changes = {"augmentation": "timm", "num_workers": 2, "total_steps": 6}

    def signal_all() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        trained(cut_at=2, by=signal_all, **changes)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    fork = multiprocessing.get_context("fork")
    is_ready = fork.Event()
    worker = fork.Process(target=_work, args=(is_ready,), daemon=True)
    worker.start()
    assert is_ready.wait(60)
    worker.terminate()  # as at the end of a training
    worker.join(10)
    assert worker.exitcode is not None


def _work(is_ready) -> None:
    outlive_signals(0)
    is_ready.set()
    signal.pause()


def test_processes_whose_launcher_is_dead_end_as_after_a_signal(monkeypatch):
    assert not Signals(), "without a launcher"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signals = Signals()
    assert not signals
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert signals and signals.received == [signal.SIGHUP]
