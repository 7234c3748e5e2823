"""Neural tangent kernel features: the gradients of a member's output by its parameters, one row per image.

Fine-tuning near the pretrained point is linear probing of d f(x; theta) / d theta in place of phi(x)
(arXiv:2506.18221, section 2). Here f is a member's pooled features times a fixed head. A row of P numbers is hashed to
`dim` columns: each parameter is added with a random sign to a random column (Weinberger et al. 2009, arXiv:0902.2206),
so that for the hashing matrix S (P, dim)

    E <xS, yS> = <x, y>    and    Var <xS, yS> <= (|x|^2 |y|^2 + <x, y>^2) / dim <= 2 |x|^2 |y|^2 / dim

at one addition per parameter. More non-zeros per row of S (Kane and Nelson 2014, arXiv:1012.1577), or a dense S as in
TRAK (Park et al. 2023, arXiv:2303.14186), have the same second moment. S is generated again from the seed for each
tensor, so neither S nor the (images, P) matrix of gradients is ever in memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from concat_ensemble.errors import first_line
from concat_ensemble.members.assemble import is_ensemble


@dataclass(frozen=True)
class NTK:
    """Settings of NTK features: `extract_features(model, dataset, ntk=NTK())` stores them in place of pooled features.

    Args:
        dim: Columns of a member's block. The root mean square error of the inner product of two rows is at most
            sqrt(2 / dim) of the product of their norms.
        parameters: Regular expression, searched for in the names of a member's parameters. Default: all parameters.
        seed: Random seed for the hashing and for the random head.
        head: (sum of D_k,) weights of the pooled features, in member order: a probe's `coef_[c] / scale_`. Or (C, sum
            of D_k), all of `coef_ / scale_`: the gradients of C outputs, each hashed with a matrix of its own, are
            added. This is a hash of the C rows end to end, so inner products estimate the sum of the outputs'
            kernels. Default: a random unit vector for each member.
        memory: Approximate bytes for gradients and activations, which decide how many images a member takes at a time.

    Raises:
        ValueError: for a setting out of range, naming it.
    """

    dim: int = 1024
    parameters: str = ""
    seed: int = 0
    head: Sequence | np.ndarray | None = None
    memory: int = 1 << 30

    def __post_init__(self):
        for name, least in (("dim", 1), ("seed", 0), ("memory", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"NTK {name}={value!r} must be an integer of at least {least}.")
        try:
            re.compile(self.parameters)
        except (re.error, TypeError) as error:
            raise ValueError(f"NTK parameters={self.parameters!r} is not a regular expression: {error}.") from error
        if self.head is not None and not (np.ndim(self.head) in (1, 2) and np.isfinite(self.head).all()):
            raise ValueError("NTK head must be rows of finite numbers, one for each pooled feature of the members.")

    def for_members(self, model: nn.Module) -> list[NTK]:
        """The settings of each built member, with its own part of the head. Raises ValueError if the head does not
        have one weight per pooled feature of the ensemble."""
        if not is_ensemble(model):
            return [self]
        if self.head is None:
            return [self] * len(model.members)
        feature_dims = [model.config.members[int(number)]["num_features"] for number in model.members]
        _check_head(np.shape(self.head)[-1], sum(feature_dims))
        heads = np.split(np.asarray(self.head), np.cumsum(feature_dims)[:-1], axis=-1)
        return [dataclasses.replace(self, head=head) for head in heads]

    def features(self, member: nn.Module, pixels: Tensor) -> Tensor:
        """(B, `dim`): hashed gradients of a backbone or a transformers model, for its own pixels (B, ...)."""
        return torch.cat([self._hash(chunk) for chunk in self._gradients(member, pixels)])

    @torch.no_grad()
    def _gradients(self, member: nn.Module, pixels: Tensor) -> Iterator[list[tuple[Tensor, ...]]]:
        """For each chunk of b images and each output, a (b, *shape) tensor per selected parameter."""
        parameters = self._select_parameters(member)

        def outputs(parameters, image):
            pooled = _pool(member, parameters, image[None])[0].float()
            return self._head_weights(pooled) @ pooled

        def gradients(parameters, image):
            values, pull_back, *_ = vjp(partial(outputs, image=image), parameters)
            return [tuple(pull_back(unit)[0].values()) for unit in torch.eye(len(values)).to(values)]

        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
                for images in pixels.split(self._chunk_size(member, parameters, pixels)):
                    yield vmap(gradients, in_dims=(None, 0))(parameters, images)
        except RuntimeError as error:
            problem = f"torch.func finds no gradients per image for {_architecture(member)} ({first_line(error)})"
            raise ValueError(f"{problem}; turn gradient checkpointing off, and use its processor's pixels.") from error

    def _select_parameters(self, member: nn.Module) -> dict[str, Tensor]:
        weights = dict(member.named_parameters())
        selected = {name: weight.detach() for name, weight in weights.items() if re.search(self.parameters, name)}
        if not selected:
            names = f"{_architecture(member)}: {', '.join([*weights][:3])}, ..."
            raise ValueError(f"NTK parameters={self.parameters!r} matches no parameter of {names}")
        return selected

    def _head_weights(self, pooled: Tensor) -> Tensor:
        """(C, D) weights of C outputs for the pooled features (D,) of one member."""
        if self.head is None:
            direction = np.random.default_rng([self.seed, 1]).normal(size=(1, len(pooled)))
            return torch.from_numpy(direction / np.linalg.norm(direction)).to(pooled)
        head = np.atleast_2d(self.head)
        _check_head(head.shape[1], len(pooled))
        return torch.from_numpy(head).to(pooled)

    def _chunk_size(self, member: nn.Module, parameters: dict[str, Tensor], pixels: Tensor) -> int:
        """How many images fit into `memory`. Each takes its gradients and what its forward pass saves for them; the
        backward pass takes as much again."""
        num_outputs = 1 if self.head is None else len(np.atleast_2d(self.head))
        sizes = [num_outputs * weight.nbytes for weight in parameters.values()]

        def record(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        tracked = {name: weight.detach().requires_grad_() for name, weight in parameters.items()}
        with torch.enable_grad(), saved_tensors_hooks(record, lambda tensor: tensor):
            _pool(member, tracked, pixels[:1])
        return max(1, self.memory // (2 * sum(sizes)))

    def _hash(self, outputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """(b, `dim`). One random integer below 2 `dim` gives a parameter's column and sign: sums of the second half of
        the columns are subtracted from those of the first."""
        sums = outputs[0][0].new_zeros(len(outputs[0][0]), 2 * self.dim)
        for number, gradients in enumerate(outputs):
            rng = np.random.default_rng(len(outputs) * self.seed + number)
            for gradient in gradients:
                rows = gradient.flatten(1)
                columns = torch.from_numpy(rng.integers(2 * self.dim, size=rows.shape[1])).to(rows.device)
                sums.scatter_add_(1, columns.expand_as(rows), rows)
        return sums[:, : self.dim] - sums[:, self.dim :]


class NTKFeatures:
    """The `Extractor` of hashed gradients, for one model."""

    memory_format = torch.contiguous_format  # gradients per image are not faster in channels_last
    needs_gradients = True
    uses_projection = False
    name_suffix = " NTK"

    def __init__(self, ntk: NTK, model: PreTrainedModel):
        self._members = ntk.for_members(model)

    def key_fields(self, position: int) -> dict[str, Any]:
        ntk = self._members[position]
        head = None if ntk.head is None else np.asarray(ntk.head, np.float32).tolist()
        return {"ntk": {"dim": ntk.dim, "parameters": ntk.parameters, "seed": ntk.seed, "head": head}}

    def num_features(self, model: PreTrainedModel, position: int) -> int | None:
        return self._members[position].dim

    def features(self, model: PreTrainedModel, positions: Sequence[int], pixel_values: Tensor) -> list[Tensor]:
        members = [(model, pixel_values)]
        if is_ensemble(model):
            members = [(member, model._member_pixels[k](pixel_values)) for k, member in model.members.items()]
        settings = [self._members[position] for position in positions]
        return [ntk.features(member, pixels) for ntk, (member, pixels) in zip(settings, members, strict=True)]


def _check_head(weights: int, num_features: int) -> None:
    if weights != num_features:
        raise ValueError(f"NTK head has {weights} weights; it needs {num_features}, one for each pooled feature.")


def _pool(member: nn.Module, parameters: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """(b, D) pooled features with these parameters in place of the member's own."""
    if isinstance(member, PreTrainedModel):
        return functional_call(member, parameters, (), {"pixel_values": pixels}).pooler_output.flatten(1)
    return functional_call(member, parameters, (pixels,))


def _architecture(member: nn.Module) -> str:
    return getattr(member, "pretrained_cfg", {}).get("architecture", type(member).__name__)
