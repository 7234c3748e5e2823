"""The papers' own protocol on stored features: BatchNorm1d and a linear layer by SGD, for several weight decays.

Zhang and Bottou 2023 (arXiv 2212.07346) and Yang, Zhang and Bottou 2025 (arXiv 2506.18221) use momentum 0.9
(Nesterov), 28 epochs, and a learning rate of 0.01, divided by 10 at epochs 8, 16 and 24. They run all networks again
in each epoch for each decay. Here the rows come from a table, which is the same if training images get the evaluation
transform. What the papers leave open is as in the authors' code (github.com/TjuJianyu/RRL): batches of 256, weights
from N(0, 0.01^2), bias 0, no decay of BatchNorm's gain and shift. What that leaves open, too: all decays start with
the same weights and see the same batches, and the last, smaller batch of an epoch counts, unless it has only one row,
which has no variance.

All decays are trained at once. Normalized rows do not depend on the decay, so with weight W_s, gain g_s and shift h_s

    logits_s = (x * g_s + h_s) W_s' + b_s = x (W_s * g_s)' + (W_s h_s + b_s),

which is one product of a batch (B, D) with the weights (S * C, D) of all S decays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import batch_norm, cross_entropy

from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.choice import HeldOut, LabeledRows, Search, best_of, is_at_edge, selection_pairs
from concat_ensemble.probes.estimator import (
    LinearModel,
    LinearModelMixin,
    WeightedProbe,
    add_predictions,
    row_weights,
    unchosen,
)

CIFAR_DECAYS = (5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4)  # of cat_cifar_bn.sh in TjuJianyu/RRL
EPSILON = 1e-5  # BatchNorm's


@dataclass(eq=False, repr=False)
class ReferenceProbe(LinearModelMixin, WeightedProbe):
    """The papers' probe, for comparisons with them: the protocol of the module's docstring with the weight decay of
    the best metric on held-out rows. `LinearProbe` solves nearly the same problem to its minimum.

    Weights of rows and classes multiply the losses of a batch, whose mean is weighted; BatchNorm sees each row once.

    Args:
        l2_strengths: Weight decays to choose from. The default is that of the authors' scripts for CIFAR; for iNat18
            they use 1e-4, 1e-5 and 1e-6.
        epochs: Number of epochs.
        milestones: Epochs at which the learning rate is divided by 10.
        lr: Learning rate at the beginning.
        momentum: Nesterov momentum.
        batch_size: Rows in a batch, at least 2.
        in_memory: Whether to keep the rows in memory, in float32; else each batch is read from disk. Default: if they
            fit into half of the free memory.
        seed: Random seed for weights, batches, and the rows to choose on without validation rows.
        metric: What the decay is chosen by, as for `LinearProbe`.
        class_weight: "balanced", so that each class counts the same, or weights by class.

    Attributes:
        coef_ (C, D): Coefficients of the normalized features, with gain and shift multiplied in.
        intercept_ (C,): Intercepts of the same.
        mean_ (D,): BatchNorm's running mean.
        scale_ (D,): BatchNorm's sqrt(variance + 1e-5).
        l2_strength_ (float): The chosen decay.
        l2_strengths_ (tuple[float, ...]): The decays that were tried, from strong to weak: those of the protocol,
            without extension.
        at_edge_ (bool): Whether the metric still rose at an edge of these.
        path_ (dict[float, float]): Metric on the held-out rows by decay; empty if there was nothing to choose.
        selection_ (str): Which rows were held out, in words.
    """

    l2_strengths: Sequence[float] = CIFAR_DECAYS
    epochs: int = 28
    milestones: Sequence[int] = (8, 16, 24)
    lr: float = 0.01
    momentum: float = 0.9
    batch_size: int = 256
    in_memory: bool | None = None
    seed: int = 0
    metric: str = "top1"
    class_weight: dict | str | None = None

    def _fit(self, train: LabeledRows, validation: TableSplit | None) -> None:
        if not self.l2_strengths:
            raise ValueError(f"l2_strengths={self.l2_strengths!r} must have at least one weight decay.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size} must be at least 2; BatchNorm needs a variance.")
        l2_strengths = sorted(set(self.l2_strengths), reverse=True)
        if len(l2_strengths) == 1:
            self._set_search(unchosen(l2_strengths[0]), "nothing to choose")
        else:
            self._choose(train, validation, l2_strengths)
        [model] = self._train(train.with_validation(validation), [self.l2_strength_])
        self._set_model(model)

    def _choose(self, train: LabeledRows, validation: TableSplit | None, l2_strengths: Sequence[float]) -> None:
        selection = selection_pairs(train, validation, seed=self.seed)
        if not selection.pairs:
            self._set_search(unchosen(l2_strengths[0]), selection.name)
            return
        classes = np.unique(train.with_validation(validation).labels)
        held_out = {s: HeldOut(self.metric, classes) for s in l2_strengths}
        for fit_on, score_on in selection.pairs:
            for predictions, model in zip(held_out.values(), self._train(fit_on, l2_strengths), strict=True):
                add_predictions(predictions, model, score_on, as_probabilities=True)
        path = {s: predictions.value() for s, predictions in held_out.items()}
        at_edge = is_at_edge(path, weak=True) or is_at_edge(path, weak=False)
        self._set_search(Search(path, best_of(path), at_edge), selection.name)

    @torch.enable_grad()  # whatever the caller has switched off
    def _train(self, rows: LabeledRows, l2_strengths: Sequence[float]) -> list[LinearModel]:
        """One model for each weight decay."""
        split = rows.split
        classes, numbers = np.unique(split.labels, return_inverse=True)
        read_rows, device = row_reader(split, self.in_memory)
        y = torch.from_numpy(numbers).to(device)
        weights = row_weights(self.class_weight, rows)
        row_weight = None if weights is None else torch.from_numpy(weights).to(device, torch.float32)
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU, so that all devices see the same batches
        weight = torch.empty(len(classes), split.num_features).normal_(0, 0.01, generator=generator)
        heads = Heads(weight.to(device), l2_strengths)
        optimizer = torch.optim.SGD(heads.parameters, self.lr, self.momentum, nesterov=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.milestones))
        for _ in range(self.epochs):
            for batch in torch.randperm(len(y), generator=generator).split(self.batch_size):
                if len(batch) == 1:
                    continue
                optimizer.zero_grad()
                heads.loss(read_rows(batch), y[batch], None if row_weight is None else row_weight[batch]).backward()
                heads.add_weight_decay()
                optimizer.step()
            schedule.step()
        return heads.models(classes)


def row_reader(
    split: TableSplit, in_memory: bool | None
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.device]:
    """A function from row numbers (B,) to rows (B, D) in float32 as they are, and the device of the rows."""
    rows = StandardizedFeatures(split, in_memory=in_memory)
    if rows.in_memory:
        chunks = StandardizedFeatures(split, in_memory=False).chunks()  # do not keep the chunks beside the whole
        return torch.cat([chunk.float() for _, chunk in chunks]).__getitem__, rows.device

    def read(numbers: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(split.rows(numbers.numpy())).to(rows.device, torch.float32)

    return read, rows.device


class Heads:
    """BatchNorm and a linear layer for each of S weight decays, which start with the same weight (C, D)."""

    def __init__(self, weight: torch.Tensor, l2_strengths: Sequence[float]):
        (num_classes, num_features), num_heads, device = weight.shape, len(l2_strengths), weight.device
        self.decay = torch.tensor(l2_strengths, dtype=torch.float32, device=device)[:, None]
        self.weight = weight.repeat(num_heads, 1, 1).requires_grad_()
        self.bias = torch.zeros(num_heads, num_classes, device=device, requires_grad=True)
        self.gain = torch.ones(num_heads, num_features, device=device, requires_grad=True)
        self.shift = torch.zeros(num_heads, num_features, device=device, requires_grad=True)
        self.parameters = [self.weight, self.bias, self.gain, self.shift]
        self.mean, self.variance = torch.zeros(num_features, device=device), torch.ones(num_features, device=device)

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (S, C, D) and intercepts (S, C) of normalized rows, with gain and shift multiplied in."""
        intercept = (self.weight @ self.shift[:, :, None])[:, :, 0] + self.bias
        return self.weight * self.gain[:, None], intercept

    def loss(self, rows: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy of a batch, weighted by `weight` (B,), summed over the heads; it updates BatchNorm's
        running statistics."""
        normalized = batch_norm(rows, self.mean, self.variance, training=True, eps=EPSILON)
        coef, intercept = self.fold()
        logits = (normalized @ coef.flatten(0, 1).T).unflatten(1, intercept.shape) + intercept
        targets = y.repeat_interleave(len(self.decay))
        if weight is None:
            return cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(rows)
        losses = cross_entropy(logits.flatten(0, 1), targets, reduction="none").unflatten(0, (len(rows), -1))
        return (losses.sum(1) * weight).sum() / weight.sum()

    @torch.no_grad()
    def add_weight_decay(self) -> None:
        """Add to the gradients what SGD's own weight_decay adds, with a different one for each head."""
        for parameter, decay in ((self.weight, self.decay[:, :, None]), (self.bias, self.decay)):
            if parameter.grad is not None:
                parameter.grad.addcmul_(decay, parameter)

    @torch.no_grad()
    def models(self, classes: np.ndarray) -> list[LinearModel]:
        tensors = (*self.fold(), self.mean, (self.variance + EPSILON).sqrt())
        coefs, biases, mean, scale = (tensor.cpu().numpy() for tensor in tensors)
        return [LinearModel(classes, coef, bias, mean, scale) for coef, bias in zip(coefs, biases, strict=True)]
