"""A timm model in memory becomes a member with exactly its features, or an error names what timm cannot rebuild."""

import copy
import types
import warnings

import peft
import pytest
import timm
import torch
from timm.layers import GroupNorm1, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import VisionTransformer, save_for_hf
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

from concat_ensemble import ConcatEnsembleModel, assemble

torch.set_num_threads(1)


def network(architecture: str, pixels: int = 32, **model_args) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        overlay = {"input_size": (3, pixels, pixels)}
        model = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **model_args).eval()
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():  # else many residual blocks return zero
                tensor += 0.2 * torch.rand_like(tensor)
    return model


def vit(**model_args) -> VisionTransformer:
    return network("vit_tiny_patch16_224", **{"depth": 2, "img_size": 32, "num_classes": 0} | model_args)


def resnet(**model_args) -> nn.Module:
    return network("resnet18", channels=(8, 8, 16, 16), **model_args)


def dinov3() -> nn.Module:
    return network("vit_small_patch16_dinov3", depth=2, embed_dim=96, num_heads=2, num_classes=0)


def beit() -> nn.Module:
    return network("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=4, img_size=32, num_classes=0)


def swin() -> nn.Module:
    arguments = {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1), "embed_dim": 24, "num_classes": 0}
    return network("swin_tiny_patch4_window7_224", **arguments)


@torch.no_grad()
def features(model: nn.Module, size) -> torch.Tensor:
    """Pooled features by timm's own methods, of other noise than `rebuild` takes."""
    model = copy.deepcopy(model).float().eval()
    pixels = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    return model.forward_head(model.forward_features(pixels), pre_logits=True) if model.num_classes else model(pixels)


def change(make, action, **model_args):
    """A function that makes a network and changes it in place."""

    def build():
        model = make(**model_args)
        action(model)
        return model

    return build


def replace(path: str, layer: nn.Module):
    return lambda model: model.set_submodule(path, layer)


def assign(path: str, **attributes):
    return lambda model: [setattr(model.get_submodule(path), name, value) for name, value in attributes.items()]


POOLING = {
    "pooled otherwise": change(vit, lambda m: m.reset_classifier(0, global_pool="avg")),
    "pooled otherwise, with a classifier": change(vit, lambda m: m.reset_classifier(7, "avg"), num_classes=5),
    "pooled by the maximum": change(vit, lambda m: m.reset_classifier(0, "max")),
    "pooled otherwise by assignment": change(vit, assign("", global_pool="avg")),
    "no longer averaged": change(vit, assign("", global_pool="token"), global_pool="avg"),
    "DINOv3 with its class token": change(dinov3, assign("", global_pool="token")),
    "BEiT with its class token": change(beit, lambda m: m.reset_classifier(0, "token")),
    "ResNet pooled by the maximum": change(resnet, lambda m: m.reset_classifier(0, "max")),
}
# timm does not record where the norm is, so that it cannot load such a model itself.
UNRECORDED = ("pooled otherwise by assignment", "no longer averaged")
SAME = {
    "of another size": change(vit, lambda m: m.set_input_size(img_size=48)),
    "of other windows": change(swin, lambda m: m.set_input_size(img_size=96, window_size=(3, 3))),
    "with an activation by class": change(vit, lambda m: None, act_layer=nn.ReLU),
    "with an activation of another name": change(vit, lambda m: None, act_layer=nn.SiLU),
    "with norms by class": change(resnet, lambda m: None, norm_layer=GroupNorm1),
    "with another head": change(vit, replace("head", nn.Sequential(nn.Linear(192, 4), nn.ReLU())), num_classes=5),
    "without its head": change(resnet, replace("fc", nn.Identity())),
    "with frozen BatchNorm": lambda: freeze_batch_norm_2d(resnet()),
    "with synchronized BatchNorm": lambda: convert_sync_batchnorm(resnet()),
    "in bfloat16": lambda: resnet().bfloat16(),
    "in bfloat16, with rotary positions": lambda: dinov3().bfloat16(),
    "in float16, in training mode": lambda: resnet().half().train(),
    "channels last": lambda: resnet().to(memory_format=torch.channels_last),
    "not in place": change(resnet, assign("act1", inplace=False)),
    "with checkpointing": change(vit, lambda m: m.set_grad_checkpointing()),
    "with merged adapters": lambda: peft.get_peft_model(
        vit(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    ).merge_and_unload(),
}


@pytest.mark.parametrize("case", POOLING | SAME)
def test_a_changed_network_gives_its_own_features(case, tmp_path):
    model = (POOLING | SAME)[case]()
    ensemble = assemble([model])
    size = ensemble.config.pixel_shape
    ensemble.save_pretrained(tmp_path)
    with torch.no_grad():
        pixels = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
        pooled = ConcatEnsembleModel.from_pretrained(tmp_path)(pixels).pooler_output
    expected = features(model, size)
    # Convolutions over channels that come last sum in another order, and a frozen BatchNorm multiplies first.
    rounds = case in ("channels last", "with frozen BatchNorm")
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5 if rounds else 0)


@pytest.mark.parametrize("case", [case for case in POOLING if case not in UNRECORDED])
def test_a_folder_that_timm_saved_gives_what_timm_loads(case, tmp_path):
    save_for_hf(POOLING[case](), tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    ensemble = assemble([tmp_path])
    with torch.no_grad():
        pixels = torch.randn(2, *ensemble.config.pixel_shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(ensemble(pixels).pooler_output, model.eval()(pixels))


def test_an_unchanged_network_keeps_its_arguments_alone():
    assert assemble([vit()]).config.members[0]["model_args"] == {"depth": 2, "img_size": 32}
    pooled = assemble([POOLING["pooled otherwise"]()]).config.members[0]["model_args"]
    assert pooled == {"depth": 2, "img_size": 32, "fc_norm": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel, ModelEmaV3],
    ids=["compile", "DataParallel", "AveragedModel", "ModelEmaV3"],
)
def test_wrappers_are_taken_off(wrap):
    model = POOLING["pooled otherwise"]()
    ensemble = assemble([wrap(model)])
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(ensemble(pixels).pooler_output, features(model, (3, 32, 32)))


def test_other_kernels_may_round_otherwise():
    model = change(vit, assign("blocks.1.attn", fused_attn=False))()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(assemble([model])(pixels).pooler_output, features(model, (3, 32, 32)))


class Doubled(VisionTransformer):
    def forward_features(self, x, *args, **kwargs):
        return 2 * super().forward_features(x, *args, **kwargs)


class Unnormalized(VisionTransformer):
    """Its features do not pass through forward_features()."""

    def forward(self, x):
        return self.head(self.patch_embed(x).mean(1))


class Scaled(nn.Module):
    """Not a wrapper that does nothing, although it has the name of one's attribute."""

    def __init__(self, module):
        super().__init__()
        self.module = self.timm_model = module

    def forward(self, x):
        return 2 * self.module(x)


class ScaledParallel(nn.DataParallel):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(module):
    module.register_forward_hook(lambda *args: 2 * args[2])
    return module


def patch_attention(model):
    attention = model.blocks[1].attn
    attention.forward = types.MethodType(lambda self, x, **kwargs: x, attention)


def patch_forward(model):
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


def fuse(model):
    model.conv1, model.bn1 = fusion.fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()


# What was done, and what the error names.
CHANGED = {
    "activation": (change(vit, replace("blocks.1.mlp.act", nn.ReLU())), r"blocks\.1\.mlp\.act is ReLU, not GELU"),
    "approximation": (
        change(vit, replace("blocks.0.mlp.act", nn.GELU("tanh"))),
        r"blocks\.0\.mlp\.act\.approximate is 'tanh', not 'none'",
    ),
    "activation that noise does not tell": (change(resnet, replace("act1", nn.ReLU6())), "act1 is ReLU6, not ReLU"),
    "epsilon": (change(vit, assign("norm", eps=1e-5)), r"norm\.eps is 1e-05, not 1e-06;"),
    "epsilon by little": (change(resnet, assign("bn1", eps=1.1e-5)), r"bn1\.eps is 1\.1e-05, not 1e-05;"),
    "stride": (change(resnet, assign("conv1", stride=(1, 1))), r"conv1\.stride is \(1, 1\), not \(2, 2\)"),
    "pooling layer": (change(resnet, replace("maxpool", nn.AvgPool2d(2))), "maxpool is AvgPool2d, not MaxPool2d"),
    # timm has no name for PyTorch's own, which has another epsilon.
    "norm by class": (
        change(vit, lambda m: None, norm_layer=nn.LayerNorm),
        r"norm1 is torch\.nn\.modules\.normalization\.LayerNorm, not timm\.layers\.norm\.LayerNorm",
    ),
    "fewer blocks": (change(vit, lambda m: m.blocks.pop(-1)), r"it has no blocks\.1;"),
    "stage": (change(resnet, replace("layer4", nn.Identity())), "layer4 is Identity, not Sequential;"),
    "norm": (change(vit, replace("norm", nn.Identity())), "norm is Identity, not LayerNorm;"),
    "fused": (
        change(resnet, fuse),
        r"conv1\.bias is of shape \(64,\), not absent; bn1 is Identity, not B",
    ),
    "reparametrized": (lambda: reparameterize_model(network("repvgg_a0")), r"it has no stem\.conv_kxk"),
    "weight norm": (
        change(resnet, lambda m: parametrizations.weight_norm(m.conv1)),
        "conv1 is ParametrizedConv2d, not Conv2d",
    ),
    "pruned": (
        change(resnet, lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5)),
        r"conv1\.weight is absent.*conv1\.weight_mask is",
    ),
    "adapters": (
        lambda: peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["qkv"])),
        r"PeftModel has adapters.*merge_and_unload\(\)",
    ),
    "injected adapters": (
        change(vit, lambda m: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), m)),
        r"blocks\.0\.attn\.qkv is peft\.tuners\.lora\.layer\.Linear, not torch\.nn",
    ),
    "subclass": (change(vit, assign("", __class__=Doubled)), "it is Doubled, not VisionTransformer;"),
    "subclass with classes": (
        change(vit, assign("", __class__=Unnormalized), num_classes=3),
        r"forward\(\) of Unnormalized is not timm's",
    ),
    "module": (lambda: Scaled(vit()), "Scaled is not a timm model"),
    "subclass of a wrapper": (lambda: ScaledParallel(vit()), "ScaledParallel is not a timm model"),
    "hook of a wrapper": (lambda: hook(nn.DataParallel(vit())), "the DataParallel in memory has hooks"),
    "hook of two wrappers": (lambda: ModelEmaV3(hook(nn.DataParallel(vit()))), "the DataParallel in memory has hooks"),
    "traced": (lambda: torch.jit.trace(vit(), torch.ones(1, 3, 32, 32)), "is not a timm model"),
    "scripted": (lambda: torch.jit.script(resnet()), "is not a timm model"),
    "head without classes": (change(vit, replace("head", nn.Linear(192, 4))), "head is Linear, not Identity"),
    "forward": (
        change(vit, lambda m: assign("", forward=lambda x, f=m.forward: 2 * f(x))(m)),
        r"forward\(\) is replaced",
    ),
    "forward of a layer": (change(vit, patch_attention), r"blocks\.1\.attn\.forward\(\) is replaced"),
    "hook": (change(vit, lambda m: m.register_forward_pre_hook(lambda _, args: (2 * args[0],))), "it has hooks"),
    "hook of a layer": (
        change(vit, lambda m: m.blocks[0].register_forward_hook(lambda *args: 2 * args[2]), num_classes=3),
        r"blocks\.0 has hooks",
    ),
    "buffer": (
        change(swin, lambda m: m.layers[0].blocks[0].attn.relative_position_index.zero_()),
        "relative_position_index has other val",
    ),
    "feature maps": (lambda: timm.create_model("resnet18", features_only=True), "returns list.*without features_only"),
    "tokens": (
        lambda: network("vit_tiny_patch16_224", features_only=True),
        "it is FeatureGetterNet, not",
    ),
    "NaN": (change(resnet, lambda m: m.bn1.bias.data.fill_(torch.nan)), "NaN or infinite features.*check its"),
    "no architecture": (
        change(resnet, lambda m: m.pretrained_cfg.pop("architecture")),
        "architecture None is not",
    ),
    "meta": (lambda: resnet().to("meta"), "is on the meta device; load its weights first"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_the_error_names_what_was_changed(case):
    make, message = CHANGED[case]
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
        warnings.simplefilter("ignore")
        assemble([make()])
    assert "\n" not in str(error.value)


def test_the_network_and_the_random_state_stay_unchanged():
    model, calls = resnet(num_classes=3).bfloat16().train(), []
    model.layer1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    assemble([model])
    assert torch.equal(torch.rand(1), undisturbed)
    assert calls == [False] and all(module.training for module in model.modules())
    assert model.num_classes == 3 and "forward" not in vars(model)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key


def test_changed_statistics_of_the_pixels_are_kept():
    model = resnet()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.9, "input_size": (3, 48, 64)}
    preprocessing = assemble([model]).config.members[0]["preprocessing"]
    assert preprocessing["mean"] == [0.1, 0.2, 0.3] and preprocessing["crop_pct"] == 0.9
    assert preprocessing["input_size"] == [3, 48, 64]
    fixed = vit()
    fixed.pretrained_cfg["input_size"] = (3, 224, 224)
    assert assemble([fixed]).config.members[0]["preprocessing"]["input_size"] == [3, 32, 32]


def test_members_of_an_ensemble_are_compared_too():
    ensemble = assemble([resnet(), vit()], preprocessing="shared")
    ensemble.members["1"].reset_classifier(0, "avg")
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        changed = assemble([ensemble])
        assert torch.equal(changed(pixels).pooler_output, ensemble(pixels).pooler_output)
    assert changed.config.members[1]["model_args"]["global_pool"] == "avg"
    ensemble.members["0"].act1 = nn.SiLU()
    with pytest.raises(ValueError, match=r"members\[0\]: the ResNet in memory .* act1 is SiLU, not ReLU"):
        assemble([ensemble])


CLASSIFIERS = ("levit_128s", "efficientvit_m0", "iformer_t", "repvit_m0_9", "efficientformer_l1", "crossvit_tiny_240")


@pytest.mark.parametrize(
    "architecture", [*CLASSIFIERS, "vit_tiny_patch16_224", "crossvit_tiny_240", "mobilenetv3_small_050"]
)
@torch.no_grad()
def test_a_classifier_of_any_kind_is_left_out(architecture, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(architecture).eval()
    torch.save(network.state_dict(), tmp_path / f"{architecture}.pth")
    pixels = torch.randn(1, *timm.data.resolve_model_data_config(network)["input_size"])
    expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    for source in (network, tmp_path / f"{architecture}.pth"):
        assert torch.equal(assemble([source])(pixels).pooler_output, expected)
