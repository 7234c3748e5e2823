"""transformers' Trainer on a few real digits: training, resuming, checkpoints and predictions."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleImageProcessor, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names

STEPS = 6


@pytest.fixture(scope="module")
def digits():
    """Forty digits to train on, twenty to evaluate."""
    data = load_data("digits", limit=40)
    images = {kind: [read_image(data[kind], n) for n in range(size)] for kind, size in (("train", 40), ("test", 20))}
    labels = {kind: list(data[kind]["label"])[: len(images[kind])] for kind in images}
    return images, labels, class_names(data["train"])


@pytest.fixture
def make_trainer(build, digits):
    def make_trainer(folder, *, frozen=True, kinds=("grey", "resnet18"), callbacks=None, **arguments):
        images, labels, names = digits
        torch.manual_seed(0)  # for the new head
        labelled = {"id2label": dict(enumerate(names)), "standardize": True}
        model, _ = build(*kinds, cls=ConcatEnsembleForImageClassification, **labelled)
        processor = ConcatEnsembleImageProcessor.from_config(model.config)
        with torch.no_grad():
            features = model(**processor(images["train"])).pooler_output
        model.feature_mean.copy_(features.mean(0))
        model.feature_scale.copy_(features.std(0) + 1e-3)
        if frozen:
            model.freeze_members()
        rows = {
            kind: [
                {"pixel_values": pixels, "labels": label}
                for pixels, label in zip(processor(images[kind])["pixel_values"], labels[kind], strict=True)
            ]
            for kind in images
        }
        settings = {
            "output_dir": folder,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            **arguments,
        }
        return Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            processing_class=processor,
            callbacks=callbacks,
        )

    return make_trainer


class Stop(TrainerCallback):
    """Stop after half of the steps, like a machine that is preempted."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STEPS // 2


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(make_trainer, tmp_path, frozen):
    unbroken = make_trainer(tmp_path / "unbroken", frozen=frozen)
    unbroken.train()
    stopped = make_trainer(tmp_path / "stopped", frozen=frozen, callbacks=[Stop()])
    stopped.train()
    assert stopped.state.global_step == STEPS // 2
    assert not same(weights(stopped.model), weights(unbroken.model))
    resumed = make_trainer(tmp_path / "stopped", frozen=frozen)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert same(weights(resumed.model), weights(unbroken.model))


def test_frozen_members_and_their_batch_norm_statistics_do_not_change_and_the_head_learns(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=40)
    before = weights(trainer.model)
    trainer.train()
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_members_that_are_not_frozen_learn_too(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, frozen=False, save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    assert not any(torch.equal(value, before[key]) for key, value in trainer.model.named_parameters())


def test_predictions_are_the_logits_and_not_a_tuple(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    predicted = trainer.predict(trainer.eval_dataset)
    assert isinstance(predicted.predictions, np.ndarray) and predicted.predictions.shape == (20, 10)
    pixels = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
    with torch.no_grad():
        np.testing.assert_allclose(predicted.predictions, trainer.model.eval()(pixels).logits, atol=1e-5)
    assert predicted.label_ids.tolist() == [row["labels"] for row in trainer.eval_dataset]
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(predicted.predictions), torch.tensor(predicted.label_ids)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_checkpoint_is_a_folder_as_save_pretrained_writes_it(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert {"member-00.safetensors", "member-01.safetensors", "head.safetensors"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert not (checkpoint / "model.safetensors").exists()
    assert same(weights(AutoModelForImageClassification.from_pretrained(checkpoint)), weights(trainer.model))
    names = json.loads((checkpoint / "config.json").read_text())["id2label"]
    assert names == {str(n): str(n) for n in range(10)}
    assert AutoImageProcessor.from_pretrained(checkpoint).to_dict() == trainer.processing_class.to_dict()


def test_the_processor_in_a_checkpoint_of_an_adapter_is_loaded(make_trainer, digits, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path / "whole")
    lora = peft.LoraConfig(target_modules=r".*layer4.*conv1", modules_to_save=["classifier"])
    arguments = TrainingArguments(
        tmp_path / "adapter", max_steps=1, save_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    processor, rows = trainer.processing_class, trainer.train_dataset
    model = peft.get_peft_model(trainer.model, lora)
    Trainer(model, arguments, train_dataset=rows, processing_class=processor).train()
    checkpoint = tmp_path / "adapter" / "checkpoint-1"
    assert (checkpoint / "adapter_config.json").is_file() and not (checkpoint / "config.json").exists()
    loaded, images = AutoImageProcessor.from_pretrained(checkpoint), digits[0]["test"]
    assert torch.equal(loaded(images)["pixel_values"], processor(images)["pixel_values"])


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 10.0}
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant", metric_for_best_model="eval_loss", **arguments)
    trainer.train()
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert same(weights(trainer.model), weights(best))
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(losses, key=losses.get)}")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_gradient_checkpointing_by_the_trainer_gives_the_same_weights(make_trainer, tmp_path):
    plain = make_trainer(tmp_path / "plain", frozen=False, max_steps=2, save_strategy="no")
    plain.train()
    saving = make_trainer(
        tmp_path / "saving", frozen=False, max_steps=2, save_strategy="no", gradient_checkpointing=True
    )
    saving.train()
    assert saving.model.members["0"].grad_checkpointing and not plain.model.members["0"].grad_checkpointing
    for key, value in plain.model.named_parameters():
        torch.testing.assert_close(saving.model.state_dict()[key], value.detach(), atol=1e-4, rtol=0)
