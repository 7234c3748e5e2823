"""The k-nearest-neighbor probe, which trains nothing, as DINO and DINOv2 report it.

For a row q and its k nearest rows x_i of the bank, all of unit length, class c gets the share of the votes

    p_c = sum_{i: y_i = c} w_c exp(q . x_i / T) / sum_i w_{y_i} exp(q . x_i / T)

with the weight w_c of the class, 1 by default (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294;
Oquab et al. 2023, arXiv 2304.07193). The bank is read in chunks, and only the best k rows so far are kept, so there is
never a matrix of all queries by all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import HeldOut, LabeledRows, best_of, selection_pairs
from concat_ensemble.probes.estimator import FeatureProbe, renamed_attribute, row_weights, standardization


def unit_rows(rows: torch.Tensor, feature_dims: Sequence[int]) -> torch.Tensor:
    """Rows (n, sum of feature_dims) scaled so that each member's part has the same length and each row has length 1:
    the cosine of two rows is the mean of the members' cosines, whatever the scale of a member's features."""
    parts = [normalize(part) for part in rows.split(list(feature_dims), dim=1)]
    return torch.cat(parts, dim=1) / len(parts) ** 0.5


def nearest(
    queries: torch.Tensor, bank: StandardizedFeatures, k: int, feature_dims: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of the bank with the highest cosine to each query (n, D), or all rows if there are fewer.

    Returns:
        Cosines (n, k), in falling order, and row numbers (n, k).
    """
    queries = unit_rows(queries.to(bank.dtype), feature_dims)
    cosines = queries.new_empty(len(queries), 0)
    numbers = cosines.long()
    for rows, chunk in bank.chunks():
        chunk_cosines, places = (queries @ unit_rows(chunk, feature_dims).T).topk(min(k, len(chunk)))
        cosines, numbers = torch.cat([cosines, chunk_cosines], 1), torch.cat([numbers, places + rows.start], 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]))
        numbers = numbers.gather(1, best)
    return cosines, numbers


class Bank(NamedTuple):
    """The rows that vote, with the numbers of their classes and what standardizes them."""

    split: TableSplit
    classes: np.ndarray  # (C,)
    class_numbers: np.ndarray  # (N,)
    weights: np.ndarray | None  # (N,) of the votes; None: 1
    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    @classmethod
    def from_rows(cls, rows: LabeledRows, standardize: bool, class_weight: dict | str | None) -> Bank:
        classes, numbers = np.unique(rows.labels, return_inverse=True)
        weights = row_weights(class_weight, rows)
        return cls(rows.split, classes, numbers, weights, *standardization(rows.split, standardize))

    @property
    def feature_dims(self) -> list[int]:
        return [block.shape[1] for block in self.split.blocks]


@dataclass(eq=False, repr=False)
class KNNProbe(FeatureProbe):
    """Weighted votes of the k nearest rows by cosine, with the k of the best metric on held-out rows. Of equally good
    ones the largest k is chosen; then all rows vote.

    The probabilities are shares of the votes. The scores are their logarithms, or that of the smallest normal number
    for a class without votes. There is no `sample_weight`, as in scikit-learn's `KNeighborsClassifier`.

    Args:
        ks: Numbers of neighbors to choose from, all in one pass. A k above the number of rows means all rows.
        temperature: T of the module's docstring. The smaller it is, the more the nearest rows count; 0.07 is DINO's.
        standardize: Scale every feature to mean 0 and variance 1 first. Members of different scales do not need it, as
            each member's part of a table's rows has the same length anyway, and it amplifies small features, noise
            included. DINO does not standardize either.
        in_memory: Whether to keep the standardized bank in memory between chunks of queries. Default: if it fits into
            half of the free memory.
        seed: Random seed for the rows to choose on without validation rows.
        metric: What k is chosen by, as for `LinearProbe`.
        class_weight: Weights by class, which multiply the votes: "balanced" gives each class the same number of
            votes in the whole bank. It does not change which rows are the nearest.

    Attributes:
        k_ (int): The chosen k.
        path_ (dict[int, float]): Metric on the held-out rows by k; empty if there was nothing to choose.
        selection_ (str): Which rows were held out, in words.
        bank_ (TableSplit): The split whose rows vote, not a copy; a pickle has its features inside.
        feature_dims_ (list[int]): Number of features of each member.
        mean_ (D,): The features are standardized as (x - mean_) / scale_.
        scale_ (D,): See `mean_`; ones without `standardize`.
    """

    ks: Sequence[int] = (1, 5, 10, 20, 50)
    temperature: float = 0.07
    standardize: bool = False
    in_memory: bool | None = None
    seed: int = 0
    metric: str = "top1"
    class_weight: dict | str | None = None

    widths_ = renamed_attribute("widths_", "feature_dims_")

    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None:
        ks = sorted(set(self.ks), reverse=True)
        if not ks or ks[-1] < 1:
            raise ValueError(f"ks={self.ks!r} must be numbers of neighbors, each at least 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if len(ks) == 1:
            self.path_, self.k_, self.selection_ = {}, ks[0], "nothing to choose"
        else:
            self._choose(train, validation, ks)
        rows = train.with_validation(validation)
        self._bank = bank = Bank.from_rows(rows, self.standardize, self.class_weight)
        self.bank_, self.classes_, self.feature_dims_ = bank.split, bank.classes, bank.feature_dims
        self.mean_, self.scale_ = bank.mean, bank.scale

    def _choose(self, train: LabeledRows, validation: TableSplit | None, ks: Sequence[int]) -> None:
        selection = selection_pairs(train, validation, seed=self.seed)
        classes = np.unique(train.with_validation(validation).labels)
        held_out = {k: HeldOut(self.metric, classes) for k in ks}
        for voters, queries in selection.pairs:
            bank = Bank.from_rows(voters, self.standardize, self.class_weight)
            for k, part, log_shares in self._votes(bank, queries.split, ks):
                held_out[k].add(log_shares.cpu().numpy(), bank.classes, queries.labels[part], None)
        self.path_ = {k: predictions.value() for k, predictions in held_out.items()} if selection.pairs else {}
        self.k_, self.selection_ = best_of(self.path_ or dict.fromkeys(ks, 0.0)), selection.name

    def _logits(self, split: TableSplit) -> np.ndarray:
        return np.concatenate([shares.cpu().numpy() for _, _, shares in self._votes(self._bank, split, [self.k_])])

    def _votes(self, bank: Bank, split: TableSplit, ks: Sequence[int]) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """(k, which rows, their log-shares (n, C)) for each chunk of a split's rows and each k."""
        queries = StandardizedFeatures(split, bank.mean, bank.scale, in_memory=False)
        in_memory = self.in_memory if len(queries) > CHUNK else False  # one chunk of queries reads the bank only once
        bank_rows = StandardizedFeatures(bank.split, bank.mean, bank.scale, in_memory=in_memory)
        class_numbers = torch.from_numpy(bank.class_numbers).to(bank_rows.device)
        for rows, chunk in queries.chunks():
            cosines, numbers = nearest(chunk, bank_rows, max(ks), bank.feature_dims)
            weights = ((cosines - cosines[:, :1]) / self.temperature).exp()
            if bank.weights is not None:
                weights = weights * torch.from_numpy(bank.weights).to(weights)[numbers]
            for k in ks:
                votes = weights.new_zeros(len(chunk), len(bank.classes))
                votes.scatter_add_(1, class_numbers[numbers[:, :k]], weights[:, :k])
                shares = votes / votes.sum(1, keepdim=True)
                yield k, rows, shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
