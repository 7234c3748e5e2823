"""Making an ensemble out of members that come from anywhere."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.data.model_config import resolve_input_data_config
from timm.models import get_model_input_config
from timm.models._hub import _get_safe_alternatives
from torch import nn
from transformers import TimmWrapperConfig

from concat_ensemble.errors import argument, first_line, suggest
from concat_ensemble.files import check_regular_files, describe_missing_folder
from concat_ensemble.members.checkpoints import (
    PICKLES,
    Tensors,
    check_holds,
    find_network,
    match_state_dict,
    name_average,
    read_checkpoint,
    timm_cfg,
    weights_sha256,
)
from concat_ensemble.members.converters import convert, load_jax_vit
from concat_ensemble.members.origins import name_repo, read_license
from concat_ensemble.members.provenance import Provenance
from concat_ensemble.members.rebuilding import rebuild, select_model_args, unwrap
from concat_ensemble.members.training_args import resolve_train_args
from concat_ensemble.modeling.configuration_concat_ensemble import (
    CHANNELS,
    IMAGE_MODES,
    MAX_CHANNELS,
    MAX_IMAGE_SIDE,
    MEMBER_KEYS,
    ConcatEnsembleConfig,
    describe_unknown_architecture,
    error_prefix,
    require,
    timm_architectures,
    validate_model_args,
    validate_preprocessing,
)
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleModel,
    ConcatEnsemblePreTrainedModel,
    create_backbone,
)
from concat_ensemble.modeling.weights_concat_ensemble import INDEX_NAME
from concat_ensemble.schema import Count, Text, check_type, decode_json

Source = str | Path | nn.Module
HUB, RANDOM = "hf-hub:", "random:"
TIMM_WRAPPER = TimmWrapperConfig.model_type
PICKLE_NAME = "pytorch_model.bin"


class PretrainedConfig(TypedDict, total=False):
    """What timm records of weights, as far as it is used before timm reads it."""

    license: Text | None
    input_size: list[Count] | None
    fixed_input_size: bool | None


class NetworkConfig(PretrainedConfig, total=False):
    """`config.json` of a timm model or an ensemble; before timm 0.9, what is in `pretrained_cfg` stood beside it."""

    model_type: Text | None
    architecture: Text | None
    model_args: dict[str, Any] | None
    pretrained_cfg: PretrainedConfig | None
    label_names: list[Text | int] | dict[str, Text | int] | None
    provenance: Provenance | None


class UnknownRepoError(ValueError):
    """A repo that is not on the Hub or, without a network, not in the cache."""


@dataclass
class _Member:
    backbone: nn.Module
    spec: dict[str, Any]  # an entry of ConcatEnsembleConfig.members
    projection: nn.Linear | None = None  # of the ensemble that it was a member of


def assemble(
    members: Source | Iterable[Source],
    *,
    preprocessing: str = "own",
    model_args: dict[str, Any] | None = None,
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
            - `"hf-hub:org/name@revision"`: a timm model, one of transformers' TimmWrapper, or an ensemble on the Hub;
            - a folder saved by timm (`timm.models.save_for_hf`), by transformers' TimmWrapper (a Trainer's checkpoint,
              too), by `training/pretrain_members.py`, or an ensemble's;
            - a checkpoint file whose stem or content says its timm architecture, or `"resnet50=path/to/file.pth"`; see
              `checkpoints.read_checkpoint`, and `converters` for the layouts of the paper's systems. Averaged (EMA)
              weights are preferred, and the arguments of timm's `train.py` are applied;
            - a timm model, one in a TimmWrapper, `torch.compile` or `DataParallel`, or an ensemble in memory; refused
              if it was changed after it was made, and timm cannot build it again from arguments.

            An ensemble contributes its members in their order, and also its projection if it is the only source.
        preprocessing: `"own"`: every member gets its timm evaluation transform. `"shared"`: all members get the first
            member's, which is faster and changes the features of the others.
        model_args: Arguments of `timm.create_model`, such as `{"img_size": 384, "in_chans": 4}`. timm adapts its
            pretrained weights to them. They override those in a folder or a checkpoint, whose weights must fit.
            Refused for ensembles and for models in memory, which have theirs.
        channels: Numbers of the channels of an image that each of these members sees, from 0, as many as it takes.
            Default: gray or RGB for members of 1 and 3 channels, the first channels for others.
        mean, std: One number for each channel, in place of timm's. For a member of other than 3 channels, timm takes
            the average of an RGB mean and std for all of them.
        seed: Random seed of the untrained members: member k has `seed + k`.
        license: SPDX-like identifier for members whose source names no license. timm's own licence, which timm saves
            beside any weights, counts for those in its own repos alone.

    Returns:
        The model in evaluation mode, on the CPU, in float32. `config.members[k]["provenance"]` holds the source of
        member k, the sha256 of its weights, `weights` ("EMA" or "averaged") if they are such and, from a
        TimmWrapper, the `label_names` of its classes.

    Raises:
        ValueError, FileNotFoundError: for a member that cannot be loaded, in one line that names it and the remedy.
    """
    if preprocessing not in ("own", "shared"):
        raise ValueError(f"{argument('preprocessing', preprocessing)} must be 'own' or 'shared'.")
    sources = [members] if isinstance(members, Source) else list(members)
    model_args = _check_model_args(model_args or {})
    loaded: list[_Member] = []
    for source in sources:
        loaded += _load_members(source, model_args, seed + len(loaded))
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


def _load_members(source: Source, model_args: dict[str, Any], seed: int) -> list[_Member]:
    """Load one source, which may be an ensemble of several members."""
    if isinstance(source, nn.Module):
        _refuse_model_args(model_args, type(source).__name__)
        return _load_module(source)
    text = str(source)
    if text.startswith(HUB):
        members = _load_from_hub(text, model_args)
    elif text.startswith(RANDOM):
        members = [_make_untrained(text.removeprefix(RANDOM), model_args, seed)]
    elif Path(text).is_dir():
        members = _load_folder(Path(text), model_args)
    else:
        members = _load_name(text, model_args)
    if model_args.get("img_size"):  # timm's own choice is another for networks that take images of any size
        size = model_args["img_size"]
        for member in members:
            pixels = member.spec["preprocessing"]
            pixels["input_size"] = [pixels["input_size"][0], *(size if isinstance(size, list) else [size, size])]
            member.spec["preprocessing"] = validate_preprocessing(pixels)
    return members


def _load_name(text: str, model_args: dict[str, Any]) -> list[_Member]:
    """Load `[ARCHITECTURE=]FILE` or timm's pretrained weights of this name."""
    architecture, _, path = text.rpartition("=")
    if architecture or Path(path).is_file() or path.endswith((".safetensors", ".npz", *PICKLES)):
        return _load_file(Path(path), architecture, model_args)
    if "/" in text:
        raise ValueError(f"{describe_missing_folder(text)} For a model on the Hub, write {HUB}ORG/NAME.")
    if text.split(".")[0] not in timm_architectures():
        raise ValueError(_describe_unknown(text))
    return _load_from_hub(HUB + _find_pretrained(text), model_args)


def _describe_unknown(name: str) -> str:
    """Error message for a name of neither a folder nor a model of timm, with a similar one of either kind."""
    missing = describe_missing_folder(name)
    if not missing.endswith("?") and suggest(name.split(".")[0], timm_architectures()) != ".":
        return f"{describe_unknown_architecture(name)} There is no folder {name} either."
    return f"{missing} timm has no model of this name either; for one on the Hub, write {HUB}ORG/NAME."


def _check_model_args(model_args: dict[str, Any]) -> dict[str, Any]:
    """A copy of arguments of `timm.create_model`; sizes are checked before a network of this size is built."""
    model_args = validate_model_args(model_args)
    channels, size = model_args.get("in_chans", 3), model_args.get("img_size", 1)
    expected = f"a whole number from 1 to {MAX_CHANNELS}"
    require(type(channels) is int and 1 <= channels <= MAX_CHANNELS, "model_args: in_chans", channels, expected)
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    are_sides = all(type(side) is int and 1 <= side <= MAX_IMAGE_SIDE for side in sides)
    expected = f"a whole number from 1 to {MAX_IMAGE_SIDE:,}, or two, height and width"
    require(are_sides, "model_args: img_size", size, expected)
    return model_args


def _refuse_model_args(model_args: dict[str, Any], source: str) -> None:
    """Raise ValueError if there are arguments for members that have their own."""
    if model_args:
        problem = f"{argument('model_args', model_args)} cannot be applied to {source}, whose networks are built"
        raise ValueError(f"{problem}; give the members that they are for in a call of their own.")


def is_ensemble(model: nn.Module) -> TypeGuard[ConcatEnsemblePreTrainedModel]:
    """Whether a model is an ensemble of ours; a class loaded from a repo counts too."""
    return getattr(getattr(model, "config", None), "model_type", "") == "concat_ensemble"


def _load_module(module: nn.Module) -> list[_Member]:
    if is_ensemble(module):
        return _rebuild_members(module)
    if hasattr(module, "merge_and_unload"):
        remedy = "call its merge_and_unload() and give what that returns"
        raise ValueError(f"{type(module).__name__} has adapters, which a member cannot have; {remedy}.")
    network = unwrap(module)
    if not hasattr(network, "pretrained_cfg") or isinstance(network, torch.jit.ScriptModule):
        kind = type(network).__name__
        raise ValueError(f"{kind} is not a timm model, as members must be; make it with timm.create_model(...).")
    configs = (getattr(layer, "config", None) for layer in module.modules())
    config = next((config.to_dict() for config in configs if isinstance(config, TimmWrapperConfig)), {})
    pretrained_cfg = config.get("pretrained_cfg") or timm_cfg(network)
    provenance = {"source": "a model in memory", "label_names": _select_label_names(config)}
    return [_make_member(rebuild(network), provenance, pretrained_cfg)]


def _rebuild_members(ensemble: ConcatEnsemblePreTrainedModel) -> list[_Member]:
    """As `_copy_members`, for an ensemble whose members a user may have changed."""
    members = []
    for k, backbone in zip(ensemble.config.built_members, ensemble.members.values(), strict=True):
        spec = copy.deepcopy(ensemble.config.members[k])
        with error_prefix(f"members[{k}]"):
            rebuilt = rebuild(backbone, spec["preprocessing"]["input_size"])
        members.append(_Member(rebuilt, spec | {"model_args": select_model_args(rebuilt)}, ensemble.projection))
    return members


def _copy_members(ensemble: ConcatEnsemblePreTrainedModel) -> list[_Member]:
    """The members of an ensemble that was just loaded."""
    return [
        _Member(backbone.float(), ensemble.config.members[k], ensemble.projection)
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
    return str(name_repo(pretrained))


def _make_untrained(name: str, model_args: dict[str, Any], seed: int) -> _Member:
    _check_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(name, **model_args)
    provenance = {"source": f"{RANDOM}{name}", "objective": "none (random weights)", "seed": seed, "steps": 0}
    return _make_member(backbone, provenance | {"license": "apache-2.0"})


def _load_from_hub(name: str, model_args: dict[str, Any]) -> list[_Member]:
    repo, _, revision = name.removeprefix(HUB).partition("@")
    commit = _find_commit(repo, revision or None)
    config = _read_config(Path(hf_hub_download(repo, "config.json", revision=commit)))
    if config.get("model_type") == "concat_ensemble":
        _refuse_model_args(model_args, name)
        ensemble: Any = ConcatEnsembleModel.from_pretrained(repo, revision=commit)
        members = _copy_members(ensemble)
        for member in members:
            member.spec["provenance"] |= {"taken_from": repo, "taken_from_revision": commit}
        return members
    if config.get("model_type") == TIMM_WRAPPER:
        patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
        members = _load_folder(Path(snapshot_download(repo, revision=commit, allow_patterns=patterns)), model_args)
        for member in members:
            member.spec["provenance"] |= {"source": HUB + repo, "hub_id": repo, "revision": commit}
        return members
    architecture, own_args, pretrained_cfg = _read_network(config, name)
    with torch.device("meta"):  # refuses a model that is too large before it takes memory
        own = create_backbone(architecture, **own_args)
        rebuilt = create_backbone(architecture, **(own_args | model_args)) if model_args else own
    _check_weights(repo, commit, pretrained_cfg.get("hf_hub_filename"), own)
    backbone = _create_pretrained(f"{HUB}{repo}@{commit}", own_args, model_args)
    match_state_dict(rebuilt, backbone.state_dict(), name)  # an ensemble is loaded into what its arguments build
    license = read_license(architecture, pretrained_cfg, repo=repo)
    return [_make_member(backbone, {"source": HUB + repo, "hub_id": repo, "revision": commit, "license": license})]


def _check_weights(repo: str, commit: str | None, filename: Any, network: nn.Module) -> None:
    """Fetch the file that timm will load, and raise ValueError if there is none or it cannot hold the network."""
    filename = filename if isinstance(filename, str) else PICKLE_NAME
    for name in (*_get_safe_alternatives(filename), filename):
        try:
            path = Path(hf_hub_download(repo, name, revision=commit))
        except EntryNotFoundError:
            continue
        with error_prefix(f"{HUB}{repo}"):
            numbers = sum(tensor.numel() for tensor in read_checkpoint(path)[0].values())
        needed = sum(weight.numel() for weight in network.parameters())
        if needed > 2 * numbers:  # timm may resize position embeddings
            problem = f"{name} of {HUB}{repo} does not hold the weights of {timm_cfg(network)['architecture']}"
            raise ValueError(f"{problem}: it has {numbers:,} numbers, not {needed:,}; use another repo.")
        return
    raise ValueError(f"{HUB}{repo} has no weights, or they cannot be fetched; use another repo.")


def _create_pretrained(source: str, own_args: dict[str, Any], model_args: dict[str, Any]) -> nn.Module:
    """timm's pretrained network. With arguments of the user, it is created twice, from other random numbers, because
    timm leaves layers random if it has no weights for them."""
    networks = []
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles before it refuses them
            for seed in range(2 if model_args else 1):
                torch.manual_seed(seed)
                arguments = own_args | model_args
                networks.append(timm.create_model(source, pretrained=True, num_classes=0, **arguments))
    except Exception as error:  # timm may fail in any way on a stranger's config and weights
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"timm cannot load {source} with model_args {model_args}: {reason}") from error
    first, last = networks[0].state_dict(), networks[-1].state_dict()
    if random := [key for key in first if not torch.equal(first[key], last[key])]:
        names = ", ".join(random[:3]) + (f" and {len(random) - 3} more" if len(random) > 3 else "")
        problem = f"timm cannot adapt the weights of {source} to model_args {model_args}"
        raise ValueError(f"{problem}: {names} would be random; use other arguments.")
    return networks[0]


def _find_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a revision on the Hub or, without a network, in the cache."""
    name = f"{HUB}{repo}" + (f"@{revision}" if revision else "")
    try:
        # One request without retries: file downloads would retry for half a minute before they fail.
        return HfApi(library_name="concat-ensemble").model_info(repo, revision=revision, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        remedy = "check its name and revision, or log in with hf auth login"
        raise UnknownRepoError(f"{name} is not on the Hub ({first_line(error)}); {remedy}.") from error
    except (ConnectionError, HTTPError):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(cached, str):
            problem = f"cannot reach the Hub for {name}, and it is not in the cache"
            raise UnknownRepoError(f"{problem}; give ARCHITECTURE=FILE or a folder.") from None
        return Path(cached).parent.name  # the cache has a folder for each commit


def _load_folder(folder: Path, model_args: dict[str, Any], pickled: Path | None = None) -> list[_Member]:
    """Load a folder's network; `pickled` are the weights in it if the user named them."""
    check_regular_files(folder)
    if not (folder / "config.json").is_file():
        remedy = "give a folder saved by timm or an ensemble's, or a checkpoint as NAME=FILE"
        raise ValueError(f"{folder} has no config.json; {remedy}.")
    config = _read_config(folder / "config.json")
    if config.get("model_type") == "concat_ensemble":
        _refuse_model_args(model_args, str(folder))
        ensemble: Any = ConcatEnsembleModel.from_pretrained(folder)
        return _copy_members(ensemble)
    architecture, own_args, pretrained_cfg = _read_network(config, str(folder))
    model_args = own_args | model_args
    tensors = read_checkpoint(pickled)[0] if pickled else _read_weights(folder)
    with torch.device("meta"):  # refuses a checkpoint of another architecture before the model takes memory
        tensors = match_state_dict(create_backbone(architecture, **model_args), tensors, str(folder))
    backbone = create_backbone(architecture, **model_args)
    backbone.load_state_dict(tensors, strict=False)
    label_names = _select_label_names(config) if config.get("model_type") == TIMM_WRAPPER else None
    own = config.get("provenance") or {}
    license = read_license(architecture, pretrained_cfg, provenance=own)
    provenance = {"source": folder.name, "license": license, "label_names": label_names}
    return [_make_member(backbone, provenance | own, pretrained_cfg)]


def _read_weights(folder: Path) -> Tensors:
    """The tensors of `model.safetensors`, or of the shards that its index names."""
    weights, index, pickled = (folder / name for name in ("model.safetensors", INDEX_NAME, PICKLE_NAME))
    if weights.is_file() or not (index.is_file() or pickled.is_file()):
        return read_checkpoint(weights)[0]
    if not index.is_file():
        raise ValueError(f"{folder} has pickled weights; to read them, give {pickled}.")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names):  # no way out of the folder
            raise ValueError(f"a bad file name among {names[:3]}")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of weights ({error!r}); fetch or save it again.") from error
    return {key: tensor for name in names for key, tensor in read_checkpoint(folder / name)[0].items()}


def _load_file(path: Path, architecture: str, model_args: dict[str, Any]) -> list[_Member]:
    if path.name == PICKLE_NAME and path.is_file() and _is_network_of(path.parent / "config.json", architecture):
        return _load_folder(path.parent, model_args, pickled=path)
    is_jax = path.suffix == ".npz"
    tensors, metadata = ({}, {}) if is_jax else read_checkpoint(path)
    architecture = architecture or _find_architecture(path, metadata)
    if architecture not in timm_architectures():
        raise ValueError(f"{path}: {architecture!r} is not a timm architecture; name it as ARCHITECTURE={path.name}.")
    converted = convert(architecture, tensors)
    train_args = metadata.get("train_args")
    with error_prefix(str(path)):
        own_args, pixels = resolve_train_args(architecture, train_args) if train_args else ({}, {})
        model_args = _check_model_args(own_args | converted.model_args | model_args)
        with torch.device("meta"):  # refuses a checkpoint of another architecture before the model takes memory
            network = create_backbone(converted.architecture, **model_args)
    average = None
    if is_jax:
        check_holds(path, network)
        backbone = create_backbone(converted.architecture, **model_args)
        load_jax_vit(backbone, path)
    else:
        tensors = match_state_dict(network, converted.tensors, str(path))
        average = name_average(find_network(network, converted.tensors, str(path)))
        backbone = create_backbone(converted.architecture, **model_args)
        backbone.load_state_dict(tensors, strict=False)
    provenance = {"source": metadata.get("source", path.name), "license": metadata.get("license")}
    provenance["weights"] = metadata.get("weights") or average
    return [_make_member(backbone, provenance, timm_cfg(backbone) | converted.pretrained_cfg | pixels)]


def _find_architecture(path: Path, metadata: dict[str, Any]) -> str:
    """The architecture that a `.safetensors` file says, or the name of any file, or the content of a pickle."""
    stem, recorded = path.name.split(".")[0], metadata.get("architecture")
    return recorded if recorded and (path.suffix == ".safetensors" or stem not in timm_architectures()) else stem


def _is_network_of(config: Path, architecture: str) -> bool:
    """Whether there is a config of a network of timm's, with this architecture if it is not empty."""
    name = _read_config(config).get("architecture") if config.is_file() else None
    return isinstance(name, str) and architecture in ("", name.split(".")[0])


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a timm model or an ensemble."""
    try:
        config = check_type(decode_json(path), dict[str, Any])
        check_type(config, NetworkConfig)
    except ValueError as error:
        raise ValueError(f"{path} is not a model's config: {error}; save the model again.") from error
    return config


def _read_network(config: dict[str, Any], source: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, model arguments and `pretrained_cfg` of a config that anybody may have written.

    timm builds a network with the channels and, if it is fixed, the image size of `pretrained_cfg`; those that are not
    the architecture's own become arguments. transformers' TimmWrapper builds it without, and only its processor uses
    `pretrained_cfg`; there, the architecture's name may have a tag, such as `resnet18.a1_in1k`.
    """
    name = config.get("architecture")
    _check_architecture(name)
    architecture, is_wrapper = str(name).split(".")[0], config.get("model_type") == TIMM_WRAPPER
    # A member does not take these two: it has no classifier, and its weights are loaded here.
    ignored = ("num_classes", "pretrained")
    model_args = {key: value for key, value in (config.get("model_args") or {}).items() if key not in ignored}
    with error_prefix(source):
        model_args = validate_model_args(model_args)
        tagged = _find_pretrained_cfg(str(name)) if is_wrapper else {}
        # Before timm 0.9, what is in `pretrained_cfg` stood in the config itself.
        pretrained_cfg = config.get("pretrained_cfg") or tagged or ({} if "pretrained_cfg" in config else config)
        own = tagged if is_wrapper else pretrained_cfg
        return architecture, _read_input_args(architecture, own) | model_args, pretrained_cfg


def _find_pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm knows of the weights of this name, which may have a tag that it does not know."""
    pretrained = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {} if pretrained is None else pretrained.to_dict()


def _read_input_args(architecture: str, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """`in_chans` and `img_size` with which timm builds a network, where they are not the architecture's own."""
    size = pretrained_cfg.get("input_size")
    if not isinstance(size, list | tuple) or len(size) != 3:
        return {}
    with torch.device("meta"):
        channels, *own_size = get_model_input_config(create_backbone(architecture))["input_size"]
    model_args: dict[str, Any] = {"in_chans": size[0]} if size[0] != channels else {}
    if pretrained_cfg.get("fixed_input_size") and [*size[1:]] != own_size:
        model_args["img_size"] = [*size[1:]]
    return validate_model_args(model_args)


def _select_label_names(config: dict[str, Any]) -> list[str] | None:
    """Class names from the config of transformers' TimmWrapper, unless they only count the classes."""
    names = config.get("label_names")
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list) or names == [f"LABEL_{k}" for k in range(len(names))]:
        return None
    return [str(name) for name in names]


def _check_architecture(name: Any) -> None:
    if str(name).split(".")[0] not in timm_architectures():
        raise ValueError(describe_unknown_architecture(name))


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
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its pretrained_cfg does not describe its input images ({error!r}).") from error
    pixels["image_mode"] = IMAGE_MODES.get(channels, CHANNELS)
    if channels not in IMAGE_MODES:
        pixels[CHANNELS] = list(range(channels))
    with error_prefix(name):
        preprocessing = validate_preprocessing(pixels)
    spec = dict.fromkeys(MEMBER_KEYS) | {
        "architecture": name,
        "model_args": select_model_args(backbone),
        "preprocessing": preprocessing,
        "provenance": {key: value for key, value in provenance.items() if value is not None},
    }
    return _Member(backbone, spec)


@torch.no_grad()
def _measure_num_features(k: int, member: _Member) -> int:
    """Run a member's network once: timm's `num_features` is another number for MobileNetV3, EfficientViT and
    InceptionNeXt. It runs on the meta device, since a stranger's images may be larger than the memory."""
    name, input_size = member.spec["architecture"], member.spec["preprocessing"]["input_size"]
    try:
        with torch.device("meta"):
            pooled = create_backbone(name, **member.spec["model_args"]).eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        problem = f"member {k} ({name}) cannot take an image of {tuple(input_size)}"
        raise ValueError(f"{problem}: {first_line(error)}") from error
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2:
        output = tuple(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        problem = f"member {k} ({name}) has no pooled features: it returns {output}, not (B, num_features)"
        raise ValueError(f"{problem}; set its global_pool or use another model.")
    return pooled.shape[1]
