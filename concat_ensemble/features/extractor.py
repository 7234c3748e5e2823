"""What `extract_features` computes of a model: pooled features here, gradients in `ntk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from concat_ensemble.members.assemble import is_ensemble


class Extractor(Protocol):
    """Computes one block of features for each built member of a model (a transformers model is its own only member). A
    member's position is its place among the built members."""

    memory_format: torch.memory_format  # the fastest layout of the weights
    needs_gradients: bool  # False: runs in inference mode
    uses_projection: bool  # whether a projection stored in the ensemble applies to these features
    name_suffix: str  # follows the architecture in the listing of `concat-ensemble cache`

    def key_fields(self, position: int) -> dict[str, Any]:
        """JSON values that decide a member's features beside the member itself, for the key of its block."""
        ...

    def num_features(self, model: PreTrainedModel, position: int) -> int | None:
        """D_k of the member at this position; None where only its features tell."""
        ...

    def features(self, model: PreTrainedModel, positions: Sequence[int], pixel_values: Tensor) -> list[Tensor]:
        """(B, D_k) for each member of `model`, whose members have these positions in the model to extract. `model` is
        in evaluation mode; `pixel_values` (B, ...) are from its processor."""
        ...


class PooledFeatures:
    """Each member's pooled features, (B, num_features)."""

    memory_format = torch.channels_last  # convolutions run faster in it, on a CPU as on a GPU
    needs_gradients = False
    uses_projection = True
    name_suffix = ""

    def key_fields(self, position: int) -> dict[str, Any]:
        return {}  # keys as in version 0.1.0, so that what it stored is found

    def num_features(self, model: PreTrainedModel, position: int) -> int | None:
        return (
            model.config.members[model.config.built_members[position]]["num_features"] if is_ensemble(model) else None
        )

    def features(self, model: PreTrainedModel, positions: Sequence[int], pixel_values: Tensor) -> list[Tensor]:
        if is_ensemble(model):
            return list(model(pixel_values, output_member_features=True).member_features)
        return [model(pixel_values=pixel_values).pooler_output.flatten(1)]
