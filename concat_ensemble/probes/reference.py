"""The papers' own protocol, on stored features: BatchNorm1d and a linear layer, trained by SGD over a sweep of weight decays.

Zhang and Bottou 2023 (arXiv 2212.07346) and Yang, Zhang and Bottou 2025 (arXiv 2506.18221): momentum 0.9 (Nesterov), 28 epochs,
learning rate 0.01 divided by 10 at epochs 8, 16 and 24. They run all networks again in every epoch of every decay. Here rows
come from a table, which is the same where training images get the evaluation transform. What the text leaves open is as in the
authors' code (github.com/TjuJianyu/RRL): batches of 256, weights from N(0, 0.01^2), bias 0, no decay on BatchNorm's gain and
shift. What that leaves open, too: all decays start at the same weights and see the same batches, and the last, smaller batch of
an epoch counts, unless it has one row only, which has no variance.

All decays are trained at once. Normalised rows do not depend on the decay, so with weight W_s, gain g_s and shift h_s

    logits_s = (x * g_s + h_s) W_s' + b_s = x (W_s * g_s)' + (W_s h_s + b_s),

one product of a batch (B, D) with the weights (S * C, D) of all S decays.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import batch_norm, cross_entropy

from concat_ensemble.features.standardized import StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import ProbabilityProbe

CIFAR_DECAYS = tuple(10.0**-power for power in (2.0, 2.4, 2.8, 3.2, 3.6, 4.0))
EPSILON = 1e-5  # of BatchNorm


@torch.enable_grad()  # whatever the caller has switched off
def sgd_heads(
    read: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    width: int,
    l2_strengths: Sequence[float],
    *,
    epochs: int,
    milestones: Sequence[int],
    lr: float,
    momentum: float,
    batch_size: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm's mean and deviation (D,), and for every decay the coefficients (S, C, D) and intercepts (S, C) of rows
    that these normalise, with gain and shift multiplied in.

    Args:
        read: Rows (B, D) in float32 for row numbers (B,).
        y: (n,) class numbers, on the device of the rows.
    """
    generator = torch.Generator().manual_seed(seed)  # the CPU's, so that all devices see the same batches
    drawn = torch.empty(int(y.max()) + 1, width).normal_(0, 0.01, generator=generator)
    weight = drawn.to(y.device).repeat(len(l2_strengths), 1, 1).requires_grad_()
    bias, gain, shift = (
        torch.full((len(l2_strengths), size), value, device=y.device, requires_grad=True)
        for size, value in ((len(drawn), 0.0), (width, 1.0), (width, 0.0))
    )
    decay = torch.tensor(l2_strengths, dtype=torch.float32, device=y.device)[:, None]
    mean, variance = torch.zeros(width, device=y.device), torch.ones(width, device=y.device)
    optimizer = torch.optim.SGD([weight, bias, gain, shift], lr, momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones))

    def folded():
        return weight * gain[:, None], (weight @ shift[:, :, None])[:, :, 0] + bias

    for _ in range(epochs):
        for numbers in torch.randperm(len(y), generator=generator).split(batch_size):
            if len(numbers) == 1:
                continue
            rows = batch_norm(read(numbers), mean, variance, training=True, eps=EPSILON)
            coef, intercept = folded()
            logits = (rows @ coef.flatten(0, 1).T).unflatten(1, intercept.shape) + intercept
            truth = y[numbers].repeat_interleave(len(l2_strengths))
            loss = cross_entropy(logits.flatten(0, 1), truth, reduction="sum") / len(numbers)
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():  # what SGD's own weight_decay adds, with another one for every head
                weight.grad.addcmul_(decay[:, :, None], weight)
                bias.grad.addcmul_(decay, bias)
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return mean, (variance + EPSILON).sqrt(), *folded()


class ReferenceProbe(ProbabilityProbe):
    """The papers' probe: for every weight decay the protocol of the module's text, and the decay of the best validation
    top-1 once more on all rows. For comparing with the papers; `LinearProbe` solves about the same problem to its minimum.

    Args:
        l2_strengths: Weight decays, which are L2 strengths. The default is CIFAR's range; iNat18's is 1e-4 to 1e-6.
        epochs, milestones, lr, momentum, batch_size: Of SGD; the rate is divided by 10 at each of the milestones.
        in_memory: Whether the rows are kept there, in float32; decided by what is free when left out. Otherwise each
            batch is read from where it lies.
        seed: Of the weights, the batches, and the validation part where `fit` is given none: a fifth of the rows.

    Attributes:
        coef_ (C, D), intercept_ (C,): of the normalised features, gain and shift multiplied in. mean_, scale_ (D,):
            BatchNorm's running mean and sqrt(variance + 1e-5). l2_strength_: the decay chosen. path_: validation top-1 of
            each.
    """

    def __init__(
        self,
        l2_strengths=CIFAR_DECAYS,
        epochs=28,
        milestones=(8, 16, 24),
        lr=0.01,
        momentum=0.9,
        batch_size=256,
        in_memory=None,
        seed=0,
    ):
        self.l2_strengths = l2_strengths
        self.epochs = epochs
        self.milestones = milestones
        self.lr = lr
        self.momentum = momentum
        self.batch_size = batch_size
        self.in_memory = in_memory
        self.seed = seed

    def _fit(self, train, held):
        if not self.l2_strengths:
            raise ValueError(f"l2_strengths={self.l2_strengths!r}: name at least one weight decay.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: BatchNorm needs 2 rows at least.")
        l2_strengths, self.path_ = sorted(self.l2_strengths, reverse=True), {}
        if len(l2_strengths) > 1 or held is not None:  # else there is nothing to choose
            ((fitted, validated),) = self._cuts(train, held, seed=self.seed)
            for l2_strength in self._trained(fitted, l2_strengths):
                self.path_[l2_strength] = self.score(validated)
        self.l2_strength_ = max(
            l2_strengths, key=lambda l2_strength: self.path_.get(l2_strength, 0)
        )  # the strongest of equals
        whole = train if held is None else TableSplit.concatenate([train, held])
        next(self._trained(whole, [self.l2_strength_]))

    def _logits(self, rows):
        return (rows - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_

    def _trained(self, split, l2_strengths):
        """Train for all l2_strengths, and take on what was found for one after another."""
        self.classes_, numbers = np.unique(split.labels, return_inverse=True)
        moments(split)  # for its error where a feature is NaN
        standardized = StandardizedFeatures(split, in_memory=self.in_memory)
        if standardized.in_memory:
            chunks = StandardizedFeatures(split, in_memory=False).chunks()
            read = torch.cat([chunk.float() for _, chunk in chunks]).__getitem__
        else:

            def read(places):
                return torch.from_numpy(split.rows(places.numpy())).to(standardized.device, torch.float32)

        settings = {
            name: getattr(self, name) for name in ("epochs", "milestones", "lr", "momentum", "batch_size", "seed")
        }
        labels = torch.from_numpy(numbers).to(standardized.device)
        trained = sgd_heads(read, labels, split.num_features, l2_strengths, **settings)
        self.mean_, self.scale_, coefs, intercepts = (tensor.cpu().numpy() for tensor in trained)
        for l2_strength, self.coef_, self.intercept_ in zip(l2_strengths, coefs, intercepts, strict=True):
            yield l2_strength
