"""Multinomial logistic regression over a path of L2 strengths, in few passes over the rows.

For rows x_i (standardised), labels y_i and each l2_strength s, from strong to weak, minimise

    f(W, b) = mean_i [ logsumexp(x_i W + b) - (x_i W + b)_{y_i} ] + s / 2 * ||W||^2

by Newton's method from where the solutions before point. The step solves H V = -gradient by conjugate gradients; a product H V costs one
pass over the rows and no Hessian is formed:

    Z = X V;  R = P * (Z - rowsum(P * Z));  H V = X' R / n + s V        (P: the class probabilities, (n, C))

What keeps the number of passes small is the preconditioner. Were P constant, H would be h_c * (X'X / n) + s for class c, with
h_c = mean_i p_ic (1 - p_ic): diagonal in the eigenbasis of X'X / n, which serves all l2_strengths. (Boehning's bound 1/2 in the place of
h_c is far too large where there are many classes.) The leading eigenvectors do as well as all, with one value for the rest, and cost
a few passes (randomised subspace iteration, Halko, Martinsson and Tropp 2011). The products need no more than a few digits, so they
run in bfloat16 where the processor has it; gradients and objective stay in X's precision.

Rows that do not fit into memory are read again in every pass. There a sample of them, which fits, is solved first: it gives the
preconditioner, and for each l2_strength a place to start from that leaves little to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from concat_ensemble.features.standardized import StandardizedFeatures

MAX_TRIALS = 12  # of lengths along a line
SHARE = 0.25  # of the gradient that conjugate gradients may leave; less costs more products than it saves Newton steps
SAMPLE = 65_536  # rows
LEADING = 256  # eigenvectors


@dataclass
class Solution:
    l2_strength: float
    weight: torch.Tensor  # (D, C)
    bias: torch.Tensor  # (C,)
    objective: float
    newton_steps: int
    products: int  # H V, each about the cost of a gradient, or a quarter of it in bfloat16


def logistic_path(
    X: StandardizedFeatures | torch.Tensor,
    y: torch.Tensor,
    l2_strengths: Sequence[float],
    *,
    classes: int,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
) -> Iterator[Solution]:
    """Solutions for `l2_strengths` in the order given, which should be from strong to weak.

    Args:
        X: (n, D) float32 or float64, centred.
        y: (n,) int64 in 0..classes-1.
        start: A weight (D, C) and a bias (C,) to begin at.
        tol: Stop when Newton's decrement says that the objective is this share of itself above its minimum.
        max_iter: Newton steps per l2_strength.
    """
    X = StandardizedFeatures.from_tensor(X) if isinstance(X, torch.Tensor) else X
    n, width = X.shape
    starts = {}
    if X.in_memory or n <= SAMPLE:
        spectrum, basis = _eigenvectors(X)
    else:
        drawn, few = X.sample(max(SAMPLE, 8 * width))
        path = logistic_path(few, y[drawn], l2_strengths, classes=classes, start=start, tol=1e-4, max_iter=max_iter)
        starts = {solution.l2_strength: (solution.weight, solution.bias) for solution in path}
        spectrum, basis = _eigenvectors(few)
        del few

    counts = torch.bincount(y, minlength=classes).to(X.dtype)
    weight, bias = counts.new_zeros(X.shape[1], classes), ((counts + 0.5) / (n + 0.5 * classes)).log()
    if start is not None:
        weight, bias = start
    earlier = []  # (log l2_strength, weight, bias) of the last two
    for l2_strength in l2_strengths:
        if starts:
            weight, bias = starts[l2_strength]
        elif len(earlier) == 2:  # coefficients grow about linearly with the logarithm of the l2_strength: go on so
            (first, *_), (second, *_) = earlier
            share = (math.log(l2_strength) - second) / (second - first)
            weight, bias = (now + share * (now - then) for then, now in zip(*(e[1:] for e in earlier), strict=True))
        weight, bias, *found = _minimise(X, y, weight, bias, l2_strength, spectrum, basis, tol, max_iter)
        earlier = [*earlier[-1:], (math.log(l2_strength), weight, bias)]
        yield Solution(l2_strength, weight, bias - bias.mean(), *found)


def objective(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, l2_strength: float) -> torch.Tensor:
    """f of the module's text, a float64 scalar."""
    losses = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
    return losses.double().mean() + l2_strength / 2 * weight.double().square().sum()


def _eigenvectors(X: StandardizedFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (r,), rising, and eigenvectors (D, r) of X'X / n: all of them, or about the leading ones."""
    if X.shape[1] <= 2 * LEADING:
        values, vectors = torch.linalg.eigh(X.gram())  # in float64: in float32 it fails where many are zero
        return values.clamp_min(0).to(X.dtype), vectors.to(X.dtype)
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(X.shape[1], LEADING, generator=generator).to(X.device, X.dtype)
    for _ in range(2):
        space = torch.linalg.qr(X.gram_times(torch.linalg.qr(space).Q)).Q
    values, turn = torch.linalg.eigh((space.T @ X.gram_times(space)).double())
    return values.clamp_min(0).to(X.dtype), space @ turn.to(X.dtype)


def _minimise(X, y, weight, bias, l2_strength, spectrum, basis, tol, max_iter):
    n = len(X)
    logits = X @ weight + bias
    value, steps, products = objective(logits, y, weight, l2_strength), 0, 0
    while steps < max_iter:
        steps += 1
        probabilities = logits.softmax(1)
        gradient, gradient_bias = l2_strength * weight, torch.zeros_like(bias)
        for rows, chunk in X.chunks():
            residual = probabilities[rows].clone()
            residual[torch.arange(len(chunk), device=X.device), y[rows]] -= 1
            gradient, gradient_bias = gradient + (residual.T @ chunk).T / n, gradient_bias + residual.sum(0) / n
        curvature = (probabilities * (1 - probabilities)).mean(0)
        scales = curvature * spectrum[:, None] + l2_strength, curvature + 1e-12
        move, move_bias, used = _conjugate_gradients(
            X, probabilities, gradient, gradient_bias, l2_strength, scales, basis
        )
        products += used
        along = X @ move + move_bias
        slope = float((gradient * move).sum() + (gradient_bias * move_bias).sum())
        length = _length(logits, along, y, weight, move, l2_strength, slope)
        previous, value = value, objective(logits + length * along, y, weight + length * move, l2_strength)
        if value >= previous:  # nothing left to gain in this precision
            value = previous
            break
        weight, bias, logits = weight + length * move, bias + length * move_bias, logits + length * along
        # What an inexact step leaves is about SHARE^2 of what it won where f is as good as quadratic, else it may be as much.
        left = (SHARE**2 if length == 1 else 1.0) * float(previous - value)
        if left <= tol / 2 * float(value):
            break
    return weight, bias, float(value), steps, products


def _length(logits, along, y, weight, move, l2_strength, slope):
    """How far to go: to where the slope of f along the line is a tenth of what it was. No pass over the rows, so it is cheap
    beside the step itself, and at weak l2_strengths Newton's own length is several times too long."""
    rows = torch.arange(len(y), device=y.device)
    toward = along[rows, y].mean()

    def slope_at(length):
        tilted = ((logits + length * along).softmax(1) * along).sum(1).mean() - toward
        return float(tilted + l2_strength * ((weight + length * move) * move).sum())

    low, high, at_low, at_high, length = 0.0, None, slope, None, 1.0
    for _ in range(MAX_TRIALS):
        here = slope_at(length)
        if abs(here) <= -slope / 10:
            break
        if here < 0:
            low, at_low = length, here
        else:
            high, at_high = length, here
        length = 2 * low if high is None else low + (high - low) * min(max(at_low / (at_low - at_high), 0.1), 0.9)
    return length


def _conjugate_gradients(X, probabilities, gradient, gradient_bias, l2_strength, scales, basis, most=50):
    """An inexact solution of H move = -gradient: to SHARE of the gradient, in the preconditioner's norm."""
    n = len(X)

    def precondition(matrix, vector):
        inner, rest = basis.T @ matrix, scales[0][0]  # what the basis does not span has its least value
        return basis @ (inner / scales[0] - inner / rest) + matrix / rest, vector / scales[1]

    move, move_bias = torch.zeros_like(gradient), torch.zeros_like(gradient_bias)
    rest, rest_bias = -gradient, -gradient_bias
    ahead, ahead_bias = precondition(rest, rest_bias)
    size = first = (rest * ahead).sum() + (rest_bias * ahead_bias).sum()
    used = 0
    while used < most:
        used += 1
        bent, bent_bias, narrow = l2_strength * ahead, torch.zeros_like(ahead_bias), ahead.to(X.fast_dtype)
        for rows, chunk in X.chunks(fast=True):
            weighted = probabilities[rows] * ((chunk @ narrow).to(X.dtype) + ahead_bias)
            weighted -= probabilities[rows] * weighted.sum(1, keepdim=True)
            bent += (weighted.to(chunk.dtype).T @ chunk).T.to(X.dtype) / n  # the faster of the two ways round
            bent_bias += weighted.sum(0) / n
        curve = (ahead * bent).sum() + (ahead_bias * bent_bias).sum()
        if not curve > 0:  # rounding, in bfloat16 or at the very minimum
            break
        length = size / curve
        move, move_bias = move + length * ahead, move_bias + length * ahead_bias
        rest, rest_bias = rest - length * bent, rest_bias - length * bent_bias
        whitened, whitened_bias = precondition(rest, rest_bias)
        size, before = (rest * whitened).sum() + (rest_bias * whitened_bias).sum(), size
        if size <= SHARE**2 * first:
            break
        ahead, ahead_bias = whitened + size / before * ahead, whitened_bias + size / before * ahead_bias
    return move, move_bias, used
