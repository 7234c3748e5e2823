"""State dicts with timm's keys, read from the checkpoint files of many training scripts."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from concat_ensemble.errors import first_line

PICKLES = (".pth", ".pth.tar", ".pt", ".bin", ".tar", ".torch")
# Keys under which training scripts store the weights; averaged weights first, as timm prefers them.
CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
CONTAINERS += ("state_dict", "model_state_dict", "model_params", "classy_state_dict")
CONTAINERS += ("base_model", "model", "trunk", "teacher")
MAX_UNPACKED = 50  # times the size on disk; all-zero weights shrink to a thousandth, trained weights to 0.9
WRAPPERS = re.compile(r"(?:module|_orig_mod|timm_model|model0|model|backbone|encoder)\.")

Tensors = dict[str, torch.Tensor]


def read_checkpoint(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of a `.safetensors` file, or the tensors of a pickle.

    Pickles are read with `weights_only=True`, so that they cannot run code.

    Raises:
        ValueError: if the file is truncated, of an unknown kind, without tensors, or with objects other than tensors.
        FileNotFoundError: if it does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not path.name.endswith(PICKLES):
        raise ValueError(f"{path}: unknown kind of checkpoint; give .safetensors, {', '.join(PICKLES)}.")
    content = _read_pickle(path)
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict; its top level is {type(content).__name__}.")
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict; its top level is {sorted(map(str, content))[:5]}.")
    return tensors, {}


def refuse_bomb(path: Path) -> None:
    """Raise ValueError for a zip file that unpacks to far more than its size, because weights hardly compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile):  # whoever reads the file reports this
        return
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path} would unpack to {unpacked:,} bytes, too many for weights; use a trusted source.")


def load_backbone(backbone: nn.Module, tensors: Tensors, source: str) -> None:
    """Load a checkpoint's tensors into a timm model; see `match_state_dict` for the arguments and errors."""
    backbone.load_state_dict(match_state_dict(backbone, tensors, source), strict=False)


def match_state_dict(backbone: nn.Module, tensors: Tensors, source: str) -> Tensors:
    """Rename a checkpoint's tensors to a timm model's keys, without wrappers such as "module." and the classifier.

    `num_batches_tracked` of BatchNorm may be missing, as in old checkpoints: it is a counter, not a weight. `source`
    is what error messages call the checkpoint.

    Raises:
        ValueError: listing the keys that are missing, unexpected, or of another shape.
    """
    expected = backbone.state_dict()
    prefix = _find_wrappers(tensors, expected)
    unwrapped = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    classifier = timm_cfg(backbone).get("classifier") or ()
    layers = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    matched = {key: tensor for key, tensor in unwrapped.items() if key in expected or not key.startswith(layers)}
    shapes = {key: (tuple(matched[key].shape), tuple(expected[key].shape)) for key in expected.keys() & matched.keys()}
    problems = {
        "missing": [key for key in expected.keys() - matched.keys() if not key.endswith("num_batches_tracked")],
        "unexpected": matched.keys() - expected.keys(),
        "other shape": [f"{key} {actual} for {own}" for key, (actual, own) in shapes.items() if actual != own],
    }
    listing = "; ".join(f"{problem}: {_list_keys(keys)}" for problem, keys in problems.items() if keys)
    if listing:
        name = timm_cfg(backbone).get("architecture", type(backbone).__name__)
        problem = f"{source} does not hold the weights of {name}; {listing}"
        raise ValueError(f"{problem}. Name the right architecture, as NAME=FILE.")
    return matched


def weights_sha256(state_dict: Tensors) -> str:
    """Hex digest of a state dict's names, dtypes, shapes and values in the order of the names, for any file format."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state_dict.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timm_cfg(backbone: Any) -> dict[str, Any]:
    """timm's description of a network, an attribute that `nn.Module` does not declare."""
    return backbone.pretrained_cfg


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or save it again.") from error


def _read_pickle(path: Path) -> Any:
    refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = f"{path} holds more than tensors, and loading that could run code"
        raise ValueError(f"{problem}; save its state_dict() as .safetensors instead.") from error
    except Exception as error:  # torch raises errors of any kind for a damaged file
        problem = f"{path} is not a whole PyTorch checkpoint ({first_line(error)})"
        raise ValueError(f"{problem}; fetch or save it again.") from error


def _find_wrappers(tensors: Tensors, expected: Tensors) -> str:
    """The prefix, such as "module.model0.", under which most expected keys are found; of several, the shortest."""
    prefixes = {""}
    for key in tensors:
        prefix = ""
        while wrapper := WRAPPERS.match(key, len(prefix)):
            prefix += wrapper[0]
            prefixes.add(prefix)
    return max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + key in tensors for key in expected))


def _list_keys(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
