"""What timm says of the weights that it has for an architecture, which is true of no others.

timm's description of a network (`pretrained_cfg`) has the licence, the tag and the papers of its own pretrained
weights, whatever the weights are, and timm saves them beside any weights of that architecture.
"""

from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import nn

from concat_ensemble.members.checkpoints import timm_cfg

ORIGIN = ("license", "tag", "origin_url", "paper_name", "paper_ids", "description", "notes")
ORIGIN += ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
TRAINED_HERE = ("trained by training/", "distilled by training/")  # how a provenance's source begins


def remove_origin(network: nn.Module) -> None:
    """Remove from timm's description of a network what it says of weights."""
    for key in ORIGIN:
        timm_cfg(network).pop(key, None)


def read_license(
    architecture: str, pretrained_cfg: dict[str, Any], *, provenance: dict[str, Any] | None = None, repo: str = ""
) -> str | None:
    """The licence of weights by what was saved beside them: timm's description of the network and, of weights that the
    scripts of `training/` made, their provenance. None if they do not state it.

    A tag and a licence of timm's own state something only of the weights in timm's own repo.
    """
    if provenance and str(provenance.get("source")).startswith(TRAINED_HERE):
        return provenance.get("license")  # older ones have another in `pretrained_cfg`, which nobody has chosen
    license, timms = pretrained_cfg.get("license"), find_pretrained_cfg(f"{architecture}.{pretrained_cfg.get('tag')}")
    return None if timms and license == timms.license and repo != name_repo(timms) else license


def find_pretrained_cfg(name: str) -> PretrainedCfg | None:
    """What timm knows of the weights of this name, such as `resnet18.a1_in1k`, which may have a tag that it does not
    know."""
    return timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None


def name_repo(pretrained: PretrainedCfg) -> str | None:
    """Hub id of weights that timm knows; None if they are elsewhere."""
    repo = pretrained.hf_hub_id
    return f"{repo}{pretrained.architecture}.{pretrained.tag}" if repo and repo.endswith("/") else repo
