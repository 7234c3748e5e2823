"""State dicts with timm's keys, read from the checkpoint files of many training scripts."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from concat_ensemble.members.pickles import read_pickle, refuse_bomb
from concat_ensemble.members.training_args import find_architecture, find_train_args
from concat_ensemble.modeling.weights_concat_ensemble import MAX_NAME, MAX_TENSORS, MAX_UNPACKED, open_safetensors

PICKLES = (".pth", ".pth.tar", ".pt", ".bin", ".tar", ".torch", ".ckpt")
# Keys under which training scripts store the weights.
CONTAINERS = ("state_dict", "model_state_dict", "model_params", "classy_state_dict", "base_model", "model", "trunk")
MAX_CONTAINERS = 4  # one inside the other
MAX_NETWORKS = 100  # side by side
# Names of weights that are an average over training; they are preferred as timm does, and provenance names them.
AVERAGES = {
    "EMA": re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE),
    "averaged": re.compile(r"(?<![a-z])(averaged|swa)(?![a-z])", re.IGNORECASE),
}
SPLIT_NORMS = ".aux_bn."  # of timm's --split-bn, which evaluation does not use
METADATA = ("architecture", "license", "source")  # of .safetensors

Tensors = dict[str, torch.Tensor]


def read_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read the tensors and the metadata of a `.safetensors` file or of a pickle.

    Pickles are read with `weights_only=True`, so that they cannot run code. Of several sets of weights in one,
    averaged weights are taken. Their metadata may be `architecture`, `weights` ("EMA" or "averaged") and `train_args`,
    those of timm's `train.py`.

    Raises:
        ValueError: if the file is truncated, of an unknown kind, without tensors, or with objects that could run code.
        FileNotFoundError: if it does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(_describe_missing_file(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not path.name.endswith(PICKLES):
        raise ValueError(f"{path}: unknown kind of checkpoint; give .safetensors, {', '.join(PICKLES)}.")
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict; its top level is {type(content).__name__}.")
    averages = _select_averages(content)
    if len(averages) == 1:
        tensors = next(iter(averages.values()))
    else:
        tensors = _join_parts(averages) or _select_weights(content)
    if not tensors:
        raise ValueError(f"{path} holds no state dict; its top level is {sorted(map(str, content))[:5]}.")
    _check_sizes(tensors, path)
    metadata = {"architecture": find_architecture(content), "train_args": find_train_args(content)}
    metadata["weights"] = name_average(".".join(averages))
    return tensors, {key: value for key, value in metadata.items() if value}


def load_backbone(backbone: nn.Module, tensors: Tensors, source: str) -> str | None:
    """Load a checkpoint's tensors into a timm model, and return "EMA" or "averaged" if their keys say that they are
    an average; see `match_state_dict` for the arguments and errors."""
    backbone.load_state_dict(match_state_dict(backbone, tensors, source), strict=False)
    return name_average(find_network(backbone, tensors, source))


def match_state_dict(backbone: nn.Module, tensors: Tensors, source: str) -> Tensors:
    """Rename a checkpoint's tensors to a timm model's keys, without wrappers such as "module." and the classifier.

    `num_batches_tracked` of BatchNorm may be missing, as in old checkpoints: it is a counter, not a weight. `source`
    is what error messages call the checkpoint.

    Raises:
        ValueError: listing the keys that are missing, unexpected, or of another shape; and as `find_network`.
    """
    prefix = find_network(backbone, tensors, source)
    matched, listing = _match(backbone, tensors, prefix, _list_prefixes(backbone.state_dict(), tensors))
    if listing:
        name = timm_cfg(backbone).get("architecture", type(backbone).__name__)
        problem = f"{source} does not hold the weights of {name}; {listing}"
        raise ValueError(f"{problem}. Name the right architecture, as NAME=FILE, or other model_args.")
    return matched


def find_network(backbone: nn.Module, tensors: Tensors, source: str) -> str:
    """The prefix, such as "module.model0.", of the keys of this network in a checkpoint.

    If it is there several times with different weights, the average over training is taken, such as "ema.".

    Raises:
        ValueError: listing the prefixes, if none or several of them are such averages.
    """
    prefixes = _list_prefixes(backbone.state_dict(), tensors)
    matches = {prefix: _match(backbone, tensors, prefix, prefixes) for prefix in prefixes}
    whole = {prefix: matched for prefix, (matched, listing) in matches.items() if not listing}
    if len(whole) < 2:
        prefix = next(iter(whole), prefixes[0])
        _refuse_partial_average(backbone, tensors, prefix, source)
        return prefix
    averages = [prefix for prefix in whole if name_average(prefix)]
    if len(averages) == 1:
        return averages[0]
    first, *others = whole.values()
    if all(other[key].equal(first[key]) for other in others for key in first.keys() & other.keys()):
        return next(iter(whole))
    names = ", ".join(map(repr, sorted(whole)))
    remedy = "save_file({k: v for k, v in state_dict.items() if k.startswith(PREFIX)}, 'x.safetensors')"
    raise ValueError(f"{source} holds this network several times, below {names}; save one of them alone: {remedy}.")


def _describe_missing_file(path: Path) -> str:
    return f"no checkpoint file {path}{': it is a folder; name a file in it' if path.is_dir() else ''}."


def check_holds(path: Path, network: nn.Module) -> None:
    """Raise FileNotFoundError if there is no such file, and ValueError if it is too small for a network's weights."""
    if not path.is_file():
        raise FileNotFoundError(_describe_missing_file(path))
    refuse_bomb(path)
    needed = sum(tensor.numel() for tensor in network.parameters())
    if needed > MAX_UNPACKED * path.stat().st_size:
        problem = f"{path} does not hold the weights of {timm_cfg(network)['architecture']}"
        raise ValueError(f"{problem}: it is too small for {needed:,} numbers; name the right architecture.")


def list_classifiers(backbone: nn.Module) -> list[str]:
    """Names of the layers that a timm model with `num_classes=0` lacks. In LeViT, for one, timm names a layer of the
    classifier, `head.linear`, which has a norm beside it: all of `head` is an identity without classes."""
    classifier = timm_cfg(backbone).get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    identities = {name for name, layer in backbone.named_modules() if isinstance(layer, nn.Identity)}
    parents = {name: [name[: dot.start()] for dot in re.finditer(r"\.", name)] for name in names}
    return [next((parent for parent in parents[name] if parent in identities), name) for name in names]


def name_average(name: str) -> str | None:
    """ "EMA" or "averaged", if this name of weights says that they are an average over training."""
    return next((average for average, pattern in AVERAGES.items() if pattern.search(name)), None)


def weights_sha256(state_dict: Tensors) -> str:
    """Hex digest of a state dict's names, dtypes, shapes and values in the order of the names, for any file format.
    Raises ValueError for weights that are no tensors, as torch.ao.quantization makes them."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state_dict.items()):
        if not isinstance(tensor, torch.Tensor):
            problem = f"{key}={type(tensor).__name__} must be a tensor"
            raise ValueError(f"{problem}; to quantize a model, use torchao or optimum-quanto.")
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: several tensors, and how to compute with them
            names, settings = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            digest.update(f"{settings} {weights_sha256({name: getattr(tensor, name) for name in names})}\n".encode())
        else:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timm_cfg(backbone: Any) -> dict[str, Any]:
    """timm's description of a network, an attribute that `nn.Module` does not declare."""
    return backbone.pretrained_cfg


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with open_safetensors(path) as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key in METADATA}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or save it again.") from error


def _check_sizes(tensors: Tensors, path: Path) -> None:
    """Raise ValueError for more or longer names than networks have, and for tensors that are larger than their file:
    a pickle can say that one number, or none, stands for billions."""
    if len(tensors) > MAX_TENSORS or max(map(len, tensors)) > MAX_NAME:
        problem = f"{path} holds more than {MAX_TENSORS:,} tensors or names of more than {MAX_NAME} characters"
        raise ValueError(f"{problem}; save the weights of one network alone.")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path} would unpack to {size:,} bytes, too many for weights; use a trusted source.")
    if any(tensor.is_meta or tensor.layout != torch.strided for tensor in tensors.values()):
        raise ValueError(f"{path} holds tensors without memory or sparse ones; save the weights as plain tensors.")


def _refuse_partial_average(backbone: nn.Module, tensors: Tensors, prefix: str, source: str) -> None:
    """Raise ValueError for an average that lacks some of the network's keys, beside `prefix`, which is none."""
    if name_average(prefix):
        return
    expected = {f"{prefix}{key}" for key in backbone.state_dict()}
    averaged = [key for key in tensors if key not in expected and name_average(key)]
    if len(averaged) > len(list(backbone.parameters())) / 2:
        problem = f"{source} holds averaged weights, such as {averaged[0]}, that lack some of the network's names"
        raise ValueError(f"{problem}; copy them into the model and save its state dict alone.")


def _select_averages(content: dict[Any, Any]) -> dict[str, Tensors]:
    """The parts of a checkpoint that are averages of weights, and not of a few numbers such as losses."""
    parts = dict(_list_parts(content))
    least = max(map(len, parts.values()), default=0) / 3  # an average may lack BatchNorm's buffers
    return {name: part for name, part in parts.items() if name_average(name) and len(part) >= least}


def _select_weights(content: dict[Any, Any]) -> Tensors:
    """The tensors of a checkpoint's dict, of the first of `CONTAINERS` in it, or of all its dicts."""
    for _ in range(MAX_CONTAINERS):
        container = next((name for name in CONTAINERS if any(_list_parts(content.get(name)))), None)
        if container is None:
            break
        content = content[container]
    parts = dict(_list_parts(content, 1))
    return parts.pop("", None) or _join_parts(parts)


def _list_parts(content: Any, depth: int = MAX_CONTAINERS, name: str = "") -> Iterator[tuple[str, Tensors]]:
    """The dicts with weights inside a checkpoint's, by names such as "callbacks.EMA". An average may be None, or only
    its settings; one without names, as a list, counts too, so that it is not passed over."""
    if isinstance(content, list) and name_average(name):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, dict):
        return
    items = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in items.items() if isinstance(value, torch.Tensor)}
    if any(tensor.ndim for tensor in tensors.values()):
        yield name, tensors
    for key, value in items.items() if depth else ():
        yield from _list_parts(value, depth - 1, f"{name}.{key}" if name else key)


def _join_parts(parts: dict[str, Tensors]) -> Tensors:
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def _list_prefixes(expected: Tensors, tensors: Tensors) -> list[str]:
    """The prefixes under which most of the expected weights are found, the shortest first; "" if there are none."""
    counts = Counter(
        key[:start]
        for key in tensors
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[start:] in expected and not key.endswith("num_batches_tracked")
    )
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix in counts if counts[prefix] == most]
    if len(prefixes) > MAX_NETWORKS:
        raise ValueError(f"a checkpoint holds {len(prefixes):,} networks of the same names; save one of them alone.")
    return sorted(prefixes, key=len) or [""]


def _match(backbone: nn.Module, tensors: Tensors, prefix: str, others: Iterable[str] = ()) -> tuple[Tensors, str]:
    """The tensors below a prefix, without those below longer ones among `others`, and a list of what does not fit."""
    expected = backbone.state_dict(keep_vars=True)
    others = tuple(other for other in others if other != prefix and other.startswith(prefix))
    unwrapped = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and not key.startswith(others) and SPLIT_NORMS not in key
    }
    layers = tuple(f"{layer}." for layer in list_classifiers(backbone))
    matched = {key: tensor for key, tensor in unwrapped.items() if key in expected or not key.startswith(layers)}
    shapes = {key: (tuple(matched[key].shape), tuple(expected[key].shape)) for key in expected.keys() & matched.keys()}
    # A layer that a network uses repeatedly has several names for a tensor; a file may have one of them or all.
    stored = {id(expected[key]): matched[key] for key in shapes}
    tied = {key: stored[id(expected[key])] for key in shapes}
    absent = [key for key in expected.keys() - matched.keys() if id(expected[key]) not in stored]
    problems = {
        "missing": [key for key in absent if not key.endswith("num_batches_tracked")],
        "unexpected": matched.keys() - expected.keys(),
        "other shape": [f"{key} {actual} for {own}" for key, (actual, own) in shapes.items() if actual != own],
        "tied but unequal": [k for k in shapes if tied[k] is not matched[k] and not torch.equal(tied[k], matched[k])],
    }
    return matched, "; ".join(f"{problem}: {_list_keys(keys)}" for problem, keys in problems.items() if keys)


def _list_keys(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(key[:100] for key in keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
