"""Making an ensemble out of members that come from anywhere."""

import copy
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from timm.data.model_config import resolve_input_data_config
from torch import nn

from concat_ensemble.errors import first_line, suggest
from concat_ensemble.members.checkpoints import (
    PICKLES,
    load_backbone,
    match_state_dict,
    read_checkpoint,
    timm_cfg,
    weights_sha256,
)
from concat_ensemble.members.converters import convert, load_jax_vit
from concat_ensemble.modeling.configuration_concat_ensemble import (
    CHANNELS,
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

Source = str | Path | nn.Module
HUB, RANDOM = "hf-hub:", "random:"


@dataclass
class _Member:
    backbone: nn.Module
    spec: dict[str, Any]  # an entry of ConcatEnsembleConfig.members
    projection: nn.Linear | None = None  # of the ensemble that it was a member of


def assemble(
    members: Source | Iterable[Source],
    *,
    preprocessing: str = "own",
    channels: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    license: str | None = None,
) -> ConcatEnsembleModel:
    """Concatenate backbones into one model.

    Args:
        members: One or several of

            - a timm name for its pretrained weights (`"resnet50.a1_in1k"`), or `"random:resnet50"` for untrained ones;
            - `"hf-hub:org/name@revision"`: a timm model or an ensemble on the Hub;
            - a folder saved by timm (`timm.models.save_for_hf`), by `training/pretrain_members.py`, or an ensemble's;
            - a checkpoint file whose stem is its timm architecture, or `"resnet50=path/to/file.pth"`; see
              `checkpoints.read_checkpoint`, and `converters` for the layouts of the paper's systems;
            - a timm model or an ensemble in memory.

            An ensemble contributes its members in their order, and also its projection if it is the only source.
        preprocessing: `"own"`: every member gets its timm evaluation transform. `"shared"`: all members get the first
            member's, which is faster and changes the features of the others.
        channels: Numbers of the channels of an image that each of these members sees, from 0, as many as it takes.
            Default: gray or RGB for members of 1 and 3 channels, the first channels for others.
        mean, std: One number for each channel, in place of timm's. For a member of other than 3 channels, timm takes
            the average of an RGB mean and std for all of them.
        seed: Random seed of the untrained members: member k has `seed + k`.
        license: SPDX-like identifier for members whose source names no license.

    Returns:
        The model in evaluation mode, on the CPU, in float32. `config.members[k]["provenance"]` holds the source of
        member k and the sha256 of its weights.

    Raises:
        ValueError, FileNotFoundError: for a member that cannot be loaded, in one line that names it and the remedy.
    """
    if preprocessing not in ("own", "shared"):
        raise ValueError(f"preprocessing={preprocessing!r} must be 'own' or 'shared'.")
    sources = [members] if isinstance(members, Source) else list(members)
    loaded: list[_Member] = []
    for source in sources:
        loaded += _load_members(source, seed + len(loaded))
    if not loaded:
        raise ValueError("members is empty; name at least one, such as 'resnet50.a1_in1k' or a checkpoint file.")
    for k, member in enumerate(loaded):
        if preprocessing == "shared":
            member.spec["preprocessing"] = loaded[0].spec["preprocessing"]
        _set_channels(k, member.spec, channels=channels, mean=mean, std=std)
        if license:
            member.spec["provenance"].setdefault("license", license)
        member.spec["provenance"]["weights_sha256"] = weights_sha256(member.backbone.state_dict())
        member.spec["num_features"] = _measure_num_features(k, member)
    return _build_model(loaded, loaded[0].projection if len(sources) == 1 else None)


def _set_channels(k: int, spec: dict[str, Any], **settings: Sequence | None) -> None:
    """Replace those of `channels`, `mean` and `std` that are given in a member's preprocessing."""
    given = {key: list(values) for key, values in settings.items() if values is not None}
    if given:
        mode = {"image_mode": CHANNELS} if CHANNELS in given else {}
        with error_prefix(f"member {k} ({spec['architecture']})"):
            spec["preprocessing"] = validate_preprocessing(spec["preprocessing"] | given | mode)


def _build_model(members: list[_Member], projection: nn.Linear | None) -> ConcatEnsembleModel:
    projection_dim = None if projection is None else projection.out_features
    config = ConcatEnsembleConfig(members=[member.spec for member in members], projection_dim=projection_dim)
    with torch.device("meta"):
        model = ConcatEnsembleModel(config)
    model.projection = copy.deepcopy(projection)
    model.members = nn.ModuleDict({str(k): member.backbone for k, member in enumerate(members)})
    model.mark_members()
    # transformers' own mark, for `init_weights` to leave them alone.
    model.members.apply(lambda module: setattr(module, "_is_hf_initialized", True))
    return model.float().eval()


def _load_members(source: Source, seed: int) -> list[_Member]:
    """Load one source, which may be an ensemble of several members."""
    if isinstance(source, nn.Module):
        return _load_module(source)
    text = str(source)
    if text.startswith(HUB):
        return _load_from_hub(text)
    if text.startswith(RANDOM):
        return [_make_untrained(text.removeprefix(RANDOM), seed)]
    if Path(text).is_dir():
        return _load_folder(Path(text))
    architecture, _, path = text.rpartition("=")
    if architecture or Path(path).is_file() or path.endswith((".safetensors", ".npz", *PICKLES)):
        return [_load_file(Path(path), architecture)]
    if "/" in text:
        hint = suggest(text, map(str, Path(text).parent.glob("*")), limit=1)
        raise ValueError(f"there is no folder {text}{hint} For a model on the Hub, write {HUB}ORG/NAME.")
    return _load_from_hub(HUB + _find_pretrained(text))


def is_ensemble(model: nn.Module) -> TypeGuard[ConcatEnsemblePreTrainedModel]:
    """Whether a model is an ensemble of ours; a class loaded from a repo counts too."""
    return getattr(getattr(model, "config", None), "model_type", "") == "concat_ensemble"


def _load_module(module: nn.Module) -> list[_Member]:
    if is_ensemble(module):
        return _copy_members(module)
    kind = type(module).__name__
    if not hasattr(module, "pretrained_cfg"):
        raise ValueError(f"{kind} is not a timm model, as members must be; make it with timm.create_model(...).")
    pretrained_cfg = timm_cfg(module)
    backbone = create_backbone(pretrained_cfg["architecture"], **_select_model_args(module))
    load_backbone(backbone, module.state_dict(), f"the {kind} in memory")
    return [_make_member(backbone, {"source": "a model in memory"}, pretrained_cfg)]


def _copy_members(ensemble: ConcatEnsemblePreTrainedModel) -> list[_Member]:
    """Copy an ensemble's members, so that the ensemble itself keeps its dtype, mode and device."""
    if any(hasattr(module, "base_layer") for module in ensemble.members.modules()):  # PEFT's layers
        raise ValueError(f"{type(ensemble).__name__} has adapters; merge them first, by PEFT's merge_and_unload().")
    return [
        _Member(copy.deepcopy(backbone).cpu().float(), copy.deepcopy(ensemble.config.members[k]), ensemble.projection)
        for k, backbone in zip(ensemble.config.built_members, ensemble.members.values(), strict=True)
    ]


def _find_pretrained(name: str) -> str:
    """Hub id of the weights that timm knows by this name."""
    _check_architecture(name)
    try:
        pretrained = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm's error for an architecture without such weights
        pretrained = None
    if pretrained is None or not pretrained.hf_hub_id:
        architecture = name.split(".")[0]
        hint = suggest(name, timm.list_pretrained(f"{architecture}.*"))
        remedy = f"For other weights, give {architecture}=FILE; for untrained ones, random:{architecture}"
        raise ValueError(f"timm has no pretrained weights for {name!r}{hint} {remedy}.")
    repo = pretrained.hf_hub_id
    return f"{repo}{pretrained.architecture}.{pretrained.tag}" if repo.endswith("/") else repo


def _make_untrained(name: str, seed: int) -> _Member:
    _check_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(name)
    provenance = {"source": f"{RANDOM}{name}", "objective": "none (random weights)", "seed": seed, "steps": 0}
    return _make_member(backbone, provenance | {"license": "apache-2.0"})


def _load_from_hub(name: str) -> list[_Member]:
    repo, _, revision = name.removeprefix(HUB).partition("@")
    commit = _find_commit(repo, revision or None)
    config = _read_config(Path(hf_hub_download(repo, "config.json", revision=commit)))
    if config.get("model_type") == "concat_ensemble":
        ensemble: Any = ConcatEnsembleModel.from_pretrained(repo, revision=commit)
        members = _copy_members(ensemble)
        for member in members:
            member.spec["provenance"] |= {"taken_from": repo, "taken_from_revision": commit}
        return members
    model_args = _read_model_args(config, name)
    with torch.device("meta"):  # refuses a model that is too large before it takes memory
        create_backbone(config["architecture"], **model_args)
    backbone = timm.create_model(f"{HUB}{repo}@{commit}", pretrained=True, num_classes=0)
    license = timm_cfg(backbone).get("license")
    return [_make_member(backbone, {"source": HUB + repo, "hub_id": repo, "revision": commit, "license": license})]


def _find_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a revision on the Hub or, without a network, in the cache."""
    name = f"{HUB}{repo}" + (f"@{revision}" if revision else "")
    try:
        # One request without retries: file downloads would retry for half a minute before they fail.
        return HfApi(library_name="concat-ensemble").model_info(repo, revision=revision, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        remedy = "check its name and revision, or log in with hf auth login"
        raise ValueError(f"{name} is not on the Hub ({first_line(error)}); {remedy}.") from error
    except (ConnectionError, HTTPError):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(cached, str):
            problem = f"cannot reach the Hub for {name}, and it is not in the cache"
            raise ValueError(f"{problem}; give ARCHITECTURE=FILE or a folder.") from None
        return Path(cached).parent.name  # the cache has a folder for each commit


def _load_folder(folder: Path) -> list[_Member]:
    if not (folder / "config.json").is_file():
        remedy = "give a folder saved by timm or an ensemble's, or a checkpoint as NAME=FILE"
        raise ValueError(f"{folder} has no config.json; {remedy}.")
    config = _read_config(folder / "config.json")
    if config.get("model_type") == "concat_ensemble":
        ensemble: Any = ConcatEnsembleModel.from_pretrained(folder)
        return _copy_members(ensemble)
    model_args = _read_model_args(config, str(folder))
    architecture, weights, pickled = config["architecture"], folder / "model.safetensors", folder / "pytorch_model.bin"
    if not weights.is_file() and pickled.is_file():
        raise ValueError(f"{folder} has pickled weights; to read them, give {architecture}={pickled}.")
    tensors = read_checkpoint(weights)[0]
    with torch.device("meta"):  # refuses a checkpoint of another architecture before the model takes memory
        tensors = match_state_dict(create_backbone(architecture, **model_args), tensors, str(weights))
    backbone = create_backbone(architecture, **model_args)
    backbone.load_state_dict(tensors, strict=False)
    pretrained_cfg = config.get("pretrained_cfg") or {}
    provenance = {"source": folder.name, "license": pretrained_cfg.get("license")} | (config.get("provenance") or {})
    return [_make_member(backbone, provenance, pretrained_cfg)]


def _load_file(path: Path, architecture: str) -> _Member:
    is_jax = path.suffix == ".npz"
    tensors, metadata = ({}, {}) if is_jax else read_checkpoint(path)
    architecture = architecture or metadata.get("architecture") or path.name.split(".")[0]
    if architecture not in timm_architectures():
        raise ValueError(f"{path}: {architecture!r} is not a timm architecture; name it as ARCHITECTURE={path.name}.")
    converted = convert(architecture, tensors)
    backbone = create_backbone(converted.architecture, **converted.model_args)
    if is_jax:
        load_jax_vit(backbone, path)
    else:
        load_backbone(backbone, converted.tensors, str(path))
    provenance = {"source": metadata.get("source", path.name), "license": metadata.get("license")}
    return _make_member(backbone, provenance, timm_cfg(backbone) | converted.pretrained_cfg)


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a timm model or an ensemble."""
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:  # ValueError: not JSON, or not text
        raise ValueError(f"{path} is not JSON ({error}); save the model again.") from error
    sections = ("model_args", "pretrained_cfg", "provenance")
    if not isinstance(config, dict) or not all(isinstance(config.get(key) or {}, dict) for key in sections):
        raise ValueError(f"{path} is not a model's config; save the model again.")
    return config


def _read_model_args(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Check the model arguments in a config that anybody may have written."""
    _check_architecture(config.get("architecture"))
    # A member does not take these two: it has no classifier, and its weights are loaded here.
    ignored = ("num_classes", "pretrained")
    model_args = {key: value for key, value in (config.get("model_args") or {}).items() if key not in ignored}
    with error_prefix(source):
        return validate_model_args(model_args)


def _check_architecture(name: Any) -> None:
    if str(name).split(".")[0] not in timm_architectures():
        raise ValueError(describe_unknown_architecture(name))


def _select_model_args(backbone: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in getattr(backbone, "_model_args", {}).items() if key not in REFUSED_MODEL_ARGS}


def _make_member(
    backbone: nn.Module, provenance: dict[str, Any], pretrained_cfg: dict[str, Any] | None = None
) -> _Member:
    """Add the spec of a member; `pretrained_cfg` says which pixels it takes, by default the backbone's own."""
    # timm warns that it averages the mean of a grayscale model over its channels, which is intended.
    logging.getLogger("timm.data.model_config").setLevel(logging.ERROR)
    name = timm_cfg(backbone)["architecture"]
    try:
        pixels = resolve_input_data_config(backbone, pretrained_cfg=pretrained_cfg or timm_cfg(backbone))
        channels = pixels["input_size"][0]
        pixels |= {key: [*pixels[key]] * (channels if len(pixels[key]) == 1 else 1) for key in ("mean", "std")}
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its pretrained_cfg does not describe its input images ({error!r}).") from error
    pixels["image_mode"] = IMAGE_MODES.get(channels, CHANNELS)
    if channels not in IMAGE_MODES:
        pixels[CHANNELS] = list(range(channels))
    with error_prefix(name):
        preprocessing = validate_preprocessing(pixels)
    spec = dict.fromkeys(MEMBER_KEYS) | {
        "architecture": name,
        "model_args": _select_model_args(backbone),
        "preprocessing": preprocessing,
        "provenance": {key: value for key, value in provenance.items() if value is not None},
    }
    return _Member(backbone, spec)


@torch.no_grad()
def _measure_num_features(k: int, member: _Member) -> int:
    """Run a member once: timm's `num_features` is another number for MobileNetV3, EfficientViT and InceptionNeXt."""
    name, input_size = member.spec["architecture"], member.spec["preprocessing"]["input_size"]
    try:
        pooled = member.backbone.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        problem = f"member {k} ({name}) cannot take an image of {tuple(input_size)}"
        raise ValueError(f"{problem}: {first_line(error)}") from error
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2:
        output = tuple(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        problem = f"member {k} ({name}) has no pooled features: it returns {output}, not (B, num_features)"
        raise ValueError(f"{problem}; set its global_pool or use another model.")
    return pooled.shape[1]
