"""Multinomial logistic regression for a path of L2 strengths, in few passes over the rows.

For standardized rows x_i, labels y_i, sample weights w_i that sum to 1, and each L2 strength s, from strong to weak,
minimize

    f(W, b) = sum_i w_i [ logsumexp(x_i W + b) - (x_i W + b)_{y_i} ] + s / 2 * ||W||^2

by Newton's method, starting where the previous solutions point to. The step solves H V = -gradient by conjugate
gradients. The Hessian H is never formed: a product with it costs one pass over the rows. With class probabilities P
(n, C),

    Z = X V;  R = w * P * (Z - rowsum(P * Z));  H V = X' R + s V

If P were the same in all rows, H would be h_c * X'diag(w)X + s for class c, where h_c = sum_i w_i p_ic (1 - p_ic).
That is what conjugate gradients are preconditioned with. It is diagonal in the eigenbasis of X'diag(w)X, which is
computed once and serves all strengths. (Boehning's bound, 1/2 in place of h_c, is far too large with many classes.)
How the basis is found depends on the numbers of rows n and of features D:

(A) There are few rows (`ROTATED`) or few features (2 * `LEADING`). If n < D, the solution is a combination of the
    rows, since the penalty removes everything that is orthogonal to them. So W = V U with r <= n orthonormal
    directions V (D, r), which has the same norm as U, and the problem is one of the n x r coordinates Z = X V. V and Z
    come from the eigenvectors of the n x n matrix XX', or from those of the D x D matrix X'X if D is smaller. In these
    coordinates Z'diag(w)Z is diagonal, so the preconditioner is one division. This is fast because one decomposition
    of a small matrix replaces the passes over all D features, for every strength.
(B) Both are larger, and the rows fit into memory. The decomposition would cost more than it saves. The `LEADING`
    eigenvectors, with one value for all other directions, work as well as all, and cost a few passes (randomized
    subspace iteration, Halko, Martinsson and Tropp 2011). Passes are cheap, and each strength starts where the two
    solutions before it point to.
(C) The rows do not fit into memory, so each pass reads them again. A sample that fits is solved first, as in (A) or
    (B). It gives the preconditioner, and for each strength a start that leaves few steps.

In all cases:

- The expensive strengths are those in the middle of a path, at which the solution begins to fit every row: with 20,000
  rows, 1,024 features and 100 classes, 1e-4 takes 8 Newton steps and 105 products, 1e-3 takes 4 and 22. A row that is
  fitted well has almost no curvature, p (1 - p), in H, so a step moves its logits freely, and such rows become wrong
  beyond a fraction of the step: the line search stopped at 0.24, 0.46, 0.56 and 0.24 of four steps. Tried without a
  gain over the whole path: H of flatter probabilities after such a step (1e-4 takes 63 products, but 1e-5 then takes
  98 in place of 54), and a preconditioner with a weight for each row.
- For two classes and up to `DIRECT` features H itself is so small that forming and factorizing it costs less than the
  overhead of a few products. It then replaces the preconditioner, and one product with it is enough.
- The products with H need a few digits only, so they run in bfloat16 if the processor has it; gradients and the
  objective keep the precision of X.
- Logits are linear in the coefficients. Those of the current point and of the step are stored, so that the line search
  reads no rows. With many rows and classes (`STORED_LOGITS`) even one array of n x C is too large: then nothing of
  this size is stored, each pass computes the logits of a chunk again, and a pass of the line search tries several
  lengths at once. A product then costs half as much again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from concat_ensemble.features.standardized import StandardizedFeatures, kernel

MAX_TRIALS = 12  # lengths that a line search tries
MAX_PRODUCTS = 50  # of the Hessian, per Newton step
SHARE = 0.25  # of the gradient that conjugate gradients may leave; less costs more products than it saves Newton steps
STALLED = 0.05  # of the gain that a step promises
SAMPLE = 65_536  # rows that are solved first if not all rows fit into memory
ROTATED = (
    1_300  # rows up to which their kernel is decomposed, and five more for each class, whose products get cheaper
)
LEADING = 256  # eigenvectors of the preconditioner, if there are many rows and features
STORED_LOGITS = 2**28  # numbers, a gigabyte in float32; two such arrays are held
DIRECT = 128  # features up to which the Hessian of two classes is formed and factorized
PIECE = 2**22  # numbers of the arrays that are made of logits and freed at once
LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # that a line search tries in one pass
Precondition = Callable[["Coefficients"], "Coefficients"]


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
    converged: bool  # False: `max_iter` steps were not enough


@dataclass(frozen=True)
class Point:
    """Coefficients with their logits (n, C). Moving along a step, which is a point too, reads no rows."""

    coefficients: Coefficients
    logits: torch.Tensor | None  # None: they are computed in each pass

    def plus(self, step: Point, length: float) -> Point:
        """This point moved along a step. Its own logits are overwritten."""
        coefficients = self.coefficients.plus(step.coefficients, length)
        if self.logits is None or step.logits is None:
            return Point(coefficients, None)
        return Point(coefficients, self.logits.add_(step.logits, alpha=length))


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvalues (r,) of X'diag(w)X in rising order, and its eigenvectors (D, r). None: they are the axes."""

    values: torch.Tensor
    vectors: torch.Tensor | None

    def preconditioner(self, curvature: torch.Tensor, l2_strength: float) -> Precondition:
        """Division by h_c * X'diag(w)X + s of the module's docstring; curvature: (C,) h_c."""
        scales, bias_scales = curvature * self.values[:, None] + l2_strength, curvature + 1e-12
        vectors = self.vectors
        if vectors is None:
            return lambda residual: Coefficients(residual.weight / scales, residual.bias / bias_scales)
        other_scales = scales[0]  # directions outside the basis get its smallest value
        changes = 1 / scales - 1 / other_scales

        def precondition(residual: Coefficients) -> Coefficients:
            weight = vectors @ ((vectors.T @ residual.weight) * changes) + residual.weight / other_scales
            return Coefficients(weight, residual.bias / bias_scales)

        return precondition


@dataclass(frozen=True)
class Problem:
    """The objective f at one L2 strength and its derivatives."""

    X: StandardizedFeatures
    y: torch.Tensor
    sample_weight: torch.Tensor  # (n,), with sum 1
    l2_strength: float
    stores_logits: bool

    def point(self, coefficients: Coefficients) -> Point:
        """One pass over the rows, if logits are stored."""
        if not self.stores_logits:
            return Point(coefficients, None)
        return Point(coefficients, (self.X @ coefficients.weight).add_(coefficients.bias))

    def logits(self, *points: Point) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """The logits of each point in pieces of rows, stored ones or else computed in a pass over the rows."""
        size = max(PIECE // len(points[0].coefficients.bias), 1)
        stored = [point.logits for point in points if point.logits is not None]
        if len(stored) == len(points):
            for start in range(0, len(self.X), size):
                rows = slice(start, start + size)
                yield rows, [logits[rows] for logits in stored]
            return
        for rows, chunk in self.X.chunks():
            for start in range(rows.start, rows.stop, size):
                part = slice(start, min(start + size, rows.stop))
                piece = chunk[start - rows.start : part.stop - rows.start]
                yield part, [_logits(point.coefficients, piece) for point in points]

    def value(self, point: Point) -> torch.Tensor:
        """f, a float64 scalar."""
        loss = sum(self._losses(rows, logits).sum() for rows, [logits] in self.logits(point))
        return loss + self.l2_strength / 2 * point.coefficients.weight.double().square().sum()

    def value_along(self, point: Point, step: Point, length: float) -> torch.Tensor:
        """f after this length of a step, a float64 scalar."""
        pieces = self.logits(point, step)
        loss = sum(self._losses(rows, logits.add(change, alpha=length)).sum() for rows, (logits, change) in pieces)
        weight = point.coefficients.plus(step.coefficients, length).weight
        return loss + self.l2_strength / 2 * weight.double().square().sum()

    def _losses(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """Weighted losses (len(logits),). Where a row fits so well that its loss is 1e-5, it is the small sum of what
        the other classes have: the difference of logsumexp and the label's logit would keep no digit of it."""
        differences = logits - logits.gather(1, self.y[rows, None])
        largest, which = differences.max(1, keepdim=True)
        others = differences.sub_(largest).exp_().scatter_(1, which, 0.0).sum(1)
        return (largest[:, 0] + others.log1p_()).double() * self.sample_weight[rows]

    def slopes(self, point: Point, step: Point, lengths: Sequence[float]) -> list[float]:
        """Derivative of f in the direction of a step, after each of these lengths of it."""
        of_loss = self.sample_weight.new_zeros(len(lengths), dtype=torch.float64)
        for rows, (logits, change) in self.logits(point, step):
            relative = change - change.gather(1, self.y[rows, None])  # the other classes keep their digits
            for k, length in enumerate(lengths):
                slopes = (_softmax(logits.add(change, alpha=length)) * relative).sum(1)
                of_loss[k] += self.sample_weight[rows] @ slopes
        weight, direction = point.coefficients.weight, step.coefficients.weight
        slope, curvature = float((weight * direction).sum()), float(direction.square().sum())
        penalties = [self.l2_strength * (slope + length * curvature) for length in lengths]
        return [loss + penalty for loss, penalty in zip(of_loss.tolist(), penalties, strict=True)]

    def gradient(self, point: Point) -> tuple[Coefficients, torch.Tensor]:
        """The gradient, and the curvature h_c (C,) of the module's docstring. One pass over the rows."""
        weight, bias = _zeros_like(point.coefficients)
        curvature = torch.zeros_like(bias)
        for rows, chunk in self.X.chunks():
            probabilities = _probabilities(point, rows, chunk)
            residual = probabilities * self.sample_weight[rows, None]
            curvature += residual.sum(0) - torch.linalg.vecdot(residual, probabilities, dim=0)
            labels = self.y[rows, None]
            residual.scatter_(1, labels, 0.0)  # p - 1 at the label is minus the others: digits are left if p is near 1
            residual.scatter_(1, labels, -residual.sum(1, keepdim=True))
            weight += residual.T @ chunk
            bias += residual.sum(0)
        return Coefficients(weight.T + self.l2_strength * point.coefficients.weight, bias), curvature.clamp_min(0)

    def hessian_product(self, point: Point, direction: Coefficients) -> Coefficients:
        """One pass over the rows, in the fast precision."""
        weight, bias = _zeros_like(direction)
        fast = self.X.fast_dtype
        fast_point = Point(_convert(point.coefficients, fast), point.logits)
        fast_direction = _convert(direction, fast)
        for rows, chunk in self.X.chunks(fast=True):
            probabilities = _probabilities(fast_point, rows, chunk).to(self.X.dtype)
            change = _logits(fast_direction, chunk).to(self.X.dtype)
            # P * (Z - rowsum(P * Z)) in one pass over the memory: the derivative of softmax
            residual = torch.ops.aten._softmax_backward_data(change, probabilities, 1, self.X.dtype)
            residual *= self.sample_weight[rows, None]
            weight += residual.to(fast).T @ chunk  # faster than chunk.T @ residual
            bias += residual.sum(0)
        return Coefficients(weight.T + self.l2_strength * direction.weight, bias)

    def two_class_solver(self, point: Point) -> Precondition:
        """Solves with H itself, for two classes and few features. One pass over the rows.

        Steps are (v, -v), since the columns of W stay opposite, and for these H is X'diag(h)X + s with the row weights
        h = 2 w p_1 p_2. The bias is the weight of a feature that is 1 everywhere.
        """
        size = self.X.shape[1] + 1
        hessian = torch.eye(size, dtype=self.X.dtype, device=self.X.device).mul_(self.l2_strength)
        hessian[-1, -1] = 1e-9
        for rows, chunk in self.X.chunks():
            weights = 2 * self.sample_weight[rows] * _probabilities(point, rows, chunk).prod(1)
            extended = torch.cat([chunk, chunk.new_ones(len(chunk), 1)], 1)
            hessian.addmm_((extended * weights[:, None]).T, extended)
        factor = torch.linalg.cholesky(hessian)

        def solve_hessian(residual: Coefficients) -> Coefficients:
            solved = torch.cholesky_solve(torch.cat([residual.weight, residual.bias[None]]), factor)
            return Coefficients(solved[:-1], solved[-1])

        return solve_hessian


def logistic_path(
    X: StandardizedFeatures | torch.Tensor,
    y: torch.Tensor,
    l2_strengths: Sequence[float],
    *,
    num_classes: int,
    sample_weight: torch.Tensor | None = None,
    start: Coefficients | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
) -> Iterator[Solution]:
    """Solve for each of `l2_strengths`, in their order, which should be from strong to weak.

    Args:
        X: Rows (n, D) in float32 or float64, centered.
        y: Class numbers (n,) int64, from 0 to num_classes - 1.
        sample_weight: Weights (n,), at least 0, of which only the ratios count. A weight of 2 is the row twice, and of
            0 no row. Default: all the same.
        start: Coefficients to begin with. Default: a weight of 0 and the frequencies of the classes.
        tol: Stop if f is above its minimum by about this fraction of itself.
        max_iter: Largest number of Newton steps per strength.
    """
    X = StandardizedFeatures.from_tensor(X) if isinstance(X, torch.Tensor) else X
    X, y, weights = _weighted_rows(X, y, sample_weight)
    if start is None:
        counts = torch.zeros(num_classes, dtype=X.dtype, device=X.device).index_add_(0, y, weights * len(X))
        frequencies = (counts + 0.5) / (len(X) + 0.5 * num_classes)
        start = Coefficients(torch.zeros(num_classes, X.shape[1]).to(counts).T, frequencies.log())
    settings = {"tol": tol, "max_iter": max_iter}
    if X.in_memory and (len(X) <= ROTATED + 5 * num_classes or X.shape[1] <= 2 * LEADING):  # case (A)
        rotation, coordinates, eigen = rotate(X, weights)
        begin = replace(start, weight=rotation.coordinates(start.weight))
        for solution in solve(coordinates, y, weights, l2_strengths, start=begin, eigen=eigen, **settings):
            yield replace(solution, weight=rotation.weight(solution.weight))
        return
    starts: dict[float, Coefficients] = {}
    if X.in_memory or len(X) <= SAMPLE:  # case (B)
        eigen = eigenvectors(X, weights)
    else:  # case (C)
        numbers, sample = X.sample(max(SAMPLE, 8 * X.shape[1]))
        options = {"num_classes": num_classes, "start": start, "tol": max(tol, 1e-4), "max_iter": max_iter}
        path = logistic_path(sample, y[numbers], l2_strengths, sample_weight=weights[numbers], **options)
        starts = {solution.l2_strength: solution for solution in path}
        eigen = eigenvectors(sample, weights[numbers] / weights[numbers].sum())
        del sample  # frees its rows
    yield from solve(X, y, weights, l2_strengths, start=start, starts=starts, eigen=eigen, **settings)


def _weighted_rows(
    X: StandardizedFeatures, y: torch.Tensor, sample_weight: torch.Tensor | None
) -> tuple[StandardizedFeatures, torch.Tensor, torch.Tensor]:
    """The rows with weights above 0, their labels, and these weights with sum 1."""
    if sample_weight is None:
        return X, y, torch.full((len(X),), 1 / len(X), dtype=X.dtype, device=X.device)
    weights = sample_weight.to(X.device, torch.float64)
    if (weights == 0).any():
        numbers = weights.nonzero()[:, 0]
        X, y, weights = X.select(numbers.cpu().numpy()), y[numbers], weights[numbers]
    return X, y, (weights / weights.sum()).to(X.dtype)


def solve(
    X: StandardizedFeatures,
    y: torch.Tensor,
    sample_weight: torch.Tensor,
    l2_strengths: Sequence[float],
    *,
    start: Coefficients,
    starts: Mapping[float, Coefficients] = MappingProxyType({}),
    eigen: Eigenbasis,
    tol: float,
    max_iter: int,
) -> Iterator[Solution]:
    """Solve for each strength, from `starts` where it is known, else from where the solutions before it point to."""
    stores_logits = len(X) * len(start.bias) <= STORED_LOGITS
    begin: Coefficients = start
    solved: list[Solution] = []  # the last two
    for l2_strength in l2_strengths:
        if l2_strength in starts:
            begin = starts[l2_strength]
        elif len(solved) == 2:
            begin = extrapolate(*solved, l2_strength)
        elif solved:
            begin = solved[-1]
        problem = Problem(X, y, sample_weight, l2_strength, stores_logits)
        solution = minimize(problem, begin, eigen, tol=tol, max_iter=max_iter)
        solved = [*solved[-1:], solution]
        yield replace(solution, bias=solution.bias - solution.bias.mean())


def objective(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, l2_strength: float) -> torch.Tensor:
    """f of the module's docstring for rows of equal weights, a float64 scalar."""
    losses = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
    return losses.double().mean() + l2_strength / 2 * weight.double().square().sum()


@dataclass(frozen=True)
class Rotation:
    """Orthonormal directions V = rows' @ vectors (D, r); without rows, V = vectors."""

    vectors: torch.Tensor
    rows: torch.Tensor | None = None

    def coordinates(self, weight: torch.Tensor) -> torch.Tensor:
        """V'W (r, C) of a weight (D, C)."""
        return self.vectors.T @ (weight if self.rows is None else self.rows @ weight)

    def weight(self, coordinates: torch.Tensor) -> torch.Tensor:
        """V U (D, C) of coordinates (r, C)."""
        rotated = self.vectors @ coordinates
        return rotated if self.rows is None else self.rows.T @ rotated


def rotate(X: StandardizedFeatures, sample_weight: torch.Tensor) -> tuple[Rotation, StandardizedFeatures, Eigenbasis]:
    """The eigenvectors of X'diag(w)X, the coordinates of the rows along them, and their eigenvalues."""
    rows = X.stacked()
    if len(rows) >= X.shape[1]:
        values, vectors = torch.linalg.eigh(_gram(X, sample_weight).double())
        vectors = vectors.to(X.dtype)
        rotation, coordinates = Rotation(vectors), rows @ vectors
    else:
        # With the singular values S of diag(sqrt(w)) X = U S V', whose squares the kernel has as eigenvalues.
        roots = sample_weight.double().sqrt()[:, None]
        values, left = torch.linalg.eigh(kernel(rows) * roots * roots.T)
        nonzero = values > values[-1] * len(rows) * torch.finfo(torch.float64).eps
        values, left = values[nonzero], left[:, nonzero]
        singular = values.sqrt()
        rotation = Rotation((left / singular * roots).to(X.dtype), rows)
        coordinates = (left * singular / roots).to(X.dtype)
    eigen = Eigenbasis(values.clamp_min(0).to(X.dtype), None)
    return rotation, StandardizedFeatures.from_tensor(coordinates), eigen


def eigenvectors(X: StandardizedFeatures, sample_weight: torch.Tensor) -> Eigenbasis:
    """All eigenvectors of X'diag(w)X, or about the `LEADING` ones if there are more than twice as many."""
    if X.shape[1] <= 2 * LEADING:
        values, vectors = torch.linalg.eigh(_gram(X, sample_weight).double())  # float32 fails if many values are zero
        return Eigenbasis(values.clamp_min(0).to(X.dtype), vectors.to(X.dtype))
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(X.shape[1], LEADING, generator=generator).to(X.device, X.dtype)
    for _ in range(2):
        space = torch.linalg.qr(X.gram_times(torch.linalg.qr(space).Q, sample_weight)).Q
    values, rotation = torch.linalg.eigh((space.T @ X.gram_times(space, sample_weight)).double())
    return Eigenbasis(values.clamp_min(0).to(X.dtype), space @ rotation.to(X.dtype))


def _gram(X: StandardizedFeatures, sample_weight: torch.Tensor) -> torch.Tensor:
    """X'diag(w)X (D, D) in the precision of the rows, which is enough for a preconditioner."""
    total = torch.zeros(X.shape[1], X.shape[1], dtype=X.dtype, device=X.device)
    for rows, chunk in X.chunks():
        total.addmm_((chunk * sample_weight[rows, None]).T, chunk)
    return (total + total.T) / 2


def extrapolate(first: Solution, second: Solution, l2_strength: float) -> Coefficients:
    """Coefficients grow about linearly with the logarithm of the strength."""
    logs = [math.log(strength) for strength in (first.l2_strength, second.l2_strength, l2_strength)]
    length = (logs[2] - logs[1]) / (logs[1] - logs[0])
    change = Coefficients(second.weight - first.weight, second.bias - first.bias)
    return second.plus(change, length)


def minimize(problem: Problem, start: Coefficients, eigen: Eigenbasis, *, tol: float, max_iter: int) -> Solution:
    """Newton's method with inexact steps."""
    point = problem.point(start)
    value, newton_steps, products, converged = problem.value(point), 0, 0, False
    while newton_steps < max_iter and not converged:
        newton_steps += 1
        gradient, curvature = problem.gradient(point)
        if len(start.bias) == 2 and problem.X.shape[1] <= DIRECT:
            precondition = problem.two_class_solver(point)
        else:
            precondition = eigen.preconditioner(curvature, problem.l2_strength)
        direction, used = conjugate_gradients(problem, point, gradient, precondition)
        products += used
        step, slope = problem.point(direction), float(gradient.dot(direction))
        length, new_value = line_search(problem, point, value, step, slope)
        if not new_value < value:  # rounding can spoil the products; without them the step still leads downhill
            direction = precondition(Coefficients(-gradient.weight, -gradient.bias))
            step, slope = problem.point(direction), float(gradient.dot(direction))
            length, new_value = line_search(problem, point, value, step, slope)
        if not new_value < value:  # no progress is possible in this precision, which is the end if little was left
            precision = max(tol, 100 * torch.finfo(problem.X.dtype).eps)
            converged = -slope / 2 <= precision * float(value)
            break
        gain = float(value - new_value)
        point, value = point.plus(step, length), new_value
        # An inexact step leaves SHARE^2 to twice that of what it gained where f is nearly quadratic; else it may leave
        # as much as it gained.
        remaining = (2 * SHARE**2 if length == 1 else 1.0) * gain
        # Where it gained far less than its slope promised, rounding or the line search kept it from going on.
        stalled = gain < STALLED * -slope / 2
        converged = not stalled and remaining <= tol / 2 * float(value)
    weight, bias = point.coefficients.weight, point.coefficients.bias
    return Solution(weight, bias, problem.l2_strength, float(value), newton_steps, products, converged)


def line_search(
    problem: Problem, point: Point, value: torch.Tensor, step: Point, slope: float
) -> tuple[float, torch.Tensor]:
    """The length at which the slope along a step is at most a tenth of `slope` < 0, the one at its beginning, and f,
    which was `value`, is less; and f there. Where rounding leaves no such length, f is not less.

    At weak strengths Newton's own length, 1, can be several times too short. It is many times too long where rows are
    surely wrong, as new rows can be at a start that was fitted without them: they have no curvature.
    """
    if not problem.stores_logits:
        return _search_lengths(problem, point, value, step, slope)
    length, low, low_slope, high, high_slope = 1.0, 0.0, slope, math.inf, math.inf
    sides: list[bool] = []
    for _ in range(MAX_TRIALS):
        [slope_here] = problem.slopes(point, step, [length])
        if abs(slope_here) <= -slope / 10:
            new_value = problem.value_along(point, step, length)
            if new_value < value or slope_here <= 0:
                return length, new_value
        sides.append(slope_here < 0)
        if slope_here < 0:
            low, low_slope = length, slope_here
        else:
            high, high_slope = length, slope_here
        if high == math.inf:
            length = 2 * low
        elif sides[-2:] in ([True, True], [False, False]):  # the slope is far from linear in between
            length = math.sqrt(max(low, high / 100) * high)
        else:
            length = _false_position(low, low_slope, high, high_slope)
    return low, problem.value_along(point, step, low)


def _search_lengths(
    problem: Problem, point: Point, value: torch.Tensor, step: Point, slope: float
) -> tuple[float, torch.Tensor]:
    """`line_search` in few passes over the rows: among `LENGTHS`, and if all are too long among shorter ones."""
    length, new_value = 0.0, value
    for unit in (1.0, LENGTHS[0] ** 2, LENGTHS[0] ** 4):
        slopes = problem.slopes(point, step, [unit * length for length in LENGTHS])
        length = unit * _interpolated_length(unit * slope, [unit * slope_here for slope_here in slopes])
        new_value = problem.value_along(point, step, length)
        if new_value < value:
            break
    return length, new_value


def _false_position(low: float, low_slope: float, high: float, high_slope: float) -> float:
    return low + (high - low) * min(max(low_slope / (low_slope - high_slope), 0.1), 0.9)


def _interpolated_length(slope: float, slopes: Sequence[float]) -> float:
    """The length with slope 0, between those `LENGTHS` whose slopes have different signs."""
    if abs(slopes[LENGTHS.index(1.0)]) <= -slope / 10:
        return 1.0
    low, low_slope = 0.0, slope
    for length, slope_here in zip(LENGTHS, slopes, strict=True):
        if slope_here >= 0:
            return _false_position(low, low_slope, length, slope_here)
        low, low_slope = length, slope_here
    return low


def conjugate_gradients(
    problem: Problem, point: Point, gradient: Coefficients, precondition: Precondition
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
        product = problem.hessian_product(point, direction)
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


def _logits(coefficients: Coefficients, chunk: torch.Tensor) -> torch.Tensor:
    return torch.addmm(coefficients.bias, chunk, coefficients.weight)


def _probabilities(point: Point, rows: slice, chunk: torch.Tensor) -> torch.Tensor:
    """The probabilities of these rows, (len(chunk), C)."""
    logits = _logits(point.coefficients, chunk) if point.logits is None else point.logits[rows]
    return _softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of rows (n, C). For two classes, torch's own spends most of its time on going from row to row."""
    if logits.shape[1] > 2:
        return logits.softmax(1)
    difference = logits[:, 1] - logits[:, 0]
    return torch.stack([(-difference).sigmoid_(), difference.sigmoid()], 1)


def _convert(coefficients: Coefficients, dtype: torch.dtype) -> Coefficients:
    return Coefficients(coefficients.weight.to(dtype), coefficients.bias.to(dtype))


def _zeros_like(coefficients: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros (C, D) and (C,) to sum in. Coefficients are views (D, C) of the transpose, which is faster to sum."""
    weight = coefficients.weight.T
    return torch.zeros_like(weight, memory_format=torch.contiguous_format), torch.zeros_like(coefficients.bias)
