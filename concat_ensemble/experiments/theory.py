"""Section 2 of "These Are Not All the Features You Are Looking For" (arXiv 2506.18221) as computations.

*Proposition 2.1*: a feature that correlates with the label in a component does so in almost every mixture. Its
covariance is quadratic in the proportions, so the proportions that cancel it can be computed exactly.

*Figure 2*: that is no comfort, as a network need not keep what correlates. The paper gives four sub-distributions of
three points each, one of double mass, the labels +1 and -1, and the statement: a sparse solution on their mixture
needs fewer features than the four direct solutions together, so that some component loses one that it needs. We
reconstructed the coordinates, the labels of the points, the equal proportions, and the network.

Component i has the double mass on corner i of a square, and the rest on its two neighbors. Corners are labeled + - + -
in turn, except that the corner before i has the other label in component i. So each component alone needs one feature,
that of the corner after i. In the mixture each corner has a majority label, + - + -, and a minority of a quarter.
Features of two opposite corners and a constant describe the majorities. Then the two other corners look alike, and the
two components that tell them apart are lost. Which pair is kept depends on the initialization, so k networks side by
side have both pairs with probability 1 - 2^(1-k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import NUM_RESAMPLES, central_interval, wilson_interval
from concat_ensemble.reporting.figures import BLUE, GREY, ORANGE

TOLERANCE = 1e-12  # of the largest coefficient: what counts as zero
MEMBERS, WIDTH, STEPS = 4, 16, 4_000  # of a concatenation; hidden units and training steps of each member
LEARNING_RATE, WEIGHT_DECAY, BATCH, INITIAL = 0.5, 0.01, 32, 0.1  # INITIAL: standard deviation of the initial weights
NEGLIGIBLE, RIDGE = 0.05, 1e-3  # singular values, relative to the largest; a probe's penalty, to the total variance
BOUNDS = (0.1, 0.01, 1e-3, 1e-4, 1e-5)  # of a covariance
Features = Callable[[np.ndarray], np.ndarray]  # (N, D) points -> (N, F)


@dataclass
class Distribution:
    """A discrete distribution of labeled points, of which one may occur several times.

    Raises:
        ValueError: when shapes do not agree, a number is not finite, or the masses are no probabilities.
    """

    points: np.ndarray  # (N, D)
    labels: np.ndarray  # (N,)
    masses: np.ndarray  # (N,) probabilities

    def __post_init__(self):
        self.points, self.labels = np.asarray(self.points, dtype=float), np.asarray(self.labels, dtype=float)
        shape, finite = self.points.shape, np.isfinite(self.points).all() and np.isfinite(self.labels).all()
        if len(shape) != 2 or self.labels.shape != shape[:1] or not finite:
            raise ValueError(f"points {shape} and labels {self.labels.shape} must be (N, D) and (N,), and all finite.")
        self.masses = _check_shares(self.masses, len(self.points), "masses")

    def covariance(self, features: Features) -> np.ndarray:
        """(F,): E[phi Y] - E[phi] E[Y], for each feature."""
        values = features(self.points)
        return self.masses @ ((values - self.masses @ values) * (self.labels - self.masses @ self.labels)[:, None])

    def correlation(self, features: Features) -> np.ndarray:
        """(F,): Cor[phi, Y], in [-1, 1]; 0 where the feature or the label is constant."""
        values = np.column_stack([self.labels, features(self.points)])
        deviations = np.sqrt(self.masses @ (values - self.masses @ values) ** 2)
        spread = deviations[0] * deviations[1:]
        return np.divide(self.covariance(features), spread, out=np.zeros_like(spread), where=spread > 0)


def mixture(components: Sequence[Distribution], proportions: ArrayLike) -> Distribution:
    """P_mix = sum_i lambda_i P_i (section 2).

    Raises:
        ValueError: when the proportions are not one per component, negative, or do not sum to 1.
    """
    shares = _check_shares(proportions, len(components), "proportions")
    points = np.concatenate([part.points for part in components])
    labels = np.concatenate([part.labels for part in components])
    masses = np.concatenate([share * part.masses for share, part in zip(shares, components, strict=True)])
    return Distribution(points, labels, masses)


def covariance_forms(components: Sequence[Distribution], features: Features) -> np.ndarray:
    """(F, n, n): symmetric Q with lambda' Q lambda = Cov_mix[phi, Y], for each feature and all proportions lambda.

    Expectations under a mixture are linear in lambda, and lambda sums to 1. With c_i = E_i[phi Y], m_i = E_i[phi] and
    y_i = E_i[Y], Q_ij is the mean of c_i - m_i y_j and c_j - m_j y_i.
    """
    moments = []
    for part in components:
        values = features(part.points)
        moments.append(part.masses @ np.column_stack([part.labels, values, values * part.labels[:, None]]))
    labels, means, products = np.split(np.array(moments), [1, 1 + values.shape[1]], axis=1)
    halves = products.T[:, :, None] - means.T[:, :, None] * labels[:, 0]
    return (halves + halves.swapaxes(1, 2)) / 2


def cancelling_proportions(form: np.ndarray, start: ArrayLike, end: ArrayLike) -> np.ndarray:
    """(R, n): the 0, 1 or 2 proportions between `start` and `end` at which the covariance is zero, in this order.

    For two components, from (1, 0) to (0, 1), these are all there are. For more components the zeros are a quadric in
    the simplex, which a segment cuts in such points. Zeros closer than about 1e-6 count as one. `form` is (n, n), one
    of `covariance_forms`.

    Raises:
        ValueError: when the ends are no proportions, or the covariance is zero on the whole segment.
    """
    start, end = (_check_shares(proportions, len(form), "proportions") for proportions in (start, end))
    # On the segment, at 0 <= t <= 1, the covariance is (1-t)^2 a + 2t(1-t) b + t^2 c.
    a, b, c = start @ form @ start, start @ form @ end, end @ form @ end
    scale = np.abs([a, b, c]).max()
    if scale <= TOLERANCE * np.abs(form).max():
        segment = f"from {start.tolist()} to {end.tolist()}"
        raise ValueError(f"{segment} the covariance is zero everywhere; name other ends.")
    times = _bernstein_zeros(*(np.array([a, b, c]) / scale))[:, None]
    return (1 - times) * start + times * end


def _bernstein_zeros(a: float, b: float, c: float) -> np.ndarray:
    """(R,): zeros of (1-t)^2 a + 2t(1-t) b + t^2 c in [0, 1], in ascending order, for coefficients of size 1."""
    square, half = a - 2 * b + c, b - a  # the same as square t^2 + 2 half t + a
    discriminant = half**2 - square * a
    root = np.sqrt(discriminant) if discriminant > TOLERANCE else 0.0
    # The textbook formula loses digits when `half` and `root` nearly cancel; these two numbers have the same sign.
    stable = -half - np.copysign(root, half)
    zeros = []
    for numerator, denominator in ((stable, square), (a, stable)):
        if denominator != 0:
            t = np.clip(numerator / denominator, 0, 1)
            if abs((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c) <= TOLERANCE:
                zeros.append(t)
    return np.unique(zeros if root else zeros[:1])  # without a root they are one double zero


@dataclass
class Cancellations:
    """Proposition 2.1 on random components: how often random proportions cancel a covariance, and which do exactly."""

    num_mixtures: int
    cancelled: int  # mixtures with a covariance of zero, up to rounding
    within: dict[str, float]  # share of the mixtures with a smaller covariance than this
    intervals: dict[str, tuple[float, float]]  # of these shares, 95%: bootstrap over the sets of components
    slope: float  # of the share over the bound, both logarithmic, for bounds up to 0.01; 1: in proportion
    slope_interval: tuple[float, float]  # 95%, likewise
    exact: int  # proportions that cancel, computed on one random segment for each set of components
    largest_covariance: float  # of the mixtures with these proportions, computed from their points


def sample_cancellations(*, seed: int = 0) -> Cancellations:
    """A million mixtures: 1,000 proportions, uniform on the simplex, of each of 1,000 sets of four components.

    A component is three normal numbers with random masses and labels of +1 or -1, and the number is the feature. In
    each set at least one component has a correlation.

    That no mixture cancels exactly is no evidence, since hardly any floating-point number is zero. The share within a
    bound is: it falls in proportion to the bound where the cancelling proportions are a surface in the simplex, of
    measure zero, and stays above zero where they are more. Mixtures of the same set are alike, so that intervals are
    over sets.
    """
    rng = np.random.default_rng(seed)
    sampled, exact = [], []
    while len(sampled) < 1_000:
        parts = [
            Distribution(rng.normal(size=(3, 1)), rng.choice([-1, 1], 3), rng.dirichlet([1] * 3)) for _ in range(4)
        ]
        (form,) = covariance_forms(parts, np.asarray)
        if np.abs(np.diag(form)).max() <= 1e-6:
            continue
        proportions = rng.dirichlet([1] * 4, 1_000)
        sampled.append(np.abs(np.einsum("ri,ij,rj->r", proportions, form, proportions)))
        start, end = rng.dirichlet([1] * 4, 2)
        for zero in cancelling_proportions(form, start, end):
            exact.append(abs(mixture(parts, zero).covariance(np.asarray)[0]))
    covariances = np.array(sampled)  # (sets, proportions)
    within = np.stack([(covariances < bound).mean(1) for bound in BOUNDS], axis=1)  # (sets, bounds)
    resampled = resample_sets(within, rng)
    return Cancellations(
        num_mixtures=covariances.size,
        cancelled=int((covariances <= TOLERANCE).sum()),
        within={f"{bound:g}": float(share) for bound, share in zip(BOUNDS, within.mean(0), strict=True)},
        intervals={f"{bound:g}": central_interval(each) for bound, each in zip(BOUNDS, resampled.T, strict=True)},
        slope=float(log_slope(within.mean(0)[None])[0]),
        slope_interval=central_interval(log_slope(resampled)),
        exact=len(exact),
        largest_covariance=float(max(exact)),
    )


def resample_sets(within: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R, bounds): mean shares of bootstrap resamples of the sets, from the share (sets, bounds) of each one."""
    number = len(within)
    return rng.multinomial(number, [1 / number] * number, NUM_RESAMPLES) @ within / number


def log_slope(shares: np.ndarray) -> np.ndarray:
    """(R,): least-squares slope of log share over log bound, for shares (R, bounds) of the bounds up to 0.01."""
    small = np.array(BOUNDS) <= 0.01
    return np.polyfit(np.log(np.array(BOUNDS)[small]), np.log(shares[:, small]).T, 1)[0]


def figure_2_components() -> list[Distribution]:
    """The four components as reconstructed (see the top of this file), to be mixed in equal proportions."""
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / np.sqrt(2)
    majority = np.array([1, -1, 1, -1])
    components = []
    for i in range(4):
        three = [i, (i + 1) % 4, i - 1]
        components.append(Distribution(corners[three], majority[three] * [1, 1, -1], np.array([0.5, 0.25, 0.25])))
    return components


def train_networks(
    distribution: Distribution, count: int, *, width: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Train `count` networks c + sum_j gamma_j max(w_j x, 0)^2 independently by SGD; with 0 steps they stay untrained.

    The loss is the squared error, with batches of 32, weight decay, and a learning rate that falls to zero over the
    second half. Among squared units the strongest grow first, and the others decay once nothing is left to fit: the
    sparsity bias that the paper describes. (Plain ReLUs of this width all grow: trained like this, they lost no
    component.)

    Returns:
        (count, width, D) hidden weights w. The heads gamma and c are left out, since they are retrained.
    """
    points, place = np.unique(distribution.points, axis=0, return_inverse=True)
    at = np.eye(len(points))[place.ravel()]  # (N, points): a point with two labels is computed once
    weights = rng.normal(scale=INITIAL, size=(count, width, points.shape[1]))
    heads, constants = rng.normal(scale=INITIAL, size=(count, width)), np.zeros(count)
    for step in range(steps):
        rate = LEARNING_RATE * min(1, 2 * (1 - step / steps))
        batch = rng.multinomial(BATCH, distribution.masses, size=count) / BATCH
        hidden = np.maximum(weights @ points.T, 0)  # (count, width, points)
        values = hidden**2
        outputs = (heads[:, None] @ values)[:, 0] + constants[:, None]
        errors = (batch @ at) * outputs - (batch * distribution.labels) @ at
        back = 2 * heads[:, :, None] * errors[:, None] * hidden
        heads -= rate * ((values @ errors[:, :, None])[:, :, 0] + WEIGHT_DECAY * heads)
        weights -= rate * (back @ points + WEIGHT_DECAY * weights)
        constants -= rate * errors.sum(1)
    return weights


def hidden_features(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(count, N, width): phi_j(x) = max(w_j x, 0)^2, for (count, width, D) weights and (N, D) points."""
    return np.maximum(points @ weights.swapaxes(1, 2), 0) ** 2


def probe_accuracy(features: np.ndarray, distribution: Distribution) -> np.ndarray:
    """(count,): share of the mass whose sign a retrained head predicts correctly (section 2, linear probing).

    The head is a ridge regression with a constant on (count, N, width) features of the distribution's points. These
    are not standardized, which would bring back those that have all but decayed.
    """
    masses, labels = distribution.masses[:, None], distribution.labels
    centered, mean = features - (masses * features).sum(1, keepdims=True), distribution.masses @ labels
    gram = centered.swapaxes(1, 2) @ (masses * centered)
    penalty = RIDGE * np.trace(gram, axis1=1, axis2=2) + np.finfo(float).tiny  # features may all be constant
    moments = (masses * centered).swapaxes(1, 2) @ (labels - mean)
    heads = np.linalg.solve(gram + penalty[:, None, None] * np.eye(gram.shape[1]), moments[:, :, None])
    return (np.sign((centered @ heads)[:, :, 0] + mean) == np.sign(labels)) @ distribution.masses


@dataclass
class Row:
    """Networks of one kind over all initializations, with heads retrained on each distribution."""

    name: str
    width: int
    steps: int  # of all its networks together
    features: float  # in use, on average: their rank on the four corners. Equal units count once, decayed ones do not
    mixture: float  # average accuracy on the mixture; at most 0.75 is possible
    components: list[float]  # average accuracy on each component
    all_fitted: int  # initializations in which every component is fitted without an error
    interval: tuple[float, float]  # of their share: Wilson's, 95%


@dataclass
class Counterexample:
    """Figure 2, trained: networks on each component and on the mixture, and how well retrained heads do on them."""

    initializations: int
    seed: int
    correlations: list[float]  # between each corner's feature and the label, in the mixture: none is zero
    rows: list[Row]
    directions: dict[str, list[list[float]]]  # (width, D) hidden weights in the first initialization

    @property
    def verdict(self) -> str:
        """The result in words."""
        direct, single, *_, together, untrained = self.rows
        recovered = "recovered" if together.interval[0] > single.interval[1] else "not surely recovered"
        correlation = min(map(abs, self.correlations))
        return (
            f"Trained on the mixture, a network uses {single.features:.2f} features, the direct solutions together "
            f"{direct.features:.2f}, each of them correlated with the label in the mixture too ({correlation:.2f}). "
            f"A retrained head fits every component in {single.all_fitted} of {self.initializations} initializations; "
            f"after direct training in {direct.all_fitted}. With {MEMBERS} networks of a quarter of the steps each, "
            f"side by side, it does in {together.all_fitted}: at equal training cost, what was lost is {recovered}. "
            f"With as many untrained units it does in {untrained.all_fitted}: on three points width is enough, so "
            "this shows what training on a mixture drops, not that trained features beat random ones."
        )


def train_counterexample(*, initializations: int = 100, steps: int = STEPS, seed: int = 0) -> Counterexample:
    """Train and measure all kinds of networks.

    Direct solutions and short trainings side by side take `steps` each. One network on the mixture takes four times as
    many; so does another that is four times as wide, and costs four times as much.
    """
    parts, rng = figure_2_components(), np.random.default_rng(seed)
    mixed, corners = mixture(parts, [0.25] * 4), np.concatenate([part.points[:1] for part in parts])

    def train(distribution: Distribution, width: int, steps: int, copies: int = 1) -> np.ndarray:
        return train_networks(distribution, copies * initializations, width=width, steps=steps, rng=rng)

    wide = MEMBERS * WIDTH
    direct = [train(part, WIDTH, steps) for part in parts]
    single = train(mixed, WIDTH, MEMBERS * steps)
    wider = train(mixed, wide, MEMBERS * steps)
    short = train(mixed, WIDTH, steps, copies=MEMBERS).reshape(initializations, wide, -1)
    untrained = train(mixed, wide, 0)
    rows = [
        _measure("direct, one network a component", np.concatenate(direct, axis=1), steps=MEMBERS * steps, own=direct),
        _measure("mixture, one network", single, steps=MEMBERS * steps),
        _measure(f"mixture, one network {MEMBERS} times as wide", wider, steps=MEMBERS * steps),
    ]
    for k in (1, 2, MEMBERS):
        rows.append(_measure(f"mixture, {k} of {MEMBERS} short trainings", short[:, : k * WIDTH], steps=k * steps))
    rows.append(_measure("untrained", untrained, steps=0))
    directions = {f"component {i + 1}": weights[0].tolist() for i, weights in enumerate(direct)}
    directions["mixture, one network"] = single[0].tolist()
    directions[f"mixture, {MEMBERS} short trainings"] = short[0].tolist()
    correlations = mixed.correlation(lambda points: hidden_features(corners[None], points)[0]).tolist()
    return Counterexample(initializations, seed, correlations, rows, directions)


def _measure(name: str, weights: np.ndarray, *, steps: int, own: Sequence[np.ndarray] = ()) -> Row:
    """Probe (count, width, D) hidden weights. Each component is probed on the weights in `own`, if there are any."""
    parts, count = figure_2_components(), len(weights)
    mixed, corners = mixture(parts, [0.25] * 4), np.concatenate([part.points[:1] for part in parts])
    accuracies = []
    for part, probed in zip(parts, own or [weights] * len(parts), strict=True):
        accuracies.append(probe_accuracy(hidden_features(probed, part.points), part))
    correct = np.array(accuracies)  # (components, count)
    all_fitted = int((correct > 1 - TOLERANCE).all(0).sum())
    ranks = np.linalg.matrix_rank(hidden_features(weights, corners), rtol=NEGLIGIBLE)
    return Row(
        name=name,
        width=weights.shape[1],
        steps=steps,
        features=float(ranks.mean()),
        mixture=float(probe_accuracy(hidden_features(weights, mixed.points), mixed).mean()),
        components=correct.mean(1).tolist(),
        all_fitted=all_fitted,
        interval=wilson_interval(all_fitted / count, count),
    )


def plot_counterexample(counterexample: Counterexample, path: Path) -> None:
    """Draw Figure 2, with masses as areas and hidden weights as lines, and how often every component is fitted."""
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    (a, b, c, d, e, f), parts = counterexample.directions, figure_2_components()
    panels = figure.subplot_mosaic([[a, b, e, "rows"], [c, d, f, "rows"]], width_ratios=[1, 1, 1, 1.3])
    mixed = mixture(parts, [0.25] * 4)
    for (name, weights), part in zip(counterexample.directions.items(), [*parts, mixed, mixed], strict=True):
        _plot_distribution(panels[name], part, weights)
        panels[name].set_title(name, fontsize=9)
    panels[d].set_xlabel("blue: +1, orange: -1, area: mass, lines: hidden weights", fontsize=8)
    _plot_rows(panels["rows"], counterexample)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_distribution(axes: Axes, part: Distribution, weights: list[list[float]]) -> None:
    cells, place = np.unique(np.column_stack([part.labels, part.points]), axis=0, return_inverse=True)
    masses = np.bincount(place.ravel(), part.masses)
    order = np.argsort(-masses)  # a minority is drawn on top of the majority
    colors = np.where(cells[order, 0] > 0, BLUE, ORANGE)
    axes.scatter(*cells[order, 1:].T, s=1500 * masses[order], color=colors)
    for x, y in weights:
        axes.plot([0, x], [0, y], color="black", linewidth=2, zorder=3)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")


def _plot_rows(axes: Axes, counterexample: Counterexample) -> None:
    rows = counterexample.rows
    shares = np.array([row.all_fitted / counterexample.initializations for row in rows])
    low, high = np.array([row.interval for row in rows]).T
    colors = [GREY if row.name == "untrained" else BLUE for row in rows]
    axes.barh([row.name for row in rows], shares, xerr=[shares - low, high - shares], color=colors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("initializations whose retrained head\nfits all four components, share", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def save_theory(cancellations: Cancellations, counterexample: Counterexample, path: Path) -> None:
    """Write both as JSON."""
    both = {"cancellations": dataclasses.asdict(cancellations), "counterexample": dataclasses.asdict(counterexample)}
    write_json(path, both | {"verdict": counterexample.verdict})


def _check_shares(values: ArrayLike, count: int, name: str) -> np.ndarray:
    shares = np.asarray(values, dtype=float)
    if shares.shape != (count,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"{name} {shares.tolist()} must be {count} numbers, none below 0, that sum to 1.")
    return shares
