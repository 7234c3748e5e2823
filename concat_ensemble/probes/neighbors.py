"""The k-nearest-neighbour probe: what the features know with nothing trained, as DINO and DINOv2 measure it.

For a row q and its k most alike rows x_i of the bank, all of unit length, class c gets the share

    p_c = sum_{i: y_i = c} exp(q . x_i / T) / sum_i exp(q . x_i / T)

of the votes (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294; Oquab et al. 2023, arXiv 2304.07193).
The bank passes by in chunks, and of each no more than the best k are kept, so there is never a matrix of all queries by all
rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import normalize

from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import ProbabilityProbe


def unit_rows(rows: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Rows (n, sum of the widths) with each member's part brought to one length, all together to 1: a cosine of two of
    them is the mean of the members' cosines, whatever the scale of a member's features."""
    parts = [normalize(part) for part in rows.split(list(widths), dim=1)]
    return torch.cat(parts, dim=1) / len(parts) ** 0.5


def nearest(
    queries: torch.Tensor, bank: StandardizedFeatures, k: int, widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (n, k), falling, and row numbers (n, k) of the bank's rows that are most alike each of the queries (n, D),
    which have members of these widths; all rows where the bank has fewer than k."""
    queries = unit_rows(queries.to(bank.dtype), widths)
    cosines = queries.new_empty(len(queries), 0)
    numbers = cosines.long()
    for rows, chunk in bank.chunks():
        here, places = (queries @ unit_rows(chunk, widths).T).topk(min(k, len(chunk)))
        cosines, numbers = torch.cat([cosines, here], 1), torch.cat([numbers, places + rows.start], 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]))
        numbers = numbers.gather(1, best)
    return cosines, numbers


class KNNProbe(ProbabilityProbe):
    """Weighted votes of the k most alike rows by cosine, with the k of the best validation top-1; the bank is then all
    rows.

    Args:
        ks: Numbers of neighbours to choose among, all from one pass. More than there are rows means all rows.
        temperature: T of the module's text. The smaller, the more the nearest count; DINO's 0.07.
        standardize: Bring every feature to mean 0 and variance 1 first. Members of different scales do not need it: where
            the rows are a table's, each member's part has length 1 by itself. And it raises what is small, noise with
            the rest. DINO has it off as well.
        in_memory: Whether the standardised bank is kept there between chunks of queries; decided by what is free when
            left out.
        seed: Of the validation part, where `fit` is given none: a fifth of the rows.

    Attributes:
        k_: the one chosen. path_: validation top-1 of each k. bank_: the split that votes, by reference: a pickle holds its
        features. widths_: of its members. mean_, scale_ (D,): what standardises them.

    Scores are log-shares of the votes, and the log of the smallest normal number for a class without any.
    """

    def __init__(self, ks=(1, 5, 10, 20, 50), temperature=0.07, standardize=False, in_memory=None, seed=0):
        self.ks = ks
        self.temperature = temperature
        self.standardize = standardize
        self.in_memory = in_memory
        self.seed = seed

    def logits(self, X):
        """(N, C) log-shares of the votes, a column for each of `classes_`."""
        check_is_fitted(self)
        split = self._checked(X)
        return np.concatenate([votes.cpu().numpy() for _, _, votes in self._votes(split, [self.k_])])

    def _fit(self, train, held):
        ks = sorted(set(self.ks), reverse=True)
        if not ks or ks[-1] < 1:
            raise ValueError(f"ks={self.ks!r}: name numbers of neighbours, each 1 at least.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        whole, self.path_ = train if held is None else TableSplit.concatenate([train, held]), {}
        if len(ks) > 1 or held is not None:  # else there is nothing to choose
            ((fitted, validated),) = self._cuts(train, held, seed=self.seed)
            self._remember(fitted)
            right = dict.fromkeys(ks, 0)
            for k, rows, votes in self._votes(validated, ks):
                right[k] += np.sum(self.classes_[votes.argmax(1).cpu().numpy()] == validated.labels[rows])
            self.path_ = {k: float(count / len(validated)) for k, count in right.items()}
        self.k_ = max(ks, key=lambda k: self.path_.get(k, 0))  # the largest of equals: the smoothest
        self._remember(whole)

    def _remember(self, split):
        self.bank_, (self.classes_, self._numbers) = split, np.unique(split.labels, return_inverse=True)
        self.widths_ = [block.shape[1] for block in split.blocks]
        self.mean_, self.scale_ = moments(split)
        if not self.standardize:
            self.mean_, self.scale_ = np.zeros_like(self.mean_), np.ones_like(self.scale_)

    def _votes(self, split, ks):
        """(k, which rows, their (n, C) log-shares) for every chunk of rows and every k."""
        queries = StandardizedFeatures(split, self.mean_, self.scale_, in_memory=False)
        # Where one chunk holds all queries the bank is read once, and keeping it would be for nothing.
        in_memory = self.in_memory if len(queries) > CHUNK else False
        bank = StandardizedFeatures(self.bank_, self.mean_, self.scale_, in_memory=in_memory)
        classes = torch.from_numpy(self._numbers).to(bank.device)
        for rows, chunk in queries.chunks():
            cosines, numbers = nearest(chunk, bank, max(ks), self.widths_)
            weights = ((cosines - cosines[:, :1]) / self.temperature).exp()
            for k in ks:
                votes = weights.new_zeros(len(chunk), len(self.classes_))
                votes.scatter_add_(1, classes[numbers[:, :k]], weights[:, :k])
                shares = votes / votes.sum(1, keepdim=True)
                yield k, rows, shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
