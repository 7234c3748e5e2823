"""What timm's `train.py` records beside the weights: the network, its arguments and its preprocessing."""

import json
from typing import Any

from timm.models import resolve_model_input_args

from concat_ensemble.modeling.configuration_concat_ensemble import timm_architectures, validate_model_args

PIXELS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
SIZES = ("input_size", "img_size", "in_chans", "chans")


def find_architecture(content: dict[str, Any]) -> str | None:
    """timm's name of the network that a checkpoint says it holds, if it says so."""
    for name in (content.get("arch"), _find_args(content).get("model")):
        architecture = name.split(".")[0] if isinstance(name, str) else None
        if architecture in timm_architectures():
            return architecture
    return None


def find_train_args(content: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of timm's `train.py` in a checkpoint that change its network or its pixels."""
    keys = ("gp", "bn_eps", "model_kwargs", *SIZES, *PIXELS)
    args = _find_args(content)
    if isinstance(args.get("input_size"), int):  # of DeiT and MAE, for square images
        args = {key: value for key, value in args.items() if key != "input_size"}
    return {key: args[key] for key in keys if _is_given(args.get(key))}


def resolve_train_args(architecture: str, train_args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `timm.create_model`, and what to replace in `pretrained_cfg`, as timm's `train.py` resolves them.

    Raises:
        ValueError: for arguments that do more than construct a network, and for those that contradict each other.
    """
    try:
        train_args = json.loads(json.dumps(train_args, allow_nan=False))
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"its training arguments are not plain values: {error}") from error
    model_args = {"global_pool": train_args.get("gp"), "bn_eps": train_args.get("bn_eps")}
    own = validate_model_args(train_args.get("model_kwargs", {}))
    sizes = {key: train_args[key] for key in SIZES if key in train_args}
    try:
        resolved = resolve_model_input_args(architecture, args=sizes, **(model_args | own))
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"its training arguments {sizes} do not describe images: {error}") from error
    pretrained_cfg: dict[str, Any] = {key: train_args[key] for key in PIXELS if key in train_args}
    own_size = resolved.pop("pretrained_cfg").get("input_size", (3, 224, 224))
    side = sizes.get("img_size")
    size = sizes.get("input_size") or ((own_size[0], side, side) if side else None)
    if size:
        pretrained_cfg["input_size"] = tuple(size)
    del resolved["model_name"]
    return validate_model_args(resolved), pretrained_cfg


def _is_given(value: Any) -> bool:
    return bool(value) if value is None or isinstance(value, str | dict) else True


def _find_args(content: dict[str, Any]) -> dict[str, Any]:
    args = content.get("args")
    return args if isinstance(args, dict) else {}
