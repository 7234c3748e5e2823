"""Making an ensemble out of members that come from anywhere."""

import copy
import difflib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from timm.data.model_config import resolve_input_data_config
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.members.checkpoints import PICKLES, fitting, load_backbone, read_checkpoint, weights_sha256
from concat_ensemble.members.converters import convert, load_jax_vit
from concat_ensemble.modeling.configuration_concat_ensemble import (
    IMAGE_MODES,
    MEMBER_KEYS,
    REFUSED_MODEL_ARGS,
    ConcatEnsembleConfig,
    describe_unknown_architecture,
    error_prefix,
    timm_architectures,
    validate_model_args,
    validate_preprocessing,
)
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleModel,
    ConcatEnsemblePreTrainedModel,
    create_backbone,
)

HUB = "hf-hub:"
RANDOM = "random:"
OURS = ("num_classes", "pretrained")  # of timm's arguments: what a member has in its own way


@dataclass
class _Member:
    backbone: nn.Module
    spec: dict[str, Any]  # as in ConcatEnsembleConfig.members
    projection: nn.Linear | None = None  # of the ensemble that it comes from


def assemble(
    members: Iterable[str | Path | nn.Module], *, preprocessing: str = "own", seed: int = 0, license: str | None = None
) -> ConcatEnsembleModel:
    """Concatenate backbones into one model.

    Args:
        members: Each one of

            - a timm name with its pretrained weights (`"resnet50.a1_in1k"`), or `"random:resnet50"` for untrained
              ones;
            - `"hf-hub:org/name@revision"`: a timm model or an ensemble on the Hub;
            - a folder saved by timm (`timm.models.save_for_hf`), by `training/pretrain_members.py`, or an ensemble's;
            - a checkpoint file whose stem is its timm architecture, or `"resnet50=path/to/file.pth"`; see
              `checkpoints.read_checkpoint`, and `converters` for the layouts of the paper's systems;
            - a timm model, or an ensemble, in memory. An ensemble's members are taken in, in their order, and its
              projection too where it is the only one.
        preprocessing: `"own"`: every member sees what timm's evaluation transform would give it. `"shared"`: all see
            what the first one does, which is faster and changes the others' features.
        seed: Of the untrained members: the one at place k has `seed + k`.
        license: An SPDX-like identifier for the members whose source names none.

    Returns:
        The model in evaluation mode, on the CPU, in float32. Where each member came from, and the sha256 of its
        weights, is in `config.members[k]["provenance"]`.

    Raises:
        ValueError, FileNotFoundError: in one line that names the member and the way out.
    """
    if preprocessing not in ("own", "shared"):
        raise ValueError(f"preprocessing={preprocessing!r} must be 'own' or 'shared'.")
    if isinstance(members, str | Path | nn.Module):
        members = [members]
    members = list(members)
    taken: list[_Member] = []
    for source in members:
        taken += _take(source, seed + len(taken))
    if not taken:
        raise ValueError("members is empty; name at least one, such as 'resnet50.a1_in1k' or a checkpoint file.")
    for k, member in enumerate(taken):
        if preprocessing == "shared":
            member.spec["preprocessing"] = taken[0].spec["preprocessing"]
        if license:
            member.spec["provenance"].setdefault("license", license)
        member.spec["provenance"]["weights_sha256"] = weights_sha256(member.backbone.state_dict())
        member.spec["num_features"] = _pooled_width(k, member)
    projection = taken[0].projection if len(members) == 1 else None
    width = None if projection is None else projection.out_features
    config = ConcatEnsembleConfig(members=[member.spec for member in taken], projection_dim=width)
    with torch.device("meta"):
        model = ConcatEnsembleModel(config)
    model.projection = copy.deepcopy(projection)
    model.members = nn.ModuleDict({str(k): member.backbone for k, member in enumerate(taken)})
    return model.float().eval()


def _take(source: str | Path | nn.Module, seed: int) -> list[_Member]:
    if isinstance(source, nn.Module):
        return _from_module(source)
    text = str(source)
    if text.startswith(HUB):
        return _from_hub(text)
    if text.startswith(RANDOM):
        return [_untrained(text.removeprefix(RANDOM), seed)]
    if Path(text).is_dir():
        return _from_folder(Path(text))
    architecture, _, path = text.rpartition("=")
    if architecture or Path(path).is_file() or path.endswith((".safetensors", ".npz", *PICKLES)):
        return [_from_file(Path(path), architecture)]
    if "/" in text:
        near = difflib.get_close_matches(text, map(str, Path(text).parent.glob("*")), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no folder {text}; {meant}Of the Hub's, name {HUB}ORG/NAME.")
    return _pretrained(text)


def _from_module(module: nn.Module) -> list[_Member]:
    if (
        isinstance(module, ConcatEnsemblePreTrainedModel)
        or getattr(getattr(module, "config", None), "model_type", "") == "concat_ensemble"
    ):
        specs = [module.config.members[k] for k in module.config.built_members]
        # Copies: the ensemble that is taken in keeps its dtype, its mode and its place.
        return [
            _Member(
                copy.deepcopy(member).cpu().float(), json.loads(json.dumps(spec)), getattr(module, "projection", None)
            )
            for member, spec in zip(module.members.values(), specs, strict=True)
        ]
    if not hasattr(module, "pretrained_cfg"):
        raise ValueError(
            f"{type(module).__name__} is not a timm model; members are timm architectures: make it with timm.create_model(...)."
        )
    bare = create_backbone(module.pretrained_cfg["architecture"], **_model_args(module))
    load_backbone(bare, module.state_dict(), f"the {type(module).__name__} in memory")
    return [_described(bare, {"source": "a model in memory"}, pretrained_cfg=module.pretrained_cfg)]


def _pretrained(name: str) -> list[_Member]:
    _known(name)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm's way of saying that the architecture has no such weights
        known = None
    if known is None or not known.hf_hub_id:
        architecture = name.split(".")[0]
        near = difflib.get_close_matches(name, timm.list_pretrained(f"{architecture}.*"), n=3)
        meant = f"did you mean {' or '.join(near)}? Else " if near else ""
        raise ValueError(
            f"timm has no pretrained weights for {name!r}; {meant}give {architecture}=FILE, or random:{architecture} for untrained ones."
        )
    repo = known.hf_hub_id + (f"{known.architecture}.{known.tag}" if known.hf_hub_id.endswith("/") else "")
    return _from_hub(HUB + repo)


def _untrained(name: str, seed: int) -> _Member:
    _known(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(name)
    return _described(
        backbone,
        {
            "source": f"{RANDOM}{name}",
            "objective": "none (random weights)",
            "seed": seed,
            "steps": 0,
            "license": "apache-2.0",
        },
    )


def _from_hub(name: str) -> list[_Member]:
    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        # One question without retries; the file downloads below would ask six times over half a minute before they
        # gave up.
        commit = HfApi(library_name="concat-ensemble").model_info(repo, revision=revision or None, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name} is not on the Hub ({first_line(error)}); check its name and revision, or log in with hf auth login."
        ) from error
    except (ConnectionError, HTTPError):  # no network: what the cache has
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
        if not isinstance(cached, str):
            raise ValueError(
                f"cannot reach the Hub for {name}, and it is not in the cache; give ARCHITECTURE=FILE or a folder."
            ) from None
        commit = Path(cached).parent.name  # the cache keeps a folder per commit
    config = _read_config(Path(hf_hub_download(repo, "config.json", revision=commit)))
    if config.get("model_type") == "concat_ensemble":
        taken = _from_module(ConcatEnsembleModel.from_pretrained(repo, revision=commit))
        for member in taken:
            member.spec["provenance"] |= {"taken_from": repo, "taken_from_revision": commit}
        return taken
    model_args = _checked_args(config, name)
    with torch.device("meta"):  # one too large is refused here
        create_backbone(config["architecture"], **model_args)
    backbone = timm.create_model(f"{HUB}{repo}@{commit}", pretrained=True, num_classes=0)
    return [
        _described(
            backbone,
            {
                "source": HUB + repo,
                "hub_id": repo,
                "revision": commit,
                "license": backbone.pretrained_cfg.get("license"),
            },
        )
    ]


def _from_folder(folder: Path) -> list[_Member]:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; give a folder saved by timm or an ensemble's, or a checkpoint as NAME=FILE."
        )
    config = _read_config(folder / "config.json")
    if config.get("model_type") == "concat_ensemble":
        return _from_module(ConcatEnsembleModel.from_pretrained(folder))
    model_args = _checked_args(config, str(folder))
    weights = folder / "model.safetensors"
    if not weights.is_file() and (folder / "pytorch_model.bin").is_file():
        raise ValueError(
            f"{folder} has its weights in pytorch_model.bin; give {config['architecture']}={folder / 'pytorch_model.bin'} if you want it read."
        )
    tensors = read_checkpoint(weights)[0]
    with torch.device("meta"):  # one that the file does not hold is refused before it takes memory
        found = fitting(create_backbone(config["architecture"], **model_args), tensors, str(weights))
    backbone = create_backbone(config["architecture"], **model_args)
    backbone.load_state_dict(found, strict=False)
    pretrained = config.get("pretrained_cfg") or {}
    provenance = {"source": folder.name, "license": pretrained.get("license")} | (config.get("provenance") or {})
    return [_described(backbone, provenance, pretrained_cfg=pretrained)]


def _read_config(path: Path) -> dict[str, Any]:
    """Of timm's or of an ensemble's folder."""
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:  # ValueError: not JSON, or not text
        raise ValueError(f"{path} is not JSON ({error}); save the model again.") from error
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key) or {}, dict) for key in ("model_args", "pretrained_cfg", "provenance")
    ):
        raise ValueError(f"{path} is not a model's config; save the model again.")
    return config


def _checked_args(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A stranger's arguments for timm, without those that timm itself would give."""
    _known(config.get("architecture"))
    given = config.get("model_args") or {}
    with error_prefix(source):
        return validate_model_args({key: value for key, value in given.items() if key not in OURS})


def _from_file(path: Path, architecture: str) -> _Member:
    is_jax = path.suffix == ".npz"
    tensors, metadata = ({}, {}) if is_jax else read_checkpoint(path)
    architecture = architecture or metadata.get("architecture") or path.name.split(".")[0]
    if architecture not in timm_architectures():
        raise ValueError(f"{path}: {architecture!r} is not a timm architecture; name it as ARCHITECTURE={path.name}.")
    found = convert(architecture, tensors)
    backbone = create_backbone(found.architecture, **found.model_args)
    if is_jax:
        load_jax_vit(backbone, path)
    else:
        load_backbone(backbone, found.tensors, str(path))
    provenance = {"source": metadata.get("source", path.name), "license": metadata.get("license")}
    return _described(backbone, provenance, pretrained_cfg=backbone.pretrained_cfg | found.pretrained_cfg)


def _known(name: Any) -> None:
    if str(name).split(".")[0] not in timm_architectures():
        raise ValueError(describe_unknown_architecture(name))


def _model_args(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in getattr(module, "_model_args", {}).items() if key not in REFUSED_MODEL_ARGS}


def _described(
    backbone: nn.Module, provenance: dict[str, Any], pretrained_cfg: dict[str, Any] | None = None
) -> _Member:
    timm_logger = logging.getLogger("timm.data.model_config")
    timm_logger.setLevel(
        logging.ERROR
    )  # it warns that a grey model's mean is averaged over the channels, which is what we want
    name = backbone.pretrained_cfg["architecture"]
    try:
        pixels = resolve_input_data_config(backbone, pretrained_cfg=pretrained_cfg or backbone.pretrained_cfg)
        channels = pixels["input_size"][0]
        pixels |= {key: [*pixels[key]] * (channels if len(pixels[key]) == 1 else 1) for key in ("mean", "std")}
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its pretrained_cfg does not say what it sees ({error!r}).") from error
    if channels not in IMAGE_MODES:
        modes = " or ".join(map(str, IMAGE_MODES))
        raise ValueError(f"{name}: it takes {channels} channels; images have {modes}.")
    with error_prefix(name):
        preprocessing = validate_preprocessing({**pixels, "image_mode": IMAGE_MODES[channels]})
    spec = dict.fromkeys(MEMBER_KEYS) | {
        "architecture": name,
        "model_args": _model_args(backbone),
        "preprocessing": preprocessing,
        "provenance": {key: value for key, value in provenance.items() if value is not None},
    }
    return _Member(backbone, spec)


@torch.no_grad()
def _pooled_width(k: int, member: _Member) -> int:
    """Width of the pooled features, measured: timm's `num_features` is another number for MobileNetV3, EfficientViT
    and InceptionNeXt.
    """
    name, size = member.spec["architecture"], member.spec["preprocessing"]["input_size"]
    try:
        pooled = member.backbone.eval()(torch.zeros(1, *size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"member {k} ({name}) cannot take an image of {tuple(size)}: {first_line(error)}") from error
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2:
        got = tuple(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        raise ValueError(
            f"member {k} ({name}) has no pooled features: it returns {got}, not (B, num_features); set its global_pool or take another."
        )
    return pooled.shape[1]
