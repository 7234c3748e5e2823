"""Folding BatchNorm into convolutions changes the speed and not the features."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleForImageClassification, ConcatEnsembleModel
from concat_ensemble.inference.folding import fold_batchnorm

# The other kinds in conftest.py have no BatchNorm.
NORMALISED = ("resnet18", "resnet50", "resnetblur50", "wide", "efficientnet", "regnety", "mobilenetv3", "grey")


def norms(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def test_every_batchnorm_is_folded_and_features_stay(build, noise, kind):
    model, (backbone,) = build(kind)
    pixels = noise(model, 3)
    assert bool(norms(model)) == (kind in NORMALISED)
    untouched = model.members["0"]
    assert model.fold_batchnorm() is model
    assert not norms(model) and (model.members["0"] is untouched) == (kind not in NORMALISED)
    close(model(pixels).pooler_output, backbone(pixels))


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "left"),
    [
        ("repvgg_a0", 17),  # a branch normalizes the block's input
        ("densenet121", 62),  # normalizes a concatenation
        ("resnetv2_18", 9),  # normalizes before it convolves
        ("resnetv2_50d_evos", 0),  # its layers have statistics but are not BatchNorms
        ("resnetv2_50x1_bit", 0),  # standardizes the weights before it convolves
        ("ghostnet_050", 0),  # a BatchNorm's output is used twice, its input once
        ("coatnet_pico_rw_224", 5),
    ],
)
def test_a_batchnorm_without_a_convolution_before_it_stays(spec, architecture, left):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        member = timm.create_model(architecture, num_classes=0).eval()
    size = member.pretrained_cfg["input_size"]
    described = {
        "architecture": architecture,
        "num_features": member(torch.zeros(1, *size)).shape[1],
        "preprocessing": {**spec("resnet18")["preprocessing"], "input_size": size},
    }
    model = ConcatEnsembleModel(ConcatEnsembleConfig(members=[described])).eval()
    pixels = torch.rand(1, *model.config.pixel_shape, generator=torch.Generator().manual_seed(1))
    expected = model(pixels).pooler_output
    close(model.fold_batchnorm()(pixels).pooler_output / expected.norm(), expected / expected.norm(), 1e-5)
    assert len(norms(model)) == left


class Reused(nn.Module):
    """A convolution with a BatchNorm after it, and `also`, which uses one of the two as well."""

    def __init__(self, also):
        super().__init__()
        self.conv, self.norm, self.also = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), also
        self.norm.running_mean.fill_(0.5)

    def forward(self, pixels):
        convolved = self.conv(pixels)
        return (self.norm(convolved) + self.also(self, pixels, convolved)).mean((2, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    "also",
    [
        lambda module, pixels, convolved: convolved.relu(),
        lambda module, pixels, convolved: module.norm(convolved * 2),
        lambda module, pixels, convolved: module.conv(pixels + 1),
        lambda module, pixels, convolved: module.conv.weight.square().sum(),
        lambda module, pixels, convolved: torch.cat([convolved, convolved]).mean(),
    ],
    ids=["output", "norm", "convolution", "weight", "in a list"],
)
def test_a_convolution_or_norm_that_is_used_twice_stays(spec, noise, also):
    model = ConcatEnsembleModel(ConcatEnsembleConfig(members=[{**spec("resnet18"), "num_features": 4}])).eval()
    model.members["0"] = Reused(also).eval()
    expected = model(noise(model)).pooler_output
    assert torch.equal(model.fold_batchnorm()(noise(model)).pooler_output, expected)
    assert len(norms(model)) == 1


class Shifted(nn.BatchNorm2d):
    """A BatchNorm that does something else as well, which folding cannot see."""

    def forward(self, pixels):
        return super().forward(pixels) + 1


def test_the_error_names_a_member_that_folding_would_change_and_no_member_is_folded(build, noise):
    model, _ = build("resnet18", "resnet18")
    shifted = Shifted(64)
    shifted.load_state_dict(model.members["1"].bn1.state_dict())
    model.members["1"].bn1 = shifted.eval()
    before = dict(model.members)
    with pytest.raises(ValueError, match=r"members\[1\]: its features change"):
        model.fold_batchnorm()
    assert dict(model.members) == before


@torch.no_grad()
def test_the_classifier_gives_the_same_logits(build, noise):
    kinds = ("resnet18", "vit-tiny", "grey")
    model, _ = build(*kinds, cls=ConcatEnsembleForImageClassification, num_labels=3, standardize=True)
    expected = model(noise(model))
    actual = model.fold_batchnorm()(noise(model))
    close(actual.logits, expected.logits)
    close(actual.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_folding_twice_changes_nothing_and_uses_no_global_random_numbers(build, noise):
    model, _ = build("resnet18", "efficientnet")
    before = torch.get_rng_state()
    members = dict(model.fold_batchnorm().members)
    assert not any(module.training for module in model.modules())
    assert dict(model.fold_batchnorm().members) == members
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
@pytest.mark.parametrize("normalised", NORMALISED)
def test_a_folded_bfloat16_model_is_as_close_to_float32_as_before(build, noise, normalised):
    model, (backbone,) = build(normalised)
    pixels = noise(model, 4)
    expected = backbone(pixels)
    model.to(torch.bfloat16)
    far = (model(pixels).pooler_output.float() - expected).norm()
    actual = model.fold_batchnorm()(pixels).pooler_output
    assert actual.dtype == model.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 1.5 * far


@torch.no_grad()
def test_other_ensembles_with_the_same_members_do_not_change(build, noise, tmp_path):
    model, _ = build("resnet18", "grey", active_members=[0])
    folded = model.export_active().fold_batchnorm()
    assert norms(model) and not norms(folded)
    model.save_pretrained(tmp_path)
    assert not norms(folded.export_active())


def test_folding_needs_evaluation_mode(build):
    model, _ = build("resnet18", cls=ConcatEnsembleForImageClassification, num_labels=3)
    model.freeze_members()
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        model.train().fold_batchnorm()
    model.eval().fold_batchnorm()


@pytest.mark.parametrize("same", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_folded_model_can_be_neither_saved_nor_trained(build, noise, tmp_path, same):
    model, _ = build("resnet18", "vit-tiny")
    folded = same(model.fold_batchnorm())
    close(folded(noise(model)).pooler_output, model(noise(model)).pooler_output, 1e-6)
    with pytest.raises(ValueError, match=r"after fold_batchnorm\(\) cannot be saved"):
        folded.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="cannot be trained"):
        folded.train()
    assert not (tmp_path / "folder").exists() and not folded.eval().training


def test_a_class_loaded_from_a_repo_is_folded_by_the_function(build, noise, tmp_path):
    build("resnet18")[0].save_pretrained(tmp_path)
    reference = "modeling_concat_ensemble.ConcatEnsembleModel"
    model = get_class_from_dynamic_module(reference, tmp_path).from_pretrained(tmp_path)
    assert type(model).__module__.startswith("transformers_modules.")
    expected = model(noise(model)).pooler_output
    with pytest.raises(RuntimeError, match="pip install concat-ensemble"):
        model.fold_batchnorm()
    close(fold_batchnorm(model)(noise(model)).pooler_output, expected)
    assert not norms(model)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)


def test_a_model_without_batchnorm_can_still_be_saved_and_trained(build, tmp_path):
    model, _ = build("vit-tiny", "convnext")
    model.fold_batchnorm().save_pretrained(tmp_path)
    assert model.train().training
