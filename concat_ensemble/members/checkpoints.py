"""Weights from files of many origins, as a state dict with timm's own keys."""

import hashlib
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from concat_ensemble.errors import first_line

PICKLES = (".pth", ".pth.tar", ".pt", ".bin", ".tar", ".torch")
# Where training scripts put the weights beside optimizers and the like; averaged weights first, as timm prefers them.
CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_params",
    "classy_state_dict",
    "base_model",
    "model",
    "trunk",
    "teacher",
)
MOST_UNPACKED = 50  # times its size on disk; weights that are all zero shrink to a thousandth, trained ones to 0.9
WRAPPERS = re.compile(r"(?:module|_orig_mod|model0|model|backbone|encoder)\.")


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a `.safetensors` file or a pickle (read with `weights_only=True`, so that it can run nothing), and
    its metadata.

    Raises:
        ValueError: when the file is truncated, of an unknown kind, holds no tensors, or holds objects other than
            tensors.
        FileNotFoundError: when there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 (no iteration over it)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or save it again.") from error
    if not path.name.endswith(PICKLES):
        raise ValueError(f"{path}: unknown kind of checkpoint; give .safetensors, {', '.join(PICKLES)}.")
    refuse_bomb(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and loading that could run code; save its state_dict() as .safetensors instead."
        ) from error
    except Exception as error:  # torch answers garbage with errors of any kind
        raise ValueError(
            f"{path} is not a whole PyTorch checkpoint ({first_line(error)}); fetch or save it again."
        ) from error
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ValueError(
            f"{path} holds no state dict; its top level is {sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__}."
        )
    return tensors, {}


def refuse_bomb(path: Path) -> None:
    """Raise ValueError for a zip that would unpack to far more than it is: weights hardly compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile):  # for whoever reads it to say
        return
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise ValueError(
            f"{path} would unpack to {unpacked:,} bytes, which no weights do; fetch it from a source that you trust."
        )


def load_backbone(backbone: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load `fitting` tensors into a timm model; raises as that does."""
    backbone.load_state_dict(fitting(backbone, tensors, source), strict=False)


def fitting(backbone: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Those of `tensors` that belong to a timm model that was made with `num_classes=0`, whatever wrappers their keys carry, without
    the classifier's.

    A batch norm's `num_batches_tracked` may be missing, as in old checkpoints: it counts, and is no weight.

    Raises:
        ValueError: listing what is missing, unexpected, or of another shape.
    """
    wanted = backbone.state_dict()
    # Of all the stacks of wrappers ("module.model0.") that occur, the one under which most of the backbone is found.
    prefixes = {""} | {match[0][: m.end()] for key in tensors for match in [re.match(f"(?:{WRAPPERS.pattern})+", key)] if match
                       for m in WRAPPERS.finditer(match[0])}  # fmt: skip
    prefix = max(sorted(prefixes, key=len), key=lambda p: sum(p + key in tensors for key in wanted))
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    found = {key: tensor for key, tensor in found.items() if key in wanted or not key.startswith(heads or "\0")}
    missing = sorted(key for key in wanted if key not in found and not key.endswith("num_batches_tracked"))
    unexpected = sorted(set(found) - set(wanted))
    shapes = [
        f"{k} {tuple(found[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted(set(found) & set(wanted))
        if found[k].shape != wanted[k].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{label}: {_listing(keys)}"
            for label, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
            if keys
        ]
        name = backbone.pretrained_cfg.get("architecture", type(backbone).__name__)
        raise ValueError(
            f"{source} does not hold the weights of {name}; {'; '.join(problems)}. Name the right architecture, as NAME=FILE."
        )
    return found


def weights_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and values, in the order of the names: the same whatever file the weights
    lie in.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(state_dict.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _listing(keys: list[str]) -> str:
    return f"{', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
