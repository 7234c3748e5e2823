"""Rebuilding a timm model in memory from its architecture and arguments, and checking that this gives the same one.

An ensemble is loaded in this way, so what was done to a network after it was made would be lost.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropBlock2d, DropPath
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.layers.create_norm import _NORM_MAP
from timm.layers.create_norm_act import _NORM_ACT_MAP
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.models import get_model_args, get_model_input_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import FrozenBatchNorm2d

from concat_ensemble.errors import first_line
from concat_ensemble.members.checkpoints import list_classifiers, load_backbone, timm_cfg
from concat_ensemble.modeling.configuration_concat_ensemble import (
    REFUSED_MODEL_ARGS,
    describe_unknown_architecture,
    timm_architectures,
)
from concat_ensemble.modeling.modeling_concat_ensemble import create_backbone

# Wrappers that do nothing to a network, and the attributes in which they hold it. By name, as importing some is slow.
WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel": "timm_model",
    "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperForImageClassification": "timm_model",
}
INERT = (nn.Identity, _DropoutNd, DropPath, DropBlock2d, type(None))  # change nothing in evaluation mode
NORMS = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)  # the same function in evaluation mode
# Attributes that change the training, the speed or the head, but not the features.
UNIMPORTANT = {"training", "inplace", "momentum", "num_classes", "fused_attn", "grad_checkpointing", "drop_rate"}
UNIMPORTANT |= {"extra_repr"}
ROUNDING = 1e-5  # relative; other kernels for the same network differ by some 1e-7 a layer


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside wrappers such as those of `torch.compile`, `DataParallel` and transformers' TimmWrapper.

    Raises:
        ValueError: if a wrapper has hooks, which would be lost.
    """
    kind = type(module)
    attribute = WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if attribute is None:
        return module
    is_patched = "forward" in vars(module) and attribute != "_orig_mod"  # torch.compile's has one of its own
    if is_patched or _has_hooks(module):
        raise ValueError(f"the {kind.__name__} in memory has hooks or another forward(); remove them.")
    return unwrap(getattr(module, attribute))


def select_model_args(network: nn.Module) -> dict[str, Any]:
    """The arguments with which timm built a network, without those that are no part of a member."""
    return {key: value for key, value in getattr(network, "_model_args", {}).items() if key not in REFUSED_MODEL_ARGS}


@torch.no_grad()
def rebuild(network: nn.Module, input_size: Sequence[int] | None = None) -> nn.Module:
    """Build a timm model again, without its classifier, from its architecture and arguments, and load its weights.

    If its features on random noise are not those of `network`, the arguments are read off the network, as timm does
    when it saves a model: after `reset_classifier(0, "avg")`, say. The noise has `input_size`, (C, H, W), by default
    that of the network. The network and the global random state stay unchanged; its hooks run once, on a copy.

    Returns:
        The rebuilt network, in float32 on the CPU.

    Raises:
        ValueError: naming the first differences, if no arguments give the features of `network`.
    """
    architecture, kind = timm_cfg(network).get("architecture"), type(network).__name__
    if architecture not in timm_architectures():
        raise ValueError(describe_unknown_architecture(architecture))
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        raise ValueError(f"the {kind} in memory is on the meta device; load its weights first.")
    expected, differences, misfit = None, [], ""
    with torch.random.fork_rng(devices=[]):
        for model_args in _list_model_args(network):
            try:
                rebuilt = create_backbone(architecture, **model_args).eval()
                differences = differences or _list_differences(network, rebuilt)
                load_backbone(rebuilt, network.state_dict(), f"the {kind} in memory")
            except (RuntimeError, ValueError) as error:  # RuntimeError: for tensors of other kinds, such as quantized
                misfit = misfit or first_line(error)
                continue
            channels = get_model_input_config(rebuilt)["input_size"][0]
            height_width = (input_size or get_model_input_config(network)["input_size"])[1:]
            pixels = torch.randn(1, channels, *height_width, generator=torch.Generator().manual_seed(0))
            expected = _compute_features(network, pixels) if expected is None else expected
            differences = _list_differences(network, rebuilt)
            if _is_same(rebuilt, pixels, expected, differences):
                return rebuilt
    hooked = [] if expected is None else [f"{name or 'it'} has hooks" for name in _list_hooked(network)]
    reasons = [text for _, text in differences] or hooked or [misfit or "its features differ"]
    more = f" and {len(reasons) - 3} more differences" if len(reasons) > 3 else ""
    problem = f"the {kind} in memory is not timm's {architecture}, so it cannot be rebuilt: {'; '.join(reasons[:3])}"
    remedy = "undo that, merge adapters and remove parametrizations, or create it with arguments that say the same"
    raise ValueError(f"{problem}{more}; {remedy}.")


def _list_model_args(network: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments to try: those that timm recorded, then with what timm reads off the network (`global_pool`,
    `img_size`), then with the place of the last norm, for which vision transformers have two names."""
    # timm takes layers such as nn.ReLU by name, too, and JSON can hold nothing else.
    recorded = {
        key: _name_layer(value) if isinstance(value, type) else value
        for key, value in select_model_args(network).items()
    }
    yield recorded
    with torch.device("meta"):
        own = get_model_args(create_backbone(timm_cfg(network)["architecture"], **recorded))
    current = get_model_args(network)
    first_conv: Any = dict(network.named_modules()).get(str(timm_cfg(network).get("first_conv")))
    if isinstance(first_conv, nn.Conv2d):  # it may have been replaced by one of other channels
        current["in_chans"] = first_conv.in_channels
    keys = ("global_pool", "img_size", "in_chans")
    changed = {key: current[key] for key in keys if key in current and current[key] != own.get(key)}
    if not changed:
        return
    yield recorded | changed
    if hasattr(network, "fc_norm"):
        has_norm = not isinstance(network.fc_norm, nn.Identity)
        yield {**recorded, **changed, "fc_norm": has_norm}
        yield {**recorded, **changed, "use_fc_norm": has_norm}


def _name_layer(layer: type) -> str:
    """timm's name of a layer, such as "silu"."""
    known = (_ACT_LAYER_DEFAULT, _NORM_ACT_MAP, _NORM_MAP)
    return next((name for names in known for name, kind in names.items() if kind is layer), layer.__name__.lower())


def _compute_features(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pooled features of a copy of `network` in float32 on the CPU; a classifier is left out."""
    kind = type(network).__name__
    try:
        original: Any = copy.deepcopy(network).cpu().float().to(memory_format=torch.contiguous_format).eval()
        if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
            for layer in original.modules():  # timm computes these buffers in float32 and does not save them
                getattr(layer, "init_non_persistent_buffers", lambda: None)()
        if getattr(original, "num_classes", 0):
            # By way of the module's call, so that its hooks run.
            original.forward = lambda x: original.forward_head(original.forward_features(x), pre_logits=True)
        features = original(pixels)
    except Exception as error:  # a changed network may fail in any way
        raise ValueError(
            f"the {kind} in memory cannot be run on noise ({first_line(error)}); mend it first."
        ) from error
    if not isinstance(features, torch.Tensor):
        problem = f"the {kind} in memory returns {type(features).__name__}, not pooled features"
        raise ValueError(f"{problem}; create it without features_only.")
    if not features.isfinite().all():
        problem = f"the {kind} in memory gives NaN or infinite features for noise, which cannot be compared"
        raise ValueError(f"{problem}; check its weights.")
    return features


def _is_same(
    rebuilt: nn.Module, pixels: torch.Tensor, expected: torch.Tensor, differences: list[tuple[bool, str]]
) -> bool:
    """Whether the features are equal. Those that differ by rounding are equal if all layers are the same; and equal
    features prove nothing where noise does not reach the difference, such as that of ReLU6 from ReLU."""
    features = rebuilt(pixels)
    if torch.equal(features, expected):
        return not any(decides for decides, _ in differences)
    is_close = features.shape == expected.shape and torch.dist(features, expected) <= ROUNDING * expected.norm()
    return bool(is_close) and not differences


def _list_differences(network: nn.Module, rebuilt: nn.Module) -> list[tuple[bool, str]]:
    """How the layers of `network` differ from those of `rebuilt`, and whether that alone decides: for replaced methods
    and for layers without weights, such as activations and pooling."""
    if not isinstance(network, type(rebuilt)):
        return [(False, f"it is {_name_type(network, rebuilt)}, not {_name_type(rebuilt, network)}")]
    has_classes = bool(getattr(network, "num_classes", 0))
    left_out = tuple(list_classifiers(rebuilt)) if has_classes else ()
    layers, own = dict(network.named_modules()), dict(rebuilt.named_modules())
    differences = []
    if has_classes and type(network).forward is not type(rebuilt).forward:  # features leave forward() out
        differences.append((True, f"forward() of {type(network).__name__} is not timm's"))
    for name in dict.fromkeys([*own, *layers]):
        if f"{name}.".startswith(tuple(f"{layer}." for layer in left_out)):
            continue
        found = _compare_layers(name, layers.get(name), own.get(name))
        differences += found
        if found and type(layers.get(name)) is not type(own.get(name)) and name:
            left_out += (name,)  # the layers inside it are not listed
    return differences


def _compare_layers(name: str, layer: nn.Module | None, own: nn.Module | None) -> list[tuple[bool, str]]:
    """How a layer differs from timm's `own` of the same name. None stands for a layer that there is not."""
    if isinstance(layer, INERT) and isinstance(own, INERT):
        return []
    if layer is None or own is None:
        return [(False, f"it has no {name}" if layer is None else f"{name} is added")]
    members = (layer.parameters(), layer.buffers(), layer.children(), own.parameters(), own.buffers(), own.children())
    decides = not any(True for group in members for _ in group)
    if type(layer) is not type(own) and not (isinstance(layer, NORMS) and isinstance(own, NORMS)):
        return [(decides, f"{name or 'it'} is {_name_type(layer, own)}, not {_name_type(own, layer)}")]
    replaced = [
        (True, f"{_join(name, key)}() is replaced")
        for key, value in vars(layer).items()
        if callable(value) and callable(getattr(type(layer), key, None)) and key not in vars(own).keys() | UNIMPORTANT
    ]
    values = {key: repr(value) for key, value in vars(own).items() if _is_plain(key, value)}
    others = {key: repr(vars(layer)[key]) for key in values if _is_plain(key, vars(layer).get(key, ...))}
    changed = [key for key in others if others[key] != values[key]]
    attributes = [(decides, f"{_join(name, key)} is {others[key]}, not {values[key]}") for key in changed]
    return replaced + attributes + [(False, _join(name, text)) for text in _compare_parts(layer, own)]


def _compare_parts(layer: nn.Module, own: nn.Module) -> list[str]:
    """How a layer's own parameters and buffers differ in kind or shape, and in value if they are not saved."""
    parts, own_parts = _list_parts(layer), _list_parts(own)
    differences = []
    for key in dict.fromkeys([*own_parts, *parts]):
        part, expected = _describe_part(parts.get(key)), _describe_part(own_parts.get(key))
        if part != expected:
            differences.append(f"{key} is {part}, not {expected}")
        elif key in own._non_persistent_buffers_set and not _is_close(parts[key], own_parts[key]):
            differences.append(f"{key} has other values")
    return differences


def _is_close(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are the same but for the rounding of a network in half precision."""
    return torch.allclose(buffer.cpu().float(), expected.float(), rtol=1e-2, equal_nan=True)


def _list_parts(layer: nn.Module) -> dict[str, torch.Tensor]:
    parts = dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])
    parts.pop("num_batches_tracked", None)  # a counter, which frozen BatchNorms do not have
    return parts


def _describe_part(part: torch.Tensor | None) -> str:
    """Shape of a tensor, and its kind if that is unusual, such as a quantized one."""
    if part is None:
        return "absent"
    kind = "" if type(part) in (nn.Parameter, torch.Tensor) else f"{type(part).__name__} "
    return f"{kind}of shape {tuple(part.shape)}"


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _list_hooked(network: nn.Module) -> list[str]:
    return [name for name, layer in network.named_modules() if _has_hooks(layer)]


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _is_plain(key: str, value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return key not in UNIMPORTANT and key[0] != "_" and all(isinstance(i, int | float | str | None) for i in items)


def _name_type(layer: nn.Module, other: nn.Module) -> str:
    kind = type(layer)
    return kind.__name__ if kind.__name__ != type(other).__name__ else f"{kind.__module__}.{kind.__name__}"
