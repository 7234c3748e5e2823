"""The k-nearest-neighbor probe, which trains nothing, as DINO and DINOv2 report it.

For a row q and its k nearest rows x_i of the bank, all of unit length, class c gets the share of the votes

    p_c = sum_{i: y_i = c} exp(q . x_i / T) / sum_i exp(q . x_i / T)

(Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294; Oquab et al. 2023, arXiv 2304.07193). The bank
is read in chunks, and only the best k rows so far are kept, so there is never a matrix of all queries by all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import normalize

from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import ProbabilityProbe, merge, renamed_attribute, standardization


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
    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    @classmethod
    def from_split(cls, split: TableSplit, standardize: bool) -> Bank:
        return cls(split, *np.unique(split.labels, return_inverse=True), *standardization(split, standardize))

    @property
    def feature_dims(self) -> list[int]:
        return [block.shape[1] for block in self.split.blocks]


@dataclass(eq=False, repr=False)
class KNNProbe(ProbabilityProbe):
    """Weighted votes of the k nearest rows by cosine, with the k of the best top-1 on validation rows. Of equally good
    ones the largest k is chosen; then all rows vote.

    The scores are log-shares of the votes, or the log of the smallest normal number for a class without votes.

    Args:
        ks: Numbers of neighbors to choose from, all in one pass. A k above the number of rows means all rows.
        temperature: T of the module's docstring. The smaller it is, the more the nearest rows count; 0.07 is DINO's.
        standardize: Scale every feature to mean 0 and variance 1 first. Members of different scales do not need it, as
            each member's part of a table's rows has the same length anyway, and it amplifies small features, noise
            included. DINO does not standardize either.
        in_memory: Whether to keep the standardized bank in memory between chunks of queries. Default: if it fits into
            half of the free memory.
        seed: Random seed for the fifth of the rows to choose on if `fit` gets no validation rows.

    Attributes:
        k_: The chosen k.
        path_: Top-1 on validation rows by k; empty if there was nothing to choose.
        bank_: The split whose rows vote, not a copy; a pickle has its features inside.
        feature_dims_: Number of features of each member.
        mean_, scale_ (D,): The features are standardized as (x - mean_) / scale_.
    """

    ks: Sequence[int] = (1, 5, 10, 20, 50)
    temperature: float = 0.07
    standardize: bool = False
    in_memory: bool | None = None
    seed: int = 0

    widths_ = renamed_attribute("widths_", "feature_dims_")

    def logits(self, X: TableSplit | ArrayLike) -> np.ndarray:
        """Log-shares of the votes (N, C), one column for each of `classes_`."""
        check_is_fitted(self)
        votes = self._votes(self._bank, self._validate(X), [self.k_])
        return np.concatenate([log_shares.cpu().numpy() for _, _, log_shares in votes])

    def _fit(self, train: TableSplit, validation: TableSplit | None) -> None:
        ks = sorted(set(self.ks), reverse=True)
        if not ks or ks[-1] < 1:
            raise ValueError(f"ks={self.ks!r} must be numbers of neighbors, each at least 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if len(ks) == 1 and validation is None:  # nothing to choose
            self.path_, self.k_ = {}, ks[0]
        else:
            [(voters, queries)] = self._selection_splits(train, validation, seed=self.seed)
            bank, correct = Bank.from_split(voters, self.standardize), dict.fromkeys(ks, 0)
            for k, rows, log_shares in self._votes(bank, queries, ks):
                correct[k] += np.sum(bank.classes[log_shares.argmax(1).cpu().numpy()] == queries.labels[rows])
            self.path_ = {k: float(count / len(queries)) for k, count in correct.items()}
            self.k_ = max(self.path_, key=self.path_.__getitem__)  # the first of equals: the largest, the smoothest
        self._bank = bank = Bank.from_split(merge(train, validation), self.standardize)
        self.bank_, self.classes_, self.feature_dims_ = bank.split, bank.classes, bank.feature_dims
        self.mean_, self.scale_ = bank.mean, bank.scale

    def _votes(self, bank: Bank, split: TableSplit, ks: Sequence[int]) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """(k, which rows, their log-shares (n, C)) for each chunk of a split's rows and each k."""
        queries = StandardizedFeatures(split, bank.mean, bank.scale, in_memory=False)
        in_memory = self.in_memory if len(queries) > CHUNK else False  # one chunk of queries reads the bank only once
        bank_rows = StandardizedFeatures(bank.split, bank.mean, bank.scale, in_memory=in_memory)
        class_numbers = torch.from_numpy(bank.class_numbers).to(bank_rows.device)
        for rows, chunk in queries.chunks():
            cosines, numbers = nearest(chunk, bank_rows, max(ks), bank.feature_dims)
            weights = ((cosines - cosines[:, :1]) / self.temperature).exp()
            for k in ks:
                votes = weights.new_zeros(len(chunk), len(bank.classes))
                votes.scatter_add_(1, class_numbers[numbers[:, :k]], weights[:, :k])
                shares = votes / votes.sum(1, keepdim=True)
                yield k, rows, shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
