"""Folding BatchNorm into the convolutions before it: the same features up to rounding, in less time."""

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel

Ensemble = TypeVar("Ensemble", bound=ConcatEnsemblePreTrainedModel)


class FoldedBatchNorm(nn.Sequential):
    """What takes the place of a folded BatchNorm: the dropout and the activation that timm's BatchNorm may hold."""

    is_folded_batchnorm = True  # by which an ensemble refuses to be saved or trained


@torch.no_grad()
def fold_batchnorm(model: Ensemble) -> Ensemble:
    """Fold every BatchNorm whose input is the output of a convolution, and of nothing else, into the convolution's
    weight and bias, for faster inference.

    Features stay the same up to rounding. Members without BatchNorm stay as they are, and so do other ensembles that
    share the members. Folding twice is the same as folding once. A folded model can be neither saved nor trained:
    `save_pretrained` and `train()` refuse it. Returns the model itself, whose class may come from a repo.

    Raises:
        ValueError: in training mode, where the statistics move, and for a member whose features folding would change.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("fold_batchnorm() is for evaluation; call eval() first, and fold after training.")
    pixels = torch.rand(1, *model.config.pixel_shape, generator=torch.Generator().manual_seed(0))
    folded = {}
    for name, member in model.members.items():
        try:
            folded[name] = _fold_member(member, model._member_pixels[name](pixels))
        except ValueError as error:
            raise ValueError(f"members[{name}]: {error}") from error
    model.members.update(folded)
    return model


def _fold_member(member: nn.Module, pixels: torch.Tensor) -> nn.Module:
    """A copy of `member` with its BatchNorms folded, or `member` itself if none can be."""
    if not any(getattr(module, "running_mean", None) is not None for module in member.modules()):
        return member
    weight = next(member.parameters())
    precise = torch.promote_types(weight.dtype, torch.float32)  # so that weights are rounded once, after folding
    folded = copy.deepcopy(member).to(precise)
    pixels = pixels.to(weight.device, precise)
    with _Recorder() as recorder:
        expected = folded(pixels)
    pairs = _find_pairs(folded, recorder)
    for name, norm, conv in pairs:
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
        folded.set_submodule(name, FoldedBatchNorm(*rest).eval())
    if not torch.dist(folded(pixels), expected) <= 1e-2 * expected.norm():  # TF32's rounding is well within this
        raise ValueError("its features change when BatchNorm is folded; use it as it is.")
    return folded.to(weight.dtype) if pairs else member


class _Recorder(TorchFunctionMode):
    """Records a forward pass: which weight each BatchNorm's input was convolved with, and how often a tensor is used.
    It watches the functions and not the modules, since some modules convolve with other weights than those they hold.
    """

    def __init__(self):
        super().__init__()
        self.weight_by_output: dict[int, int] = {}  # of convolutions; all by id of the tensor
        self.input_by_mean: dict[int, int] = {}  # of BatchNorms
        self.uses: Counter[int] = Counter()
        self.alive: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, int | torch.Size):  # reading a shape does not count as a use
            return result
        for value in (*args, *(kwargs or {}).values()):
            self.uses.update(map(id, value if isinstance(value, list | tuple) else [value]))
        if function in (functional.conv1d, functional.conv2d, functional.conv3d):
            self.weight_by_output[id(result)] = id(args[1])
        elif function is functional.batch_norm:
            self.input_by_mean[id(args[1])] = id(args[0])
        self.alive.append((args, kwargs, result))  # an id is unique only while its tensor lives
        return result


def _find_pairs(network: nn.Module, recorder: _Recorder) -> list[tuple[str, Any, Any]]:
    """Name of each BatchNorm that can be folded, the BatchNorm, and the convolution before it: the statistics, the
    tensor between the two and the weight must each have been used once."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d
    convolutions = {id(module.weight): module for module in network.modules() if isinstance(module, kinds)}
    pairs = []
    for name, norm in network.named_modules():
        mean = id(getattr(norm, "running_mean", None))
        between = recorder.input_by_mean.get(mean, 0)  # 0 is no tensor's id
        weight = recorder.weight_by_output.get(between, 0)
        if weight in convolutions and recorder.uses[mean] == recorder.uses[between] == recorder.uses[weight] == 1:
            pairs.append((name, norm, convolutions[weight]))
    return pairs
