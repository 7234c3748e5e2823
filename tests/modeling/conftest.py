"""Small members of every kind with random weights, and the features that timm itself computes with them."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from concat_ensemble import ConcatEnsembleModel

torch.set_num_threads(1)

SMALL = {"channels": (8, 16, 32, 64)}
# Architecture, arguments of `timm.create_model` that make it small, and overrides of its evaluation transform. The
# first two share a geometry but not mean and std; the others differ in size, crop, interpolation or channels.
KINDS = {
    "resnet18": ("resnet18", SMALL, {"input_size": (3, 64, 64)}),
    "resnet50": ("resnet50", SMALL, {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}),
    "resnetblur50": ("resnetblur50", SMALL, {"input_size": (3, 64, 64), "interpolation": "bilinear"}),
    "wide": ("wide_resnet50_2", SMALL, {"input_size": (3, 64, 64), "interpolation": "lanczos"}),
    "vit-tiny": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, {"input_size": (3, 32, 32)}),
    "vit-small": ("vit_small_patch16_224", {"depth": 1, "img_size": 48}, {"input_size": (3, 48, 48)}),
    "deit": (
        "deit_tiny_patch16_224",
        {"depth": 2, "img_size": 32},
        {"input_size": (3, 32, 32), "crop_mode": "border", "crop_pct": 1.0},
    ),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}, {"input_size": (3, 56, 56)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1), "embed_dim": 24},
        {"input_size": (3, 64, 64), "crop_mode": "squash"},
    ),
    "coat": (  # its blocks share layers, so its weights have several names
        "coat_tiny",
        {"img_size": 32, "embed_dims": (8, 16, 16, 16), "parallel_depth": 1},
        {"input_size": (3, 32, 32)},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, {"input_size": (3, 48, 80)}),
    "efficientnet": ("tf_efficientnet_lite0", {}, {"input_size": (3, 64, 64)}),
    "regnety": ("regnety_002", {}, {"input_size": (3, 64, 64)}),
    "mobilenetv3": ("mobilenetv3_small_050", {}, {"input_size": (3, 64, 64)}),
    "grey": (
        "resnet10t",
        {**SMALL, "stem_width": 8, "in_chans": 1},
        {"input_size": (1, 32, 32), "mean": (0.4,), "std": (0.3,), "crop_pct": 1.0},
    ),
}


def pytest_generate_tests(metafunc):
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", KINDS)


def _backbone(kind: str, seed: int = 0) -> nn.Module:
    architecture, model_args, pixels = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=pixels, **model_args)
        for tensor in backbone.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                # In timm's initialization, norms and layer scales are all alike and many residual blocks return zero,
                # which would hide a lost tensor.
                tensor += 0.2 * torch.rand_like(tensor)
    return backbone.eval()


def _transform(backbone: nn.Module) -> Callable[[PIL.Image.Image], torch.Tensor]:
    settings = timm.data.resolve_model_data_config(backbone)
    transform = timm.data.create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    return lambda image: transform(image.convert(mode))


@torch.no_grad()
def _spec(kind: str, backbone: nn.Module) -> dict:
    architecture, model_args, _ = KINDS[kind]
    pixels = timm.data.resolve_model_data_config(backbone)
    channels = pixels["input_size"][0]
    return {
        "architecture": architecture,
        "model_args": model_args,
        "num_features": backbone(torch.zeros(1, *pixels["input_size"])).shape[1],
        "preprocessing": {**pixels, "image_mode": {1: "L", 3: "RGB"}[channels]},
        "provenance": {"source": "random", "seed": 0},
    }


@pytest.fixture(scope="session")
def kinds() -> tuple[str, ...]:
    """All of them. A test with a `kind` fixture runs once for each."""
    return tuple(KINDS)


@pytest.fixture(scope="session")
def backbone() -> Callable[..., nn.Module]:
    """`backbone(kind, seed)`: timm's own model."""
    return _backbone


@pytest.fixture(scope="session")
def spec() -> Callable[..., dict]:
    """`spec(kind)`: the member's entry in a configuration, from timm's config of its model."""
    return lambda kind: _spec(kind, _backbone(kind))


@pytest.fixture(scope="session")
def build():
    """`build(*kinds, cls=..., **config)`: an ensemble in evaluation mode, and timm's own models with its weights."""

    def build(*kinds: str, cls=ConcatEnsembleModel, **config):
        backbones = [_backbone(kind, seed) for seed, kind in enumerate(kinds)]
        members = [_spec(kind, backbone) for kind, backbone in zip(kinds, backbones, strict=True)]
        model = cls(cls.config_class(members=members, **config)).eval()
        for k, backbone in enumerate(backbones):
            if str(k) in model.members:  # not where active_members leaves it out
                model.members[str(k)].load_state_dict(backbone.state_dict())
        return model, backbones

    return build


@pytest.fixture(scope="session")
def transform():
    """`transform(backbone)`: from a PIL image to what timm's evaluation transform gives this model."""
    return _transform


@pytest.fixture(scope="session")
def timm_features():
    """`timm_features(backbone, images)`: (B, D), by timm alone."""
    return torch.no_grad(
        lambda backbone, images: backbone(torch.stack([_transform(backbone)(image) for image in images]))
    )


@pytest.fixture(scope="session")
def noise():
    """`noise(model, n)`: pixel values of the shape that the model takes, the same every time."""
    return lambda model, n=2: torch.randn(n, *model.config.pixel_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def photos() -> list[PIL.Image.Image]:
    """Two photographs in five shapes: whole, upright, a wide and a tall strip, and smaller than any input."""
    temple, flower = (PIL.Image.fromarray(np.asarray(image)) for image in load_sample_images().images)
    boxes = [(temple, (0, 0, 640, 427)), (flower, (100, 7, 400, 427)), (temple, (20, 150, 620, 250))]
    boxes += [(flower, (250, 20, 350, 420)), (temple, (200, 200, 230, 220))]
    return [photo.crop(box) for photo, box in boxes]
