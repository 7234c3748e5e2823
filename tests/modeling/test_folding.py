"""Folding BatchNorm into convolutions changes speed and nothing else."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleForImageClassification, ConcatEnsembleModel

# Of our fourteen kinds; the others have no BatchNorm.
NORMALISED = ("resnet18", "resnet50", "resnetblur50", "wide", "efficientnet", "regnety", "mobilenetv3", "grey")


def norms(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def close(got, wanted, atol=1e-4):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


@torch.no_grad()
def test_every_batchnorm_goes_and_features_stay(build, noise, kind):
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
        ("repvgg_a0", 17),  # normalises a block's input in a branch of its own
        ("densenet121", 62),  # normalises what was concatenated
        ("resnetv2_18", 9),  # normalises before it convolves
        ("resnetv2_50d_evos", 0),  # statistics of its own that are no BatchNorm's
        ("resnetv2_50x1_bit", 0),  # convolves with weights that it standardises first
        ("ghostnet_050", 0),  # a BatchNorm's output is used twice, its input once
        ("coatnet_pico_rw_224", 5),
    ],
)
def test_a_batchnorm_that_follows_something_else_stays(spec, architecture, left):
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
    wanted = model(pixels).pooler_output
    close(model.fold_batchnorm()(pixels).pooler_output / wanted.norm(), wanted / wanted.norm(), 1e-5)
    assert len(norms(model)) == left


class Reused(nn.Module):
    """What follows a convolution is its BatchNorm, and `also` something that uses the convolution as well."""

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
def test_a_convolution_or_norm_that_serves_twice_is_left_alone(spec, noise, also):
    model = ConcatEnsembleModel(ConcatEnsembleConfig(members=[{**spec("resnet18"), "num_features": 4}])).eval()
    model.members["0"] = Reused(also).eval()
    wanted = model(noise(model)).pooler_output
    assert torch.equal(model.fold_batchnorm()(noise(model)).pooler_output, wanted)
    assert len(norms(model)) == 1


class Shifted(nn.BatchNorm2d):
    """A BatchNorm with something more to it, of which folding cannot know."""

    def forward(self, pixels):
        return super().forward(pixels) + 1


def test_a_member_that_folding_would_change_is_named_and_all_stay(build, noise):
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
    wanted = model(noise(model))
    got = model.fold_batchnorm()(noise(model))
    close(got.logits, wanted.logits)
    close(got.pooler_output, wanted.pooler_output)


@torch.no_grad()
def test_twice_is_once_and_random_numbers_are_not_drawn(build, noise):
    model, _ = build("resnet18", "efficientnet")
    before = torch.get_rng_state()
    members = dict(model.fold_batchnorm().members)
    assert not any(module.training for module in model.modules())
    assert dict(model.fold_batchnorm().members) == members
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
@pytest.mark.parametrize("normalised", NORMALISED)
def test_bfloat16_stays_bfloat16_and_comes_no_further_from_float32(build, noise, normalised):
    model, (backbone,) = build(normalised)
    pixels = noise(model, 4)
    wanted = backbone(pixels)
    model.to(torch.bfloat16)
    far = (model(pixels).pooler_output.float() - wanted).norm()
    got = model.fold_batchnorm()(pixels).pooler_output
    assert got.dtype == model.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() < 1.5 * far


@torch.no_grad()
def test_other_ensembles_with_the_same_members_do_not_change(build, noise, tmp_path):
    model, _ = build("resnet18", "grey", active_members=[0])
    folded = model.export_active().fold_batchnorm()
    assert norms(model) and not norms(folded)
    model.save_pretrained(tmp_path)
    assert not norms(folded.export_active())


def test_only_in_evaluation_mode(build):
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


def test_without_batchnorm_nothing_is_refused(build, tmp_path):
    model, _ = build("vit-tiny", "convnext")
    model.fold_batchnorm().save_pretrained(tmp_path)
    assert model.train().training
