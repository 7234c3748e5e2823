"""Checkpoints of the paper's systems (Figures 4 and 5), from the layouts of their authors to timm's keys.

Each `from_...` is a pure function of a state dict. It renames the keys that it knows and leaves the others unchanged,
so that `checkpoints.load_backbone` can list them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.files import check_array
from concat_ensemble.members.checkpoints import Tensors, timm_cfg
from concat_ensemble.members.pickles import refuse_bomb

# Prefixes that training scripts add to the keys of these layouts.
WRAPPERS = re.compile(r"(?:module|_orig_mod|timm_model|model0|model|backbone|encoder|net)\.")
Rule = tuple[str, str | Callable[[re.Match], str]]

# Evaluation transform of all these authors: resize the shorter side to 256, crop the central 224 x 224.
EVALUATION = {"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
EVALUATION |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Arguments for `timm.create_model` and `load_backbone`; `pretrained_cfg` overrides entries of timm's."""

    architecture: str
    tensors: Tensors
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


def convert(architecture: str, tensors: Tensors) -> Converted:
    """Recognize the layout of a checkpoint by its keys, and rename these to timm's.

    A ResNet whose first convolution has 64 w channels is w times as wide as `architecture`. timm's `resnet50` cannot
    widen its stem, but its `resnetv2_50` can, and without pre-activation it is the same network.

    `architecture` is a timm name, such as `resnet50` or `regnety_320`. Tensors with timm's keys stay unchanged.
    """
    model_args, pretrained_cfg = {}, {}
    for family, mark, rename in LAYOUTS:
        if architecture.startswith(family) and any(map(mark.search, tensors)):
            tensors, pretrained_cfg = rename(tensors), EVALUATION
    stem = next((tensor for key, tensor in tensors.items() if WRAPPERS.sub("", key) == "conv1.weight"), None)
    if re.fullmatch(r"resnet(50|101|152)", architecture) and stem is not None and len(stem) in (128, 192, 256, 320):
        architecture, tensors = architecture.replace("resnet", "resnetv2_"), from_wide_resnet(tensors)
        model_args, pretrained_cfg = {"width_factor": len(stem) // 64, "preact": False}, EVALUATION
    return Converted(architecture=architecture, tensors=tensors, model_args=model_args, pretrained_cfg=pretrained_cfg)


def from_timecat(tensors: Tensors) -> Tensors:
    """ResNet-50 of the paper's Figure 4 (`facebookresearch/richreps-timecat`), which names a shortcut's two layers."""
    return _rename(tensors, [(r"\bdownsample\.conv\.", "downsample.0."), (r"\bdownsample\.bn\.", "downsample.1.")])


def from_swav(tensors: Tensors) -> Tensors:
    """SwAV's ResNet-50 (`facebookresearch/swav`; the paper's Figure 5), without its projection head and prototypes.

    Its stem pads by 1 and then by 2, which equals torchvision's padding by 3.
    """
    return _rename(tensors, [(r"^(projection_head|prototypes)\..*", "")])


def from_wide_resnet(tensors: Tensors) -> Tensors:
    """A ResNet with torchvision's keys, for timm's `resnetv2` with `preact=False`."""
    rules = [
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.norm."),
        (r"^layer(\d)\.", lambda stage: f"stages.{int(stage[1]) - 1}.blocks."),
        (r"\bbn(\d)\.", r"norm\1."),
        (r"\bdownsample\.0\.", "downsample.conv."),
        (r"\bdownsample\.1\.", "downsample.norm."),
        (r"^fc\.", "head.fc."),
    ]
    return _rename(tensors, rules)


def from_vissl(tensors: Tensors) -> Tensors:
    """RegNet-Y of SEER (`facebookresearch/vissl`; the paper's Figure 5): ClassyVision's blocks in VISSL's stages.

    In large networks, VISSL splits a stage into parts, whose names stand between those of the stage and its blocks.
    """
    rules = [
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
    ]
    return _rename(tensors, rules)


# Family of architectures, pattern of keys that only this layout has, and converter.
LAYOUTS = (
    ("resnet", re.compile(r"\blayer\d\.0\.downsample\.(conv|bn)\."), from_timecat),
    ("resnet", re.compile(r"\b(projection_head|prototypes)\."), from_swav),
    ("regnet", re.compile(r"\b_feature_blocks\."), from_vissl),
)


def load_jax_vit(backbone: nn.Module, path: Path) -> None:
    """Load Google's `.npz` weights (original and augreg; the paper's Figure 5) into a timm ViT with `num_classes=0`.

    timm reads the file; this checks that it neither omitted, resized nor broadcast anything. timm's GELU is exact, as
    in the port that the paper's authors used; Flax has the tanh approximation.

    Raises:
        ValueError: if the file holds objects, or anything but the weights of this architecture.
        FileNotFoundError: if it does not exist.
    """
    name = timm_cfg(backbone).get("architecture")
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"{path}: .npz holds a vision transformer, not {name}; name it as vit_base_patch16_224=FILE.")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}.")
    refuse_bomb(path)
    mismatch, remedy = f"{path} does not hold the weights of {name}", "name the right architecture, as NAME=FILE"
    try:
        with ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    check_array(file, entry.file_size)
        with np.load(path, allow_pickle=False) as file:
            sizes = {key: file[key].size for key in file.files}
        backbone.load_pretrained(str(path))
    except KeyError as error:
        raise ValueError(f"{mismatch}; missing: {error.args[0]}; {remedy}.") from error
    except (AttributeError, BadZipFile, EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{mismatch} ({first_line(error)}); {remedy}, or fetch the file again.") from error
    actual = sum(size for key, size in sizes.items() if not re.search(r"(^|/)(head|pre_logits)/", key))
    expected = sum(parameter.numel() for parameter in backbone.parameters())
    if actual != expected:  # timm resizes position embeddings and ignores further blocks
        numbers = f"it has {actual:,} numbers, not {expected:,}"
        raise ValueError(f"{mismatch}: {numbers}; {remedy} (depth and image size count).")


def _rename(tensors: Tensors, rules: list[Rule]) -> Tensors:
    """Apply regular expressions in order to the part of each key after its wrappers; drop keys that become empty."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        name = re.sub(f"^(?:{WRAPPERS.pattern})*", "", key)
        wrappers = key.removesuffix(name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if wrappers + name in renamed:
            raise ValueError(f"the checkpoint has {name} under two names, one of them {key}; remove one.")
        if name:
            renamed[wrappers + name] = tensor
    return renamed
