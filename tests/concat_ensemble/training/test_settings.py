"""No setting is accepted and ignored: each script reads it, or refuses it before the first step."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from concat_ensemble.training.distillation import Distillation
from concat_ensemble.training.finetuning import FineTuning
from concat_ensemble.training.loop import create_accelerator
from concat_ensemble.training.recipe import SCHEDULE_FREE, Recipe
from concat_ensemble.training.saving import matches_identity

NETWORK = {"dataset": "digits", "architecture": "resnet10t", "input_size": [1, 32, 32]}
NEEDED = {
    Recipe: NETWORK | {"total_steps": 40},
    Distillation: NETWORK | {"steps": 40, "teachers": ["resnet10t"]},
    FineTuning: {"dataset": "digits", "steps": 40, "model": "folder"},
}
# What reads a field, below concat_ensemble.training.
READ_BY = {
    "images.Images": "dataset dataset_config dataset_revision image_column label_column train_split classes limit "
    "test_size validation_split validation_size streaming augmentation turned batch_size gradient_accumulation "
    "num_workers seed evaluate_every",
    "images._BatchOrder": "aug_repeats",
    "batches.Pixels": "auto_augment crop_scale flip color_jitter input_size mean std",
    "batches.Finish": "random_erasing",
    "objective.Mixing": "mixup cutmix mixup_prob mixup_switch_prob mixup_mode mixup_off",
    "objective.Objective": "label_smoothing bce_loss bce_target_thresh",
    "optimizers": "optimizer learning_rate layer_decay weight_decay betas schedule warmup warmup_lr min_lr",
    "loop": "clip_norm ema_decay gradient_checkpointing mixed_precision compile log_with checkpoint_every output "
    "dist_bn sync_bn save_best",
    "checkpoints": "keep_checkpoints",
    "logbook": "log_every",
    "networks.create_network": "architecture",
    "recipe.NetworkSettings.initial_source": "pretrained initial_checkpoint",
    "planning": "total_steps members baseline_extra wide_model_args wide_steps snapshots seeds members_per_process",
    "distillation": "model_args teachers steps target temperature",
    "finetuning": "model stages head test_split",
    "saving": "license",
}
READERS = {field: place for place, fields in READ_BY.items() for field in fields.split()}
# Values that a script refuses whatever else is set.
REFUSED = {
    Recipe: {},
    FineTuning: {"streaming": True, "turned": True},
    Distillation: {
        "turned": True,
        "label_smoothing": 0.1,
        "bce_loss": True,
        "bce_target_thresh": 0.2,
    },
}


def find(place: str):
    """A module, or what is in it, below concat_ensemble.training."""
    module, *names = place.split(".")
    found = importlib.import_module(f"concat_ensemble.training.{module}")
    for name in names:
        found = getattr(found, name)
    return found.fget if isinstance(found, property) else found


@pytest.mark.parametrize("kind", NEEDED)
def test_every_field_is_read_or_refused_by_every_script(kind):
    for field in dataclasses.fields(kind):
        if field.name in REFUSED[kind]:
            continue
        assert field.name in READERS, f"say what reads {field.name}, or refuse it"
        source = inspect.getsource(find(READERS[field.name]))
        assert re.search(rf"\.{field.name}\b", source), f"{READERS[field.name]} does not read {field.name}"


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind in REFUSED for field in REFUSED[kind]], ids=lambda value: str(value)
)
def test_what_a_script_cannot_use_is_refused(kind, field):
    changes = {field: REFUSED[kind][field]}
    if field == "turned":
        changes["augmentation"] = "scatter"
    if field == "bce_target_thresh":
        changes["bce_loss"] = True
    with pytest.raises(ValueError, match=rf"^({'|'.join(changes)})=.* must be ") as error:
        kind(**NEEDED[kind] | changes)
    assert "\n" not in str(error.value)


STREAM = {"streaming": True}
FREE = {"optimizer": SCHEDULE_FREE}
# For every script: what is set, and the field that cannot be used then.
FOR_ALL = {
    "a policy for scattered images": ({"augmentation": "scatter", "auto_augment": "rand-m9"}, "auto_augment"),
    "a crop without augmentation": ({"augmentation": "none", "crop_scale": [0.5, 1.0]}, "crop_scale"),
    "mirrored scattered images": ({"augmentation": "scatter", "flip": 0.3}, "flip"),
    "color without augmentation": ({"augmentation": "none", "color_jitter": 0.1}, "color_jitter"),
    "color beside a policy": ({"auto_augment": "rand-m9", "color_jitter": 0.1}, "color_jitter"),
    "erased scattered images": ({"augmentation": "scatter", "random_erasing": 0.1}, "random_erasing"),
    "probability without mixing": ({"mixup_prob": 0.5}, "mixup_prob"),
    "no probability of mixing": ({"mixup": 0.5, "mixup_prob": 0.0}, "mixup_prob"),
    "switch without mixing": ({"mixup_switch_prob": 0.1}, "mixup_switch_prob"),
    "switch between one": ({"cutmix": 1.0, "mixup_switch_prob": 0.1}, "mixup_switch_prob"),
    "mode without mixing": ({"mixup_mode": "pair"}, "mixup_mode"),
    "end without mixing": ({"mixup_off": 0.5}, "mixup_off"),
    "average of an average": (FREE | {"ema_decay": 0.9}, "ema_decay"),
    "schedule without one": (FREE | {"schedule": "wsd"}, "schedule"),
    "end of no schedule": (FREE | {"min_lr": 1e-5}, "min_lr"),
    "first rate of its own warm-up": (FREE | {"warmup_lr": 1e-5}, "warmup_lr"),
    "end of a constant": ({"schedule": "constant", "min_lr": 1e-5}, "min_lr"),
    "first rate without warm-up": ({"warmup": 0.0, "warmup_lr": 1e-5}, "warmup_lr"),
    "end above the peak": ({"min_lr": 1.0}, "min_lr"),
    "betas of an optimizer without": ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "betas"),
    "two betas of three": ({"optimizer": "adan", "betas": [0.9, 0.99]}, "betas"),
    "three betas of two": (FREE | {"betas": [0.9, 0.99, 0.999]}, "betas"),
    "quantized optimizer that is not installed": ({"optimizer": "bnbadamw"}, "optimizer"),
    "unknown tracker": ({"log_with": "tensorbord"}, "log_with"),
}
FOR_SOME = {
    "stream, classes": (Recipe, STREAM | {"classes": [0, 1]}, "classes"),
    "stream, limit": (Recipe, STREAM | {"limit": 100}, "limit"),
    "stream, test images": (Recipe, STREAM | {"test_size": 0.1}, "test_size"),
    "stream, validation images": (Distillation, STREAM | {"validation_size": 0.1}, "validation_size"),
    "stream, evaluation": (Recipe, STREAM | {"evaluate_every": 5}, "evaluate_every"),
    "stream, repeated views": (Distillation, STREAM | {"aug_repeats": 3}, "aug_repeats"),
    "held out for nothing": (Recipe, {"validation_size": 0.1}, "validation_size"),
    "threshold of no loss": (FineTuning, {"bce_target_thresh": 0.2}, "bce_target_thresh"),
    "two sources": (Recipe, {"pretrained": True, "initial_checkpoint": "x.pth"}, "initial_checkpoint"),
    "wide network of narrow weights": (Recipe, {"pretrained": True, "wide_steps": 4}, "pretrained"),
    "more steps of no CAT1": (Recipe, {"members": [2], "baseline_extra": 0.5}, "baseline_extra"),
    "another source in model_args": (Recipe, {"model_args": {"pretrained": True}}, "model_args"),
    "a file in model_args": (Distillation, {"model_args": {"checkpoint_path": "x.pth"}}, "model_args"),
    "wide network from the Hub": (Recipe, {"wide_model_args": {"pretrained": True}}, "model_args"),
    "architecture of the Hub": (Distillation, {"architecture": "hf-hub:timm/resnet18"}, "architecture"),
    "temperature of features": (Distillation, {"temperature": 3.0}, "temperature"),
}
CASES = {f"{name}, {kind.__name__}": (kind, *case) for name, case in FOR_ALL.items() for kind in NEEDED} | FOR_SOME


@pytest.mark.parametrize("case", CASES)
def test_what_another_setting_leaves_without_use_is_refused(case):
    kind, changes, field = CASES[case]
    with pytest.raises(ValueError, match=rf"{field}\b") as error:
        kind(**NEEDED[kind] | changes)
    message = str(error.value)
    assert message.startswith(field) and "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize("kind", NEEDED)
@pytest.mark.parametrize(
    "changes", [STREAM, FREE, {"augmentation": "none"}, {"warmup": 0.0}, {"schedule": "constant"}]
)
def test_a_default_that_is_stated_passes(kind, changes):
    if changes == STREAM and kind is FineTuning:
        return
    settings = kind(**kind.defaults() | NEEDED[kind] | changes)
    assert dataclasses.asdict(settings) == kind.defaults() | NEEDED[kind] | changes


def test_trackers_that_are_not_installed_are_refused():
    for tracker in map(str, LOGGER_TYPE_TO_CLASS):
        if importlib.util.find_spec(tracker) is None:
            with pytest.raises(ValueError, match=f"log_with='{tracker}' must be a tracker that is installed"):
                Recipe(**NEEDED[Recipe], log_with=tracker)


LAUNCHED = {
    "another precision": ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision=bf16 must be .*mixed_precision=no"),
    "compilation": ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend=inductor.*compile=False"),
    "parts of batches": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps=4"),
    "sharded weights": ("ACCELERATE_USE_FSDP", "true", "--use_fsdp must be left out"),
    "sharded weights of another kind": ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed must be left out"),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_the_launcher_must_ask_for_what_the_recipe_says(case, monkeypatch):
    variable, value, message = LAUNCHED[case]
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        create_accelerator(Recipe(**NEEDED[Recipe]), cpu=True)


def test_what_launcher_and_recipe_both_say_is_done(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert create_accelerator(Recipe(**NEEDED[Recipe], mixed_precision="bf16"), cpu=True).mixed_precision == "bf16"


def test_a_result_from_before_a_field_existed_counts_as_having_its_default(tmp_path):
    def store(settings, *lacking: str) -> Path:
        identity = {key: value for key, value in settings.identity.items() if key not in lacking}
        (tmp_path / "training.json").write_text(json.dumps({"identity": identity}))
        return tmp_path

    old, changed = Recipe(**NEEDED[Recipe]), Recipe(**NEEDED[Recipe], bce_loss=True)
    assert matches_identity(store(old, "bce_loss", "crop_scale", "warmup_lr"), old.identity, old)
    with pytest.raises(ValueError, match="its bce_loss is false, here true"):
        matches_identity(store(old, "bce_loss"), changed.identity, changed)
    with pytest.raises(ValueError, match="its bce_loss is true, here false"):
        matches_identity(store(changed), old.identity, old)
    tuned = FineTuning(**NEEDED[FineTuning])
    assert matches_identity(store(tuned, "layer_decay"), tuned.identity, tuned), "0.75 there, null elsewhere"
