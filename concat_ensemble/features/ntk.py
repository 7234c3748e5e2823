"""Neural tangent kernel features: the gradients of a member's output by its parameters, one row per image.

Fine-tuning near the pretrained point is linear probing of d f(x; theta) / d theta in place of phi(x) (arXiv:2506.18221,
section 2). Here f is a member's pooled features times a fixed head. A row of P numbers is hashed to `dim`: each
parameter goes with a random sign into a random column (Weinberger et al. 2009, arXiv:0902.2206), so that for S (P, dim)

    E <xS, yS> = <x, y>    and    Var <xS, yS> <= (|x|^2 |y|^2 + <x, y>^2) / dim <= 2 |x|^2 |y|^2 / dim

at one addition per parameter; more non-zeros in a row of S (Kane and Nelson 2014, arXiv:1012.1577) or a dense S, as TRAK
has it (Park et al. 2023, arXiv:2303.14186), leave the second moment as it is. S is drawn again from the seed, tensor by
tensor: neither S nor (images, P) is ever there.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import DatasetDict
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.errors import first_line
from concat_ensemble.features.extraction import Pixels, is_ensemble, submodel
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble


@dataclass(frozen=True)
class NTK:
    """What `extract_features(model, dataset, ntk=NTK())` stores of each member in place of its pooled features.

    Args:
        dim: Columns of a member's block. Inner products of two rows are off by sqrt(2 / dim) of their norms at most, in
            root mean square.
        parameters: Regular expression, searched for in the parameters' names as the member has them; all when left out.
        seed: Of the hashing and of the random head.
        head: (sum of D_k,) weights of the pooled features, in member order: a probe's `coef_[c] / scale_`. A random unit
            vector for each member when left out.
        memory: Bytes, roughly, for gradients and activations: as many images go through a member at a time as fit.
    """

    dim: int = 1024
    parameters: str = ""
    seed: int = 0
    head: Sequence[float] | np.ndarray | None = None
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
        if self.head is not None and not (np.ndim(self.head) == 1 and np.isfinite(self.head).all()):
            raise ValueError("NTK head must be one row of finite numbers, as wide as the members' pooled features.")

    @property
    def computed(self) -> dict:
        """What decides a block, for its key."""
        head = None if self.head is None else np.asarray(self.head, np.float32).tolist()
        return {"ntk": {"dim": self.dim, "parameters": self.parameters, "seed": self.seed, "head": head}}

    def for_members(self, model: nn.Module) -> list[NTK]:
        """The same for each built member, with its own part of the head."""
        if self.head is None or not is_ensemble(model):
            return [self] * (len(model.members) if is_ensemble(model) else 1)
        widths = [model.config.members[int(k)]["num_features"] for k in model.members]
        if len(self.head) != sum(widths):
            raise ValueError(f"NTK head has {len(self.head)} weights; the pooled features are {sum(widths)}.")
        return [dataclasses.replace(self, head=head) for head in np.split(self.head, np.cumsum(widths)[:-1])]

    def features(self, model: nn.Module, place: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, `dim`): hashed gradients of the built member at this place, from the model's `pixel_values`."""
        member, pixels = _member(model, place, pixel_values)
        return torch.cat([self._hashed(chunk) for chunk in self._gradients(member, self._chosen(member), pixels)])

    def kernel(self, model: nn.Module, place: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, n) float64: inner products of the whole gradients. As many parameters at a time as fit for all n images."""
        member, pixels = _member(model, place, pixel_values)
        chosen, kernel = self._chosen(member), torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
        ends = np.cumsum([len(pixels) * weight.nbytes for weight in chosen.values()])
        for _, names in itertools.groupby(chosen, dict(zip(chosen, ends // self.memory, strict=True)).get):
            chunks = self._gradients(member, {name: chosen[name] for name in names}, pixels)
            for parts in zip(*chunks, strict=True):
                rows = torch.cat([part.flatten(1) for part in parts]).double()
                kernel += (rows @ rows.T).cpu()
        return kernel

    def _chosen(self, member: nn.Module) -> dict[str, torch.Tensor]:
        weights = dict(member.named_parameters())
        chosen = {name: weight.detach() for name, weight in weights.items() if re.search(self.parameters, name)}
        if not chosen:
            some = ", ".join([*weights][:3])
            raise ValueError(f"NTK parameters={self.parameters!r} is in no name of {_name(member)}'s: {some}, ...")
        return chosen

    @torch.no_grad()
    def _gradients(self, member, parameters, pixels) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each chunk of b images, a (b, *shape) tensor per parameter."""

        def output(parameters, image):
            pooled = _pooled(member, parameters, image[None])[0].float()
            return pooled @ self._weights(pooled)

        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no rule for vmap
                for images in pixels.split(self._fitting(member, parameters, pixels)):
                    yield tuple(vmap(grad(output), in_dims=(None, 0))(parameters, images).values())
        except RuntimeError as error:
            what = f"torch.func finds no gradients per image for {_name(member)} ({first_line(error)})"
            raise ValueError(f"{what}; turn gradient checkpointing off, and use its processor's pixels.") from error

    def _weights(self, pooled: torch.Tensor) -> torch.Tensor:
        """The head for pooled features (D,) of one member."""
        random = np.random.default_rng([self.seed, 1]).normal(size=len(pooled))
        head = random / np.linalg.norm(random) if self.head is None else np.asarray(self.head)
        if head.shape != pooled.shape:
            raise ValueError(f"NTK head has {len(head)} weights; the pooled features are {len(pooled)}.")
        return torch.from_numpy(head).to(pooled)

    def _fitting(self, member, parameters, pixels) -> int:
        """Images that fit into the memory: an image takes its gradients, and what its forward pass keeps for them."""
        held = [weight.nbytes for weight in parameters.values()]
        wanted = {name: weight.detach().requires_grad_() for name, weight in parameters.items()}
        kept = saved_tensors_hooks(lambda tensor: held.append(tensor.nbytes) or tensor, lambda tensor: tensor)
        with torch.enable_grad(), kept:
            _pooled(member, wanted, pixels[:1])
        return max(1, self.memory // (2 * sum(held)))  # the backward pass takes as much again

    def _hashed(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """(b, `dim`). A parameter's column and sign are one draw among 2 `dim` columns, of which the latter half is
        subtracted."""
        rng = np.random.default_rng(self.seed)
        sums = gradients[0].new_zeros(len(gradients[0]), 2 * self.dim)
        for rows in (gradient.flatten(1) for gradient in gradients):
            columns = torch.from_numpy(rng.integers(2 * self.dim, size=rows.shape[1])).to(rows.device)
            sums.scatter_add_(1, columns.expand_as(rows), rows)
        return sums[:, : self.dim] - sums[:, self.dim :]


def exact_kernel(model: nn.Module, pixel_values: torch.Tensor, *, ntk: NTK | None = None) -> np.ndarray:
    """The empirical neural tangent kernel (n, n) of a few images, nothing hashed: the sum of the members' kernels, as the
    gradients side by side have it (arXiv:2506.18221, section 2). Gradients are computed n * P * 4 / `memory` times.

    Args:
        model: An ensemble, a timm model, or a transformers model with a `pooler_output`.
        pixel_values: (n, ...), as its processor makes them.
        ntk: Parameters, head, its seed, and memory; `dim` does nothing here.
    """
    return np.sum(_kernels(model, pixel_values, ntk or NTK()), axis=0)


def kernel_table(model: nn.Module, dataset: DatasetDict, processor=None, *, ntk: NTK | None = None) -> FeatureTable:
    """The exact kernel as features for every probe, for small datasets: with the eigendecomposition K = V diag(l) V' of
    the m training and validation images' kernel, a row is k(x, these) V diag(l)^(-1/2) Q, so its inner product with each
    of their rows is the kernel's. Q is a random rotation: without it, standardising the columns would whiten them.

    Args:
        dataset: From `load_data`. All images are in memory at once, and nothing is stored.
        model, processor, ntk: As for `exact_kernel` and `extract_features`.
    """
    model, ntk = assemble(model) if hasattr(model, "pretrained_cfg") else model, ntk or NTK()
    part, processor = submodel(model, range(len(ntk.for_members(model))), processor)
    places = [(name, n) for name, split in dataset.items() for n in range(len(split))]
    kernels = _kernels(part, torch.stack(list(Pixels(dataset, places, processor))), ntk)
    split_of = np.array([name for name, _ in places])
    rows = [_features(kernel, split_of != "test", ntk.seed) for kernel in kernels]
    return FeatureTable(
        {name: [block[split_of == name] for block in rows] for name in dataset},
        {name: read_labels(split) for name, split in dataset.items()},
        class_names(next(iter(dataset.values()))),
    )


def _kernels(model: nn.Module, pixel_values: torch.Tensor, ntk: NTK) -> list[np.ndarray]:
    """(n, n) of each built member."""
    model = copy.deepcopy(assemble(model) if hasattr(model, "pretrained_cfg") else model).eval().float()
    pixels = pixel_values.to(next(model.parameters()).device)
    return [own.kernel(model, place, pixels).numpy() for place, own in enumerate(ntk.for_members(model))]


def _features(kernel: np.ndarray, fitted: np.ndarray, seed: int) -> np.ndarray:
    """(n, rank <= m) rows whose inner products with those of the m images of the mask `fitted` are the kernel's."""
    values, vectors = np.linalg.eigh(kernel[fitted][:, fitted])
    kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(kept.sum(), kept.sum())))
    return (kernel[:, fitted] @ (vectors[:, kept] / np.sqrt(values[kept])) @ rotation).astype(np.float32)


def _member(model: nn.Module, place: int, pixel_values: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The built member at this place (a transformers model is its own), and its part of `pixel_values`."""
    if not is_ensemble(model):
        return model, pixel_values
    number = list(model.members)[place]
    return model.members[number], model._member_pixels[number](pixel_values)


def _pooled(member: nn.Module, parameters: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """(b, D) with these parameters in the place of its own."""
    if isinstance(member, PreTrainedModel):
        return functional_call(member, parameters, (), {"pixel_values": pixels}).pooler_output.flatten(1)
    return functional_call(member, parameters, (pixels,))


def _name(member: nn.Module) -> str:
    return getattr(member, "pretrained_cfg", {}).get("architecture", type(member).__name__)
