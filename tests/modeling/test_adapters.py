"""Adapters of PEFT: saved beside the ensemble that they were trained on, and loaded with it."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel, assemble

torch.set_num_threads(1)

KINDS = ("vit-tiny", "resnet18")
CLASSIFIER = ConcatEnsembleForImageClassification
LAYERS = ["qkv", "layer4.1.conv2"]  # linear and convolutional


def lora(**settings):
    return LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False, **settings)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def base(build, tmp_path):
    """A folder with an ensemble that has a head."""
    torch.manual_seed(0)
    build(*KINDS, cls=CLASSIFIER, num_labels=3)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def rows(noise, base):
    pixels = noise(CLASSIFIER.from_pretrained(base), 8)
    return [{"pixel_values": image, "labels": n % 3} for n, image in enumerate(pixels)]


@torch.no_grad()
def output(model, noise):
    result = model.eval()(noise(model))
    return result.pooler_output if result.logits is None else result.logits


@pytest.mark.parametrize(
    "cls, auto", [(CLASSIFIER, AutoModelForImageClassification), (ConcatEnsembleModel, AutoModel)]
)
def test_an_adapter_is_saved_alone_and_loaded_with_its_base(base, noise, tmp_path, cls, auto):
    before, files = output(cls.from_pretrained(base), noise), digests(base)
    model = cls.from_pretrained(base)
    model.add_adapter(lora())
    after = output(model, noise)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(digests(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert digests(base) == files and not torch.equal(before, after)
    for loaded in (cls.from_pretrained(tmp_path / "adapter"), auto.from_pretrained(tmp_path / "adapter")):
        assert torch.equal(output(loaded, noise), after)
        loaded.disable_adapters()
        assert torch.equal(output(loaded, noise), before)
    assert torch.equal(output(cls.from_pretrained(base), noise), before)


def test_an_adapter_saved_into_its_bases_folder_leaves_the_base_as_it_is(base, noise):
    files, model = digests(base), CLASSIFIER.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(base)
    assert files.items() <= digests(base).items() and (base / "adapter_config.json").is_file()
    assert torch.equal(output(AutoModelForImageClassification.from_pretrained(base), noise), output(model, noise))


def test_an_adapter_of_an_ensemble_that_is_nowhere_saved_takes_it_along(build, noise, tmp_path):
    model, _ = build(*KINDS, cls=CLASSIFIER, num_labels=3)
    plain = output(model, noise)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path)
    for cls in (CLASSIFIER, AutoModelForImageClassification):
        loaded = cls.from_pretrained(tmp_path)
        assert torch.equal(output(loaded, noise), output(model, noise))
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(output(CLASSIFIER.from_pretrained(tmp_path), noise), plain)


def test_a_new_head_over_members_is_not_lost_with_an_adapter(build, noise, tmp_path):
    build(*KINDS)[0].save_pretrained(tmp_path / "base")
    model = CLASSIFIER.from_pretrained(tmp_path / "base", num_labels=5)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, noise), output(model, noise))


@pytest.mark.parametrize("method", ["pissa", "olora", "gaussian"])
def test_an_adapter_that_changed_its_base_when_it_was_made(base, rows, noise, tmp_path, method):
    model = CLASSIFIER.from_pretrained(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=method))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    pixels, labels = (torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("pixel_values", "labels"))
    model.train()(pixels, labels=labels).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = CLASSIFIER.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, noise), output(model, noise))


def test_two_adapters_are_saved_one_by_one(base, noise, tmp_path):
    model, outputs = CLASSIFIER.from_pretrained(base), {}
    for name in ("first", "second"):
        model.add_adapter(lora(), name)
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = output(model, noise)
        model.save_pretrained(tmp_path / name)
    assert not torch.equal(*outputs.values())
    loaded = CLASSIFIER.from_pretrained(tmp_path / "first")
    loaded.load_adapter(tmp_path / "second", "second")
    for adapter, name in (("default", "first"), ("second", "second")):
        loaded.set_adapter(adapter)
        assert torch.equal(output(loaded, noise), outputs[name])


def test_a_network_whose_own_layers_are_called_as_those_of_peft(noise, tmp_path):
    torch.manual_seed(0)
    build = timm.create_model("dla46_c", num_classes=0, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    assemble([build]).save_pretrained(tmp_path / "base")
    model = ConcatEnsembleModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["base_layer.0", "root.conv"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert len(digests(tmp_path / "adapter")) == 2
    loaded = ConcatEnsembleModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, noise), output(model, noise))
    model.name_or_path = ""  # as if the base were nowhere saved
    model.save_pretrained(tmp_path / "both")
    loaded = ConcatEnsembleModel.from_pretrained(tmp_path / "both")
    assert torch.equal(output(loaded, noise), output(model, noise))


def test_some_members_with_an_adapter(base, noise, tmp_path):
    model = ConcatEnsembleModel.from_pretrained(base, active_members=[0])
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = ConcatEnsembleModel.from_pretrained(tmp_path / "adapter", active_members=[0])
    assert torch.equal(output(loaded, noise), output(model, noise))


def test_trainer_saves_resumes_and_loads_an_adapter(base, rows, noise, tmp_path):
    def trainer(model, **arguments):
        settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}
        settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True} | arguments
        return Trainer(model, TrainingArguments(tmp_path / "run", **settings), train_dataset=rows)

    def adapted():
        torch.manual_seed(0)
        model = CLASSIFIER.from_pretrained(base)
        model.add_adapter(lora(modules_to_save=["classifier"]))
        return model

    files, model = digests(base), adapted()
    trainer(model).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert "adapter_model.safetensors" in digests(checkpoint) and "config.json" not in digests(checkpoint)
    assert torch.equal(output(CLASSIFIER.from_pretrained(checkpoint), noise), output(model, noise))
    assert not torch.equal(output(CLASSIFIER.from_pretrained(base), noise), output(model, noise))
    assert digests(base) == files


@pytest.mark.parametrize("where", ["add_adapter", "get_peft_model", "by hand"])
def test_batchnorm_statistics_stay_while_an_adapter_is_trained(base, rows, where):
    model = CLASSIFIER.from_pretrained(base)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if where == "add_adapter":
        model.add_adapter(lora())
    elif where == "get_peft_model":
        get_peft_model(model, lora()).train()
    else:
        model.members.requires_grad_(False)
    model.train()
    model(torch.stack([row["pixel_values"] for row in rows]))
    buffers = {name.replace(".base_layer", ""): buffer for name, buffer in model.named_buffers()}
    assert all(torch.equal(buffers[name], before[name]) for name in before) and len(before) > 10


def test_batchnorm_statistics_move_where_its_weights_are_trained(base, rows):
    model = CLASSIFIER.from_pretrained(base).train()
    before = model.members["1"].bn1.running_mean.clone()
    model(torch.stack([row["pixel_values"] for row in rows]))
    assert not torch.equal(model.members["1"].bn1.running_mean, before)


@pytest.mark.parametrize("change", ["statistics", "norm", "head"])
def test_what_training_changed_beside_the_adapter_is_saved_too(base, noise, tmp_path, change):
    model = CLASSIFIER.from_pretrained(base)
    model.add_adapter(lora())
    with torch.no_grad():
        if change == "statistics":
            model.members["1"].layer1[0].bn1.running_var *= 2
        elif change == "norm":
            model.members["0"].norm.bias += 0.1
        else:
            model.classifier.bias += 1
    files, after = digests(base), output(model, noise)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(output(CLASSIFIER.from_pretrained(tmp_path / "adapter"), noise), after)
    with pytest.raises(ValueError, match=r"holds other weights than .*freeze_members"):
        model.save_pretrained(base)
    assert digests(base) == files


def test_pefts_own_model_is_saved_loaded_and_merged(base, noise, tmp_path):
    model = get_peft_model(CLASSIFIER.from_pretrained(base), lora(modules_to_save=["classifier"]))
    after = output(model, noise_of(model, noise))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(CLASSIFIER.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(output(loaded, noise_of(model, noise)), after)
    assert torch.equal(output(CLASSIFIER.from_pretrained(tmp_path / "adapter"), noise), after)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(CLASSIFIER.from_pretrained(tmp_path / "merged"), noise), after)


def noise_of(model, noise):
    pixels = noise(model)
    return lambda _: pixels


def test_what_cannot_be_loaded_again_is_refused_before_anything_is_written(base, noise, tmp_path):
    files, model = digests(base), CLASSIFIER.from_pretrained(base)
    get_peft_model(model, lora())  # changes the model itself
    with pytest.raises(ValueError, match=r"adapters of a model of PEFT, which would be lost; .*merge_and_unload"):
        model.save_pretrained(base)
    with pytest.raises(ValueError, match="merge adapters"):
        assemble([model])
    assert digests(base) == files and not (base / "adapter_config.json").exists()


def test_a_whole_model_is_not_saved_over_an_adapter(base, tmp_path):
    model = CLASSIFIER.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which would be loaded with these weights"):
        CLASSIFIER.from_pretrained(base).save_pretrained(tmp_path / "adapter")


def test_a_missing_weight_of_an_adapter_is_named(base, tmp_path):
    from safetensors.torch import load_file, save_file

    model = CLASSIFIER.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[sorted(weights)[0]]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing"):
        CLASSIFIER.from_pretrained(tmp_path / "adapter")
