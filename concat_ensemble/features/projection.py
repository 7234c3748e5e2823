"""Fewer features for a concatenation: along its principal directions, or along random ones for comparison."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import FeatureTable, Rows, TableSplit, labeled_split
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel, ConcatEnsemblePreTrainedModel


@dataclass
class Projection:
    """rows @ weight + bias: from D features, not standardized, to d. The projected features must not be standardized
    again: that is whitening, which ruins a probe if d is close to the number of rows."""

    weight: np.ndarray  # (D, d)
    bias: np.ndarray  # (d,)

    def __call__(self, table: FeatureTable) -> FeatureTable:
        """The table with one block of d features, which are computed when they are read."""
        blocks = {split: [ProjectedRows(table[split], self)] for split in table}
        digest = hashlib.sha256(self.weight.tobytes() + self.bias.tobytes() + str(table.keys).encode()).hexdigest()
        return dataclasses.replace(table, blocks=blocks, keys=(digest[:32],), names=("projection",))


class ProjectedRows(Rows):
    """The rows of a split, projected when they are read."""

    def __init__(self, split: TableSplit, projection: Projection):
        super().__init__((len(split), projection.weight.shape[1]), projection.weight.dtype)
        self._split, self._projection = split, projection

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        return self._split.rows(part) @ self._projection.weight + self._projection.bias


def principal_projection(table: FeatureTable, num_features: int) -> Projection:
    """PCA of the standardized training and validation rows, to `num_features` or the number that the table has."""
    fitted = labeled_split(table)
    mean, scale = moments(fitted)
    rows = StandardizedFeatures(fitted, mean, scale)
    if len(rows) >= rows.shape[1]:
        _, vectors = torch.linalg.eigh(rows.gram())
        vectors = vectors.flip(1)
    else:
        _, _, vectors = torch.linalg.svd(rows.stacked().double(), full_matrices=False)
        vectors = vectors.T
    return standardized_projection(mean, scale, vectors[:, :num_features].cpu().numpy())


def random_projection(table: FeatureTable, num_features: int, seed: int) -> Projection:
    """Gaussian directions of the standardized features (Johnson and Lindenstrauss 1984): the control for PCA, with as
    many features that were not chosen."""
    mean, scale = moments(labeled_split(table))
    directions = np.random.default_rng(seed).normal(size=(len(mean), num_features)) / np.sqrt(num_features)
    return standardized_projection(mean, scale, directions)


def standardized_projection(mean: np.ndarray, scale: np.ndarray, directions: np.ndarray) -> Projection:
    """((x - mean) / scale) @ directions as one affine map. mean, scale: (D,); directions: (D, d)."""
    weight = directions / scale[:, None].astype(np.float64)
    return Projection(weight.astype(mean.dtype), (-mean @ weight).astype(mean.dtype))


def with_projection(model: ConcatEnsemblePreTrainedModel, projection: Projection) -> ConcatEnsembleModel:
    """The ensemble with `pooler_output` projected; it shares the members' weights. Raises ValueError if the ensemble
    has a projection already or not all of its members, or if the projection takes another number of features."""
    config = model.config
    if config.projection_dim is not None or config.active_members is not None:
        raise ValueError("a projection goes onto a whole ensemble without one; use export_active() or the members.")
    num_features, projected = projection.weight.shape
    if num_features != config.num_features:
        raise ValueError(f"the projection takes {num_features} features; the ensemble has {config.num_features}.")
    with torch.device("meta"):
        ensemble = ConcatEnsembleModel(ConcatEnsembleConfig(members=config.members, projection_dim=projected))
    ensemble.members, ensemble.projection = model.members, nn.Linear(num_features, projected)
    weights = {"weight": torch.from_numpy(projection.weight.T.copy()), "bias": torch.from_numpy(projection.bias)}
    ensemble.projection.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return ensemble.eval()


def stored_projection(layer: nn.Linear) -> Projection:
    """The projection that an ensemble holds as this layer."""
    weight, bias = (tensor.detach().float().cpu().numpy() for tensor in (layer.weight, layer.bias))
    return Projection(weight.T.copy(), bias)
