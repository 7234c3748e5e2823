"""Multinomial logistic regression for a path of L2 strengths, in few passes over the rows.

For standardized rows x_i, labels y_i and each L2 strength s, from strong to weak, minimize

    f(W, b) = mean_i [ logsumexp(x_i W + b) - (x_i W + b)_{y_i} ] + s / 2 * ||W||^2

by Newton's method, starting where the previous solutions point to. The step solves H V = -gradient by conjugate
gradients. The Hessian H is never formed: a product with it costs one pass over the rows. With class probabilities P
(n, C),

    Z = X V;  R = P * (Z - rowsum(P * Z));  H V = X' R / n + s V

Why this needs few passes:

- The preconditioner. If P were constant, H would be h_c * (X'X / n) + s for class c, where h_c = mean_i p_ic (1 -
  p_ic). That is diagonal in the eigenbasis of X'X / n, which is computed once for all strengths. (Boehning's bound,
  1/2 in place of h_c, is far too large with many classes.) The leading eigenvectors, with one value for all other
  directions, work as well as all, and cost a few passes (randomized subspace iteration, Halko, Martinsson and Tropp
  2011).
- The products with H need a few digits only, so they run in bfloat16 if the processor has it; gradients and the
  objective keep the precision of X.
- Logits are linear in the coefficients, so the line search reads no rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from concat_ensemble.features.standardized import StandardizedFeatures

MAX_TRIALS = 12  # lengths that a line search tries
MAX_PRODUCTS = 50  # of the Hessian, per Newton step
SHARE = 0.25  # of the gradient that conjugate gradients may leave; less costs more products than it saves Newton steps
SAMPLE = 65_536  # rows that are solved first if not all rows fit into memory
LEADING = 256  # eigenvectors of the preconditioner, if there are many features
Precondition = Callable[["Coefficients"], "Coefficients"]
Eigen = tuple[torch.Tensor, torch.Tensor]  # values (r,), in rising order, and vectors (D, r) of X'X / n


@dataclass(frozen=True)
class Coefficients:
    """A weight and a bias, also as a gradient or a step."""

    weight: torch.Tensor  # (D, C)
    bias: torch.Tensor  # (C,)

    def plus(self, step: Coefficients, length: float | torch.Tensor) -> Coefficients:
        return Coefficients(self.weight + length * step.weight, self.bias + length * step.bias)

    def dot(self, other: Coefficients) -> torch.Tensor:
        return (self.weight * other.weight).sum() + (self.bias * other.bias).sum()


@dataclass(frozen=True)
class Solution(Coefficients):
    """The coefficients that minimize f, and what it took to find them."""

    l2_strength: float
    objective: float
    newton_steps: int
    products: int  # with the Hessian; each costs about as much as a gradient, or a quarter of it in bfloat16


@dataclass(frozen=True)
class Point:
    """Coefficients with their logits (n, C). Moving along a step, which is a point too, reads no rows."""

    coefficients: Coefficients
    logits: torch.Tensor

    def plus(self, step: Point, length: float) -> Point:
        return Point(self.coefficients.plus(step.coefficients, length), self.logits + length * step.logits)


@dataclass(frozen=True)
class Problem:
    """The objective f at one L2 strength and its derivatives."""

    X: StandardizedFeatures
    y: torch.Tensor
    l2_strength: float

    def point(self, coefficients: Coefficients) -> Point:
        """One pass over the rows."""
        return Point(coefficients, self.X @ coefficients.weight + coefficients.bias)

    def value(self, point: Point) -> torch.Tensor:
        return objective(point.logits, self.y, point.coefficients.weight, self.l2_strength)

    def slope(self, point: Point, step: Point) -> float:
        """Derivative of f at a point in the direction of a step."""
        rows = torch.arange(len(self.y), device=self.y.device)
        of_loss = (point.logits.softmax(1) * step.logits).sum(1).mean() - step.logits[rows, self.y].mean()
        return float(of_loss + self.l2_strength * (point.coefficients.weight * step.coefficients.weight).sum())

    def gradient(self, point: Point, probabilities: torch.Tensor) -> Coefficients:
        """One pass over the rows."""
        n, weight = len(self.X), self.l2_strength * point.coefficients.weight
        bias = torch.zeros_like(point.coefficients.bias)
        for rows, chunk in self.X.chunks():
            residual = probabilities[rows].clone()
            residual[torch.arange(len(chunk), device=self.X.device), self.y[rows]] -= 1
            weight, bias = weight + (residual.T @ chunk).T / n, bias + residual.sum(0) / n
        return Coefficients(weight, bias)

    def hessian_product(self, direction: Coefficients, probabilities: torch.Tensor) -> Coefficients:
        """One pass over the rows, in the fast precision."""
        n, weight = len(self.X), self.l2_strength * direction.weight
        bias, fast_weight = torch.zeros_like(direction.bias), direction.weight.to(self.X.fast_dtype)
        for rows, chunk in self.X.chunks(fast=True):
            residual = probabilities[rows] * ((chunk @ fast_weight).to(self.X.dtype) + direction.bias)
            residual -= probabilities[rows] * residual.sum(1, keepdim=True)
            weight += (residual.to(chunk.dtype).T @ chunk).T.to(self.X.dtype) / n  # faster than chunk.T @ residual
            bias += residual.sum(0) / n
        return Coefficients(weight, bias)


def logistic_path(
    X: StandardizedFeatures | torch.Tensor,
    y: torch.Tensor,
    l2_strengths: Sequence[float],
    *,
    num_classes: int,
    start: Coefficients | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
) -> Iterator[Solution]:
    """Solve for each of `l2_strengths`, in their order, which should be from strong to weak.

    Args:
        X: Rows (n, D) in float32 or float64, centered.
        y: Class numbers (n,) int64, from 0 to num_classes - 1.
        start: Coefficients to begin with. Default: a weight of 0 and the frequencies of the classes.
        tol: Stop if f is above its minimum by about this fraction of itself.
        max_iter: Largest number of Newton steps per strength.
    """
    X = StandardizedFeatures.from_tensor(X) if isinstance(X, torch.Tensor) else X
    # (A) The rows fit into memory, so passes are cheap: the preconditioner comes from all rows, and each strength
    #     starts where the two solutions before it point to.
    # (B) The rows do not fit, so each pass reads them again. A sample that fits is solved first: it gives the
    #     preconditioner, and for each strength a start that leaves few steps.
    sample_solutions: dict[float, Solution] = {}
    if X.in_memory or len(X) <= SAMPLE:
        eigen = eigenvectors(X)
    else:
        numbers, sample = X.sample(max(SAMPLE, 8 * X.shape[1]))
        settings = {"num_classes": num_classes, "start": start, "tol": 1e-4, "max_iter": max_iter}
        path = logistic_path(sample, y[numbers], l2_strengths, **settings)
        sample_solutions = {solution.l2_strength: solution for solution in path}
        eigen = eigenvectors(sample)
        del sample  # frees its rows
    if start is None:
        counts = torch.bincount(y, minlength=num_classes).to(X.dtype)
        frequencies = (counts + 0.5) / (len(X) + 0.5 * num_classes)
        start = Coefficients(counts.new_zeros(X.shape[1], num_classes), frequencies.log())
    begin: Coefficients = start
    solved: list[Solution] = []  # the last two
    for l2_strength in l2_strengths:
        if sample_solutions:
            begin = sample_solutions[l2_strength]
        elif len(solved) == 2:
            begin = extrapolate(*solved, l2_strength)
        elif solved:
            begin = solved[-1]
        solution = minimize(Problem(X, y, l2_strength), begin, eigen, tol=tol, max_iter=max_iter)
        solved = [*solved[-1:], solution]
        yield replace(solution, bias=solution.bias - solution.bias.mean())


def objective(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, l2_strength: float) -> torch.Tensor:
    """f of the module's docstring, a float64 scalar."""
    losses = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
    return losses.double().mean() + l2_strength / 2 * weight.double().square().sum()


def eigenvectors(X: StandardizedFeatures) -> Eigen:
    """All eigenvectors of X'X / n, or about the `LEADING` ones if there are more than twice as many."""
    if X.shape[1] <= 2 * LEADING:
        values, vectors = torch.linalg.eigh(X.gram())  # in float64: float32 fails if many values are zero
        return values.clamp_min(0).to(X.dtype), vectors.to(X.dtype)
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(X.shape[1], LEADING, generator=generator).to(X.device, X.dtype)
    for _ in range(2):
        space = torch.linalg.qr(X.gram_times(torch.linalg.qr(space).Q)).Q
    values, rotation = torch.linalg.eigh((space.T @ X.gram_times(space)).double())
    return values.clamp_min(0).to(X.dtype), space @ rotation.to(X.dtype)


def extrapolate(first: Solution, second: Solution, l2_strength: float) -> Coefficients:
    """Coefficients grow about linearly with the logarithm of the strength."""
    logs = [math.log(strength) for strength in (first.l2_strength, second.l2_strength, l2_strength)]
    length = (logs[2] - logs[1]) / (logs[1] - logs[0])
    change = Coefficients(second.weight - first.weight, second.bias - first.bias)
    return second.plus(change, length)


def minimize(problem: Problem, start: Coefficients, eigen: Eigen, *, tol: float, max_iter: int) -> Solution:
    """Newton's method with inexact steps."""
    point = problem.point(start)
    value, newton_steps, products = problem.value(point), 0, 0
    while newton_steps < max_iter:
        newton_steps += 1
        probabilities = point.logits.softmax(1)
        gradient = problem.gradient(point, probabilities)
        precondition = preconditioner(eigen, probabilities, problem.l2_strength)
        direction, used = conjugate_gradients(problem, probabilities, gradient, precondition)
        products += used
        step = problem.point(direction)
        length = line_search(problem, point, step, float(gradient.dot(direction)))
        new_point = point.plus(step, length)
        new_value = problem.value(new_point)
        if new_value >= value:  # no progress is possible in this precision
            break
        gain = float(value - new_value)
        point, value = new_point, new_value
        # An inexact step leaves about SHARE^2 of what it gained where f is nearly quadratic, else it may be as much.
        remaining = (SHARE**2 if length == 1 else 1.0) * gain
        if remaining <= tol / 2 * float(value):
            break
    weight, bias = point.coefficients.weight, point.coefficients.bias
    return Solution(weight, bias, problem.l2_strength, float(value), newton_steps, products)


def line_search(problem: Problem, point: Point, step: Point, slope: float) -> float:
    """The length at which the slope along a step is at most a tenth of `slope` < 0, the one at its beginning. At weak
    strengths Newton's own length, 1, is several times too long; no rows are read, so the search is cheap."""
    length, low, low_slope, high, high_slope = 1.0, 0.0, slope, math.inf, math.inf
    for _ in range(MAX_TRIALS):
        slope_here = problem.slope(point.plus(step, length), step)
        if abs(slope_here) <= -slope / 10:
            break
        if slope_here < 0:
            low, low_slope = length, slope_here
        else:
            high, high_slope = length, slope_here
        if high == math.inf:
            length = 2 * low
        else:  # false position
            length = low + (high - low) * min(max(low_slope / (low_slope - high_slope), 0.1), 0.9)
    return length


def preconditioner(eigen: Eigen, probabilities: torch.Tensor, l2_strength: float) -> Precondition:
    """Division by h_c * (X'X / n) + s, see the module's docstring."""
    values, vectors = eigen
    curvature = (probabilities * (1 - probabilities)).mean(0)
    scales, bias_scales = curvature * values[:, None] + l2_strength, curvature + 1e-12
    other_scales = scales[0]  # directions outside the basis get its smallest value

    def precondition(residual: Coefficients) -> Coefficients:
        inside = vectors.T @ residual.weight
        weight = vectors @ (inside / scales - inside / other_scales) + residual.weight / other_scales
        return Coefficients(weight, residual.bias / bias_scales)

    return precondition


def conjugate_gradients(
    problem: Problem, probabilities: torch.Tensor, gradient: Coefficients, precondition: Precondition
) -> tuple[Coefficients, int]:
    """Solve H step = -gradient until `SHARE` of the gradient is left, in the norm of the preconditioner. Returns the
    step and the number of products with H."""
    step = Coefficients(torch.zeros_like(gradient.weight), torch.zeros_like(gradient.bias))
    residual = Coefficients(-gradient.weight, -gradient.bias)
    direction = precondition(residual)
    size = first_size = residual.dot(direction)
    products = 0
    while products < MAX_PRODUCTS:
        products += 1
        product = problem.hessian_product(direction, probabilities)
        curvature = direction.dot(product)
        if not curvature > 0:  # by rounding, in bfloat16 or at the minimum itself
            break
        length = size / curvature
        step, residual = step.plus(direction, length), residual.plus(product, -length)
        conditioned = precondition(residual)
        size, previous_size = residual.dot(conditioned), size
        if size <= SHARE**2 * first_size:
            break
        direction = conditioned.plus(direction, size / previous_size)
    return step, products
