"""Architectures, one by one and in one ensemble: after saving and loading, features still equal timm's."""

import pytest
import timm
import torch
from transformers import AutoImageProcessor, AutoModel

from concat_ensemble import assemble

# With timm's default arguments; `KINDS` in conftest.py has the same architectures in small sizes.
FULL_SIZE = (
    *("resnet18", "resnet50", "resnetblur50", "wide_resnet50_2"),
    *("vit_tiny_patch16_224", "vit_small_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"),
    *(
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "tf_efficientnet_lite0",
        "regnety_004",
        "mobilenetv3_small_050",
    ),
)


@torch.no_grad()
def saved_and_loaded(model, folder, pixels):
    """Features before and after. The first model stays in memory, so that the second cannot reuse its memory."""
    before = model(pixels).pooler_output
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder)
    return before, loaded(pixels).pooler_output


@torch.no_grad()
def test_one_member_gives_timms_features_after_saving_and_loading(build, noise, tmp_path, kind):
    model, (backbone,) = build(kind)
    before, after = saved_and_loaded(model, tmp_path, noise(model))
    assert torch.equal(before, after) and torch.equal(after, backbone(noise(model)))
    assert after.isfinite().all() and not torch.equal(after[0], after[1])


@torch.no_grad()
def test_all_in_one_ensemble_give_timms_features_after_saving_and_loading(
    build, kinds, photos, timm_features, tmp_path
):
    model, backbones = build(*kinds)
    model.save_pretrained(tmp_path)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(photos)["pixel_values"]
    before, after = saved_and_loaded(model, tmp_path, pixels)
    assert torch.equal(before, after) and len(kinds) == 15 and pixels.shape[1] == len(model.config.geometries)
    expected = torch.cat([timm_features(backbone, photos) for backbone in backbones], 1)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_all_at_full_size(photos, timm_features, tmp_path):
    grey = timm.create_model("resnet10t", in_chans=1, channels=(8, 16, 32, 64), stem_width=8)
    model = assemble([*(f"random:{name}" for name in FULL_SIZE), grey])
    model.save_pretrained(tmp_path)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(photos)["pixel_values"]
    before, after = saved_and_loaded(model, tmp_path, pixels)
    assert torch.equal(before, after)
    parts = model(pixels, output_member_features=True).member_features
    for name, part, member in zip(FULL_SIZE, parts, model.members.values(), strict=False):
        fresh = timm.create_model(name, num_classes=0).eval()
        fresh.load_state_dict(member.state_dict())
        torch.testing.assert_close(part, timm_features(fresh, photos), atol=1e-4, rtol=0, msg=name)
