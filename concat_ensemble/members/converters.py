"""Checkpoints of the paper's systems (Figures 4 and 5) in the layouts of those who trained them, under timm's keys.

Each `from_...` is a pure function of a state dict. It renames keys and leaves alone those that it does not know, so that
`checkpoints.load_backbone` can name them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.members.checkpoints import WRAPPERS, refuse_bomb

Tensors = dict[str, torch.Tensor]
Rule = tuple[str, str | Callable[[re.Match], str]]

# What all these authors evaluate with: the shorter side to 256, then the 224 x 224 in the middle.
EVALUATION = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `timm.create_model` and `load_backbone` need; `pretrained_cfg` is what timm's own is to be overlaid with."""

    architecture: str
    tensors: Tensors
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


def convert(architecture: str, tensors: Tensors) -> Converted:
    """Recognise a layout by its keys, and give `tensors` timm's.

    A ResNet whose first convolution has 64 w channels is w times as wide as `architecture`. timm's `resnet50` cannot
    widen its stem; its `resnetv2_50` can, and without pre-activation it is the same network.

    Args:
        architecture: What the checkpoint is said to be: `resnet50` or `regnety_320`, for instance.
        tensors: As `checkpoints.read_checkpoint` gives them. What has timm's keys already comes back as it is.
    """
    known = [of for name, mark, of in LAYOUTS if architecture.startswith(name) and any(map(mark.search, tensors))]
    for layout in known:
        tensors = layout(tensors)
    pretrained_cfg = EVALUATION if known else {}
    stem = next((tensor for key, tensor in tensors.items() if WRAPPERS.sub("", key) == "conv1.weight"), None)
    if re.fullmatch(r"resnet(50|101|152)", architecture) and stem is not None and len(stem) in (128, 192, 256, 320):
        return Converted(
            architecture=architecture.replace("resnet", "resnetv2_"),
            tensors=from_wide_resnet(tensors),
            model_args={"width_factor": len(stem) // 64, "preact": False},
            pretrained_cfg=EVALUATION,
        )
    return Converted(architecture=architecture, tensors=tensors, pretrained_cfg=pretrained_cfg)


def from_timecat(tensors: Tensors) -> Tensors:
    """ResNet-50 of the paper's Figure 4 (`facebookresearch/richreps-timecat`, trained with AlgoPerf), which names the two
    parts of a shortcut.
    """
    return _renamed(tensors, [(r"\bdownsample\.conv\.", "downsample.0."), (r"\bdownsample\.bn\.", "downsample.1.")])


def from_swav(tensors: Tensors) -> Tensors:
    """SwAV's ResNet-50 (`facebookresearch/swav`; the paper's Figure 5), without its projection head and prototypes.

    Its stem pads by 1 and then by 2, which is torchvision's 3.
    """
    return _renamed(tensors, [(r"^(projection_head|prototypes)\..*", "")])


def from_wide_resnet(tensors: Tensors) -> Tensors:
    """A ResNet with torchvision's keys, under those of timm's `resnetv2` with `preact=False`."""
    return _renamed(tensors, [
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.norm."),
        (r"^layer(\d)\.", lambda stage: f"stages.{int(stage[1]) - 1}.blocks."),
        (r"\bbn(\d)\.", r"norm\1."),
        (r"\bdownsample\.0\.", "downsample.conv."),
        (r"\bdownsample\.1\.", "downsample.norm."),
        (r"^fc\.", "head.fc."),
    ])  # fmt: skip


def from_vissl(tensors: Tensors) -> Tensors:
    """RegNet-Y of SEER (`facebookresearch/vissl`; the paper's Figure 5): ClassyVision's blocks under VISSL's stages.

    Large ones were trained in parts, which stand between a stage and its blocks.
    """
    return _renamed(tensors, [
        (r"^_feature_blocks\.conv1\.stem\.0\.", "stem.conv."),
        (r"^_feature_blocks\.conv1\.stem\.1\.", "stem.bn."),
        (
            r"^_feature_blocks\.res\d\.(?:block\d-part\d+\.)?block(\d)-(\d+)\.",
            lambda block: f"s{block[1]}.b{int(block[2]) + 1}.",
        ),
        (r"^(s\d\.b\d+)\.proj\.", r"\1.downsample.conv."),
        (r"^(s\d\.b\d+)\.bn\.", r"\1.downsample.bn."),
        (r"\.f\.a\.0\.", ".conv1.conv."),
        (r"\.f\.a\.1\.", ".conv1.bn."),
        (r"\.f\.b\.0\.", ".conv2.conv."),
        (r"\.f\.b\.1\.", ".conv2.bn."),
        (r"\.f\.c\.", ".conv3.conv."),
        (r"\.f\.final_bn\.", ".conv3.bn."),
        (r"\.f\.se\.excitation\.0\.", ".se.fc1."),
        (r"\.f\.se\.excitation\.2\.", ".se.fc2."),
    ])  # fmt: skip


# Architectures of timm, a key that only this layout has, and what reads it.
LAYOUTS = (
    ("resnet", re.compile(r"\blayer\d\.0\.downsample\.(conv|bn)\."), from_timecat),
    ("resnet", re.compile(r"\b(projection_head|prototypes)\."), from_swav),
    ("regnet", re.compile(r"\b_feature_blocks\."), from_vissl),
)


def load_jax_vit(backbone: nn.Module, path: Path) -> None:
    """Load Google's `.npz` weights (original and augreg; the paper's Figure 5) into a timm ViT made with `num_classes=0`,
    by timm's own reader, and see that nothing was left out, resized or spread.

    timm's GELU is exact, as in the port that the paper's authors ran; Flax's own is the tanh approximation.

    Raises:
        ValueError: when the file holds something else than the weights of this architecture, or objects.
        FileNotFoundError: when there is none.
    """
    name = backbone.pretrained_cfg.get("architecture")
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"{path}: .npz holds a vision transformer, not {name}; name it as vit_base_patch16_224=FILE.")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}.")
    refuse_bomb(path)
    wrong = f"{path} does not hold the weights of {name}"
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes = {key: file[key].size for key in file.files}
        backbone.load_pretrained(str(path))
    except KeyError as error:
        raise ValueError(f"{wrong}; missing: {error.args[0]}. Name the right architecture, as NAME=FILE.") from error
    except (AttributeError, BadZipFile, EOFError, OSError, RuntimeError, TypeError, ValueError) as error:  # all seen
        raise ValueError(
            f"{wrong} ({first_line(error)}); name the right one, as NAME=FILE, or fetch it again."
        ) from error
    held = sum(size for key, size in sizes.items() if not re.search(r"(^|/)(head|pre_logits)/", key))
    wanted = sum(parameter.numel() for parameter in backbone.parameters())
    if held != wanted:  # timm resizes position embeddings and ignores further blocks
        raise ValueError(
            f"{wrong}: it has {held:,} numbers, not {wanted:,}; name the one of its depth and image size, as NAME=FILE."
        )


def _renamed(tensors: Tensors, rules: list[Rule]) -> Tensors:
    """Apply regular expressions in their order to each key, behind the wrappers that training put before it; a key that
    nothing is left of is dropped.
    """
    found: Tensors = {}
    for key, tensor in tensors.items():
        wrappers = re.match(f"(?:{WRAPPERS.pattern})*", key)[0]
        name = key.removeprefix(wrappers)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if wrappers + name in found:
            raise ValueError(f"the checkpoint has {name} under two names, one of them {key}; remove one.")
        if name:
            found[wrappers + name] = tensor
    return found
