"""Saving over an ensemble's folder: what cannot be loaded again is refused, and an error leaves the old files."""

import hashlib
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from optimum.quanto import qint8, quantize
from peft import LoraConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModel, QuantoConfig, TorchAoConfig

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel

torch.set_num_threads(1)


@pytest.fixture
def folder(build, tmp_path):
    build("vit-tiny", "resnet18")[0].save_pretrained(tmp_path / "ensemble")
    return tmp_path / "ensemble"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@contextmanager
def largest_file(size: int):
    """As on a full disk, no file may grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1_000, 5_000, 60_000, 500_000])
def test_a_full_disk_leaves_the_old_ensemble(folder, build, noise, size):
    before = digests(folder)
    other, _ = build("resnet18", "vit-small", "vit-tiny")
    with pytest.raises(Exception, match=r"(?i)large|code: 27"), largest_file(size):
        other.save_pretrained(folder)
    assert digests(folder) == before
    ConcatEnsembleModel.from_pretrained(folder)
    other.save_pretrained(folder)
    loaded = ConcatEnsembleModel.from_pretrained(folder)
    assert torch.equal(loaded(noise(other)).pooler_output, other(noise(other)).pooler_output)
    assert not list(folder.glob(".saving-*"))


def test_what_a_killed_process_left_is_removed(folder):
    (folder / ".saving-killed").mkdir()
    (folder / ".saving-killed" / "config.json").write_text("{")
    model = ConcatEnsembleModel.from_pretrained(folder)
    model.save_pretrained(folder)
    assert not list(folder.glob(".*"))


def without_memory(model):
    return {key: tensor.to("meta") for key, tensor in model.state_dict().items()}


def sparse(model):
    return {key: tensor.to_sparse() if tensor.ndim == 2 else tensor for key, tensor in model.state_dict().items()}


def half_of_it(model):
    return dict(list(model.state_dict().items())[::2])


def of_other_shape(model):
    return {key: tensor[:1] if tensor.ndim else tensor for key, tensor in model.state_dict().items()}


def with_more(model):
    return {**model.state_dict(), "members.0.lora_A.weight": torch.ones(2)}


def of_no_member(model):
    return {**model.state_dict(), "members.7.weight": torch.ones(2)}


@pytest.mark.parametrize("change", [without_memory, sparse, half_of_it, of_other_shape, with_more, of_no_member])
def test_a_state_dict_that_could_not_be_loaded_is_refused(folder, build, change):
    model, before = ConcatEnsembleModel.from_pretrained(folder), digests(folder)
    with pytest.raises(ValueError, match=r"cannot be saved|could not be loaded again|do not fit"):
        model.save_pretrained(folder, state_dict=change(model))
    assert digests(folder) == before


def test_a_head_is_not_forgotten(build, tmp_path):
    model, _ = build("resnet18", cls=ConcatEnsembleForImageClassification, num_labels=3)
    state_dict = {key: tensor for key, tensor in model.state_dict().items() if key != "classifier.bias"}
    with pytest.raises(ValueError, match=r"1 missing \['classifier.bias'\]"):
        model.save_pretrained(tmp_path, state_dict=state_dict)
    assert not list(tmp_path.iterdir())


def by_torchao(folder):
    return AutoModel.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def by_torchao_with_activations(folder):
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return AutoModel.from_pretrained(folder, quantization_config=config)


def by_quanto(folder):
    return AutoModel.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))


def by_hand_with_torchao(folder):
    model = AutoModel.from_pretrained(folder)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def by_hand_with_quanto(folder):
    model = AutoModel.from_pretrained(folder)
    quantize(model, weights=qint8)
    return model


def by_torch(folder):
    return torch.ao.quantization.quantize_dynamic(AutoModel.from_pretrained(folder), {torch.nn.Linear})


QUANTIZED = (by_torchao, by_torchao_with_activations, by_quanto, by_hand_with_torchao, by_hand_with_quanto, by_torch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized", QUANTIZED)
@torch.no_grad()
def test_a_quantized_model_computes_and_is_refused_before_anything_is_written(folder, noise, tmp_path, quantized):
    model, exact, before = quantized(folder), AutoModel.from_pretrained(folder), digests(folder)
    features, expected = model(noise(exact)).pooler_output, exact(noise(exact)).pooler_output
    assert not torch.equal(features, expected)
    assert (features - expected).norm() < 0.05 * expected.norm()
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ValueError, match="quantiz"):
            model.save_pretrained(target)
    assert digests(folder) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config", [lambda: TorchAoConfig(Int8WeightOnlyConfig(version=2)), lambda: QuantoConfig(weights="int8")]
)
@torch.no_grad()
def test_an_adapter_of_a_quantized_model_is_saved_alone_and_loaded_over_it(folder, noise, tmp_path, config):
    before, model = digests(folder), AutoModel.from_pretrained(folder, quantization_config=config())
    pixels = noise(model)
    plain = model(pixels).pooler_output
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(pixels).pooler_output
    assert sorted(digests(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = AutoModel.from_pretrained(folder, quantization_config=config())
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(loaded.eval()(pixels).pooler_output, expected) and not torch.equal(plain, expected)
    assert digests(folder) == before
