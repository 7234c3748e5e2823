"""Images of other sizes than the members' own, with `dynamic_img_size`."""

import json

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleForImageClassification, ConcatEnsembleModel

VITS = {
    "vit-tiny": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}),
    "deit": ("deit_tiny_patch16_224", {"depth": 2, "img_size": 32}),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1), "embed_dim": 24},
    ),
}


def pixels_of_size(height, width, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model, pixels):
    return model(pixels).pooler_output


@pytest.mark.parametrize("member", VITS)
@torch.no_grad()
def test_a_transformer_equals_timms_with_dynamic_img_size(build, noise, tmp_path, member):
    fixed, (backbone,) = build(member)
    fixed.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dynamic_img_size=True)
    architecture, model_args = VITS[member]
    dynamic = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **model_args).eval()
    dynamic.load_state_dict(backbone.state_dict())
    unit = 14 if member == "eva02" else 16
    for pixels in (pixels_of_size(6 * unit, 8 * unit), pixels_of_size(3 * unit, unit), noise(fixed)):
        assert torch.equal(features(model, pixels), dynamic(pixels))
    assert torch.equal(features(model, noise(fixed)), features(fixed, noise(fixed)))


@pytest.mark.parametrize("member", ["resnet18", "convnext", "efficientnet", "grey"])
@torch.no_grad()
def test_a_convolutional_network_equals_timms(build, member):
    model, (backbone,) = build(member, dynamic_img_size=True)
    pixels = pixels_of_size(96, 128, model.config.pixel_shape[0])
    assert torch.equal(features(model, pixels), backbone(pixels))


@torch.no_grad()
def test_several_members_saved_and_loaded_with_a_head_and_feature_maps(build, tmp_path):
    head = {"num_labels": 3, "dynamic_img_size": True, "cls": ConcatEnsembleForImageClassification}
    model, backbones = build("resnet18", "resnet50", **head)
    model.save_pretrained(tmp_path)
    pixels = pixels_of_size(96, 128)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    output = loaded(pixels, output_hidden_states=[-1])
    assert torch.equal(output.logits, model(pixels).logits)
    assert [each.shape for each in output.hidden_states] == [(2, 64, 3, 4), (2, 256, 3, 4)]
    assert torch.equal(output.hidden_states[0], backbones[0].forward_features(pixels))
    part = AutoModel.from_pretrained(tmp_path, active_members=[1]).export_active()
    assert part.config.dynamic_img_size and torch.equal(features(part, pixels), backbones[1](pixels))


def test_the_config_is_written_only_if_it_is_true(spec, tmp_path):
    for dynamic in (False, True):
        ConcatEnsembleConfig(members=[spec("resnet18")], dynamic_img_size=dynamic).save_pretrained(tmp_path)
        assert ("dynamic_img_size" in json.loads((tmp_path / "config.json").read_text())) == dynamic
        assert AutoConfig.from_pretrained(tmp_path).dynamic_img_size == dynamic


@pytest.mark.parametrize("value", [None, 1, "true", [True]])
def test_another_value_is_refused(spec, value):
    with pytest.raises(ValueError, match="dynamic_img_size"):
        ConcatEnsembleConfig(members=[spec("resnet18")], dynamic_img_size=value)


def test_several_geometries_are_refused(build, spec, tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_img_size=True must be False for members with 2 ways.*'shared'"):
        ConcatEnsembleConfig(members=[spec("resnet18"), spec("grey")], dynamic_img_size=True)
    build("resnet18", "grey")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dynamic_img_size=True must be False"):
        AutoModel.from_pretrained(tmp_path, dynamic_img_size=True)


@pytest.mark.parametrize("architecture", ["mixer_s32_224", "levit_128s", "coat_lite_tiny"])
def test_a_member_of_one_size_is_refused_by_name(spec, architecture):
    member = {**spec("resnet18"), "architecture": architecture, "model_args": {}}
    member["preprocessing"] = {**member["preprocessing"], "input_size": [3, 224, 224]}
    config = ConcatEnsembleConfig(members=[{**spec("resnet18"), "preprocessing": member["preprocessing"]}, member])
    config.dynamic_img_size = True
    with torch.device("meta"), pytest.raises(ValueError, match=rf"members\[1\]: dynamic_img_size.*{architecture}"):
        ConcatEnsembleModel(config)


@pytest.mark.parametrize("shape", [(2, 1, 96, 128), (2, 3, 96), (3, 96, 128), (2, 1, 3, 96, 128)])
def test_pixels_of_another_rank_or_number_of_channels_are_refused(build, shape):
    model, _ = build("resnet18", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"pixel_values of shape .* must be of shape \(B, 3"):
        model(torch.zeros(shape))


def test_the_error_for_a_size_that_a_member_cannot_take_names_both(build):
    model, _ = build("vit-tiny", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"members\[0\]: timm's VisionTransformer refuses .* 50x32 pixels"):
        model(pixels_of_size(50, 32))
    fixed, _ = build("vit-tiny")
    with pytest.raises(ValueError, match=r"must be of shape \(B, 3, 32, 32\)"):
        fixed(pixels_of_size(64, 32))
