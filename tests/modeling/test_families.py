"""One architecture of every family of timm: built, saved, loaded, assembled, folded, trained with less memory."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import list_modules

from concat_ensemble import ConcatEnsembleModel, assemble
from tests.modeling.families import PAGE, Visitor, check, check_family, create_network, row

ROOT = Path(__file__).parents[2]
# Arguments that make it small, pixels a side, and then how many BatchNorms are folded, whether timm has gradient
# checkpointing for it, and how many feature maps it returns.
UNLIKE_OTHERS = {
    # All its blocks share their position encodings.
    "coat_tiny": (
        {"img_size": 32, "embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 1},
        *(32, "-", "-", "4"),
    ),
    # Keeps attention biases from one forward pass to the next.
    "efficientvit_m0": ({"img_size": 64}, 64, "112 of 112", "yes", "3"),
    # Channels last; masks and positions in buffers that are not saved.
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "window_size": 4, "depths": [2, 1], "embed_dim": 24},
        *(64, "-", "yes", "2"),
    ),
    # Makes a buffer in its first forward pass.
    "convit_tiny": ({"img_size": 32, "depth": 3, "local_up_to_layer": 2}, 32, "-", "-", "3"),
    # Rotary positions, and a buffer of zeros as the bias of its keys.
    "vit_tiny_patch16_dinov3_qkvb": ({"img_size": 32, "depth": 1}, 32, "-", "yes", "1"),
    # Takes images of any size and shape.
    "naflexvit_base_patch16_parfac_gap": (
        {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3},
        *(32, "-", "yes", "1"),
    ),
    # Has recurrent layers.
    "sequencer2d_s": (
        {"img_size": 56, "layers": [1] * 4, "embed_dims": [16] * 4, "hidden_sizes": [4] * 4},
        *(56, "-", "-", "4"),
    ),
    # Sees the image at two scales, and returns the class tokens of both.
    "crossvit_tiny_240": ({"depth": [[1, 1, 0]]}, 240, "-", "-", "2"),
    # The vision tower of a language model.
    "gemma4_vit_167m": (
        {"img_size": 96, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_kv_heads": 2},
        *(96, "-", "yes", "1"),
    ),
    # Begins with a cosine transform.
    "csatv2": (
        {"dims": [8, 16, 32, 64], "depths": [1] * 4, "transformer_depths": [0, 0, 1, 1]},
        *(64, "-", "yes", "5"),
    ),
    # Uses the output of a BatchNorm twice.
    "repghostnet_050": ({}, 64, "80 of 112", "yes", "5"),
    # Standardizes the weights before it convolves.
    "test_nfnet": ({}, 64, "-", "yes", "5"),
}


@pytest.fixture(scope="module")
def visitor(tmp_path_factory):
    with Visitor(tmp_path_factory.mktemp("visitor")) as visitor:
        yield visitor


@pytest.mark.parametrize("architecture", UNLIKE_OTHERS)
def test_a_dozen_that_are_built_unlike_others_are_exact(visitor, tmp_path, architecture):
    model_args, size, folded, checkpointing, hidden_states = UNLIKE_OTHERS[architecture]
    result = check("", architecture, model_args, size, folder=tmp_path, visitor=visitor)
    exact = dict.fromkeys(("saved and loaded", "from memory", "from a file"), "yes")
    expected = {"BatchNorms folded": folded, "checkpointing": checkpointing, "hidden states": hidden_states}
    assert (result.failures, result.held) == ({}, exact | expected)


@pytest.mark.parametrize(("architecture", "model_args"), [("levit_128s", {}), ("efficientvit_m0", {"img_size": 64})])
def test_attention_biases_that_timm_keeps_for_evaluation_have_gradients_and_can_be_copied(architecture, model_args):
    backbone = create_network(architecture, model_args, None)
    model = assemble([backbone])  # which runs it once, without gradients
    pixels = torch.randn(2, *model.config.pixel_shape)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(pixels).pooler_output.square().mean().backward()
        gradients.append([w.grad for name, w in model.named_parameters() if name.endswith("attention_biases")])
    assert gradients[0] and all(gradient is not None for gradient in gradients[0])
    assert all(map(torch.equal, *gradients))
    with torch.no_grad():
        expected = backbone(pixels)
        assert torch.equal(assemble([model])(pixels).pooler_output, expected)
        torch.testing.assert_close(model.fold_batchnorm()(pixels).pooler_output, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["csatv2", "vit_tiny_patch16_dinov3_qkvb", "swinv2_tiny_window8_256"])
def test_a_network_loaded_in_bfloat16_is_the_one_converted_to_bfloat16(tmp_path, architecture):
    model_args, size, *_ = UNLIKE_OTHERS[architecture]
    model = assemble([create_network(architecture, model_args, size)])
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, *model.config.pixel_shape)
    features = ConcatEnsembleModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(pixels).pooler_output
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, model.to(torch.bfloat16)(pixels).pooler_output)


def test_an_encoder_that_does_not_pool_is_refused():
    encoder = timm.create_model("gemma4_vit_167m_enc", img_size=96, depth=1, embed_dim=64, num_heads=2, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"gemma4_vit_167m_enc\) has no pooled features: it returns \(1, \d+, 64\)"):
        assemble([encoder])


def test_the_page_has_a_row_for_every_family_of_the_version_that_it_names():
    text = read_page()
    assert text.startswith(PAGE[: PAGE.index("{")])
    if f"timm {timm.__version__})" in text:
        assert re.findall(r"^\| (\w+) \| `", text, re.MULTILINE) == sorted(list_modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(list_modules()))
def test_the_smallest_architecture_of_every_family_is_exact(visitor, family):
    result = check_family(family, visitor)
    assert not result.failures
    assert row(result) in read_page()


def read_page() -> str:
    return (ROOT / "docs/architectures.md").read_text()
