"""Fewer columns for a concatenation: by its principal directions, or at random for comparison."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel


@dataclass
class Projection:
    """rows @ weight + bias: from D columns as they are to d.

    Its columns must not be standardised again: that is whitening, which ruins a probe where d comes near the number of
    rows.
    """

    weight: np.ndarray  # (D, d)
    bias: np.ndarray  # (d,)

    def __call__(self, table: FeatureTable) -> FeatureTable:
        """The table in d columns, computed when they are read."""
        blocks = {name: [_Projected(table[name], self)] for name in table}
        digest = hashlib.sha256(self.weight.tobytes() + self.bias.tobytes() + str(table.keys).encode()).hexdigest()
        return dataclasses.replace(table, blocks=blocks, keys=(digest[:32],))


def principal_projection(table: FeatureTable, width: int) -> Projection:
    """PCA of the training and validation rows, standardised, to at most `width` columns."""
    fitted = TableSplit.concatenate([table["train"], table["validation"]])
    mean, scale = moments(fitted)
    rows = StandardizedFeatures(fitted, mean, scale)
    if len(rows) >= rows.shape[1]:
        _, vectors = torch.linalg.eigh(rows.gram())
        vectors = vectors.flip(1)
    else:
        _, _, vectors = torch.linalg.svd(torch.cat([chunk for _, chunk in rows.chunks()]), full_matrices=False)
        vectors = vectors.T
    return standardised_projection(mean, scale, vectors[:, :width].cpu().numpy())


def random_projection(table: FeatureTable, width: int, seed: int) -> Projection:
    """Gaussian directions of the standardised columns: what as many columns keep when nothing chose them (Johnson and
    Lindenstrauss 1984)."""
    mean, scale = moments(TableSplit.concatenate([table["train"], table["validation"]]))
    directions = np.random.default_rng(seed).normal(size=(len(mean), width)) / np.sqrt(width)
    return standardised_projection(mean, scale, directions)


def with_projection(model: nn.Module, projection: Projection) -> ConcatEnsembleModel:
    """The ensemble with `pooler_output` projected; it shares the members' weights.

    Raises:
        ValueError: for an ensemble that has one already, of which only some members are built, or of another width.
    """
    config = model.config
    if config.projection_dim is not None or config.active_members is not None:
        raise ValueError("a projection goes onto a whole ensemble without one; use export_active() or the members.")
    width, projected = projection.weight.shape
    if width != config.num_features:
        raise ValueError(f"the projection takes {width} columns; the ensemble has {config.num_features}.")
    with torch.device("meta"):
        ensemble = ConcatEnsembleModel(ConcatEnsembleConfig(members=config.members, projection_dim=projected))
    ensemble.members, ensemble.projection = model.members, nn.Linear(width, projected)
    weights = {"weight": torch.from_numpy(projection.weight.T.copy()), "bias": torch.from_numpy(projection.bias)}
    ensemble.projection.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return ensemble.eval()


def stored_projection(model: nn.Module) -> Projection:
    """The stored projection of an ensemble that has one."""
    weight, bias = (
        tensor.detach().float().cpu().numpy() for tensor in (model.projection.weight, model.projection.bias)
    )
    return Projection(weight.T.copy(), bias)


def standardised_projection(mean: np.ndarray, scale: np.ndarray, directions: np.ndarray) -> Projection:
    """((x - mean) / scale) @ directions as one affine map."""
    weight = directions / scale[:, None].astype(np.float64)
    return Projection(weight.astype(mean.dtype), (-mean @ weight).astype(mean.dtype))


class _Projected:
    """A block of columns that a projection makes of a whole split."""

    def __init__(self, split: TableSplit, projection: Projection):
        self._split, self._projection = split, projection
        self.shape, self.dtype = (len(split), projection.weight.shape[1]), projection.weight.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part) -> np.ndarray:
        return self._split.rows(part) @ self._projection.weight + self._projection.bias
