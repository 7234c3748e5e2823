"""Fewer columns for a concatenation: by its principal directions, or at random for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from concat_ensemble.feature_table import FeatureTable, TableSplit
from concat_ensemble.probes.design import Design, moments


@dataclass
class Projection:
    """((x - mean) / scale) @ matrix: from D standardised columns to d.

    Its columns must not be standardised again: that is whitening, which ruins a probe where d comes near the number of
    rows.
    """

    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)
    matrix: np.ndarray  # (D, d)

    def __call__(self, table: FeatureTable) -> FeatureTable:
        """The table in d columns, computed when they are read."""
        blocks = {name: [_Projected(table[name], self)] for name in table}
        return FeatureTable(blocks, table.labels, table.class_names)


def principal_projection(table: FeatureTable, width: int) -> Projection:
    """PCA of the training and validation rows, standardised, to at most `width` columns."""
    fitted = TableSplit.joined([table["train"], table["validation"]])
    mean, scale = moments(fitted)
    rows = Design(fitted, mean, scale)
    if len(rows) >= rows.shape[1]:
        _, vectors = torch.linalg.eigh(rows.gram())
        vectors = vectors.flip(1)
    else:
        _, _, vectors = torch.linalg.svd(torch.cat([chunk for _, chunk in rows.chunks()]), full_matrices=False)
        vectors = vectors.T
    return Projection(mean, scale, vectors[:, :width].cpu().numpy().astype(mean.dtype))


def random_projection(table: FeatureTable, width: int, seed: int) -> Projection:
    """Gaussian directions: what as many columns keep when nothing chose them (Johnson and Lindenstrauss 1984)."""
    mean, scale = moments(TableSplit.joined([table["train"], table["validation"]]))
    matrix = np.random.default_rng(seed).normal(size=(len(mean), width)) / np.sqrt(width)
    return Projection(mean, scale, matrix.astype(mean.dtype))


class _Projected:
    """A block of columns that a projection makes of a whole split."""

    def __init__(self, split: TableSplit, projection: Projection):
        self._split, self._projection = split, projection
        self.shape, self.dtype = (len(split), projection.matrix.shape[1]), projection.matrix.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part) -> np.ndarray:
        projection = self._projection
        return (self._split.rows(part) - projection.mean) / projection.scale @ projection.matrix
