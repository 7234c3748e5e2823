"""Section 2 of "These Are Not All the Features You Are Looking For" (arXiv 2506.18221) as computations.

*Proposition 2.1*: a feature that correlates with the label in a component does in almost every mixture. Its covariance is quadratic in the proportions,
so those that cancel it are found exactly.

*Figure 2*: that is no comfort, as a network need not keep what correlates. The paper's are four sub-distributions of three points each, one of double
mass, the labels +1 and -1, and the statement: a sparse solution on their mixture needs fewer features than the four direct solutions together, so that
some component loses one that it needs. Reconstructed here are the coordinates, which point bears which label, equal proportions, and the network.

Component i has the double mass on corner i of a square, and its two neighbours. Corners are labelled + - + - in turn, but the one before i bears the
other label in component i. So each component alone needs one feature, of the corner after i. In the mixture each corner has its majority, + - + -, and
a minority of a quarter. Features of two opposite corners and a constant describe the majorities. Then the two other corners look alike, and the two
components that tell them apart are lost. Either pair will do, by initialisation, so k networks side by side have both with probability 1 - 2^(1-k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.reporting.figures import BLUE, GREY, ORANGE

TOLERANCE = 1e-12  # of the largest coefficient: what counts as zero
MEMBERS, WIDTH, STEPS = 4, 16, 4_000  # of a concatenation; hidden units and training steps of each
LEARNING_RATE, WEIGHT_DECAY, BATCH, INITIAL = 0.5, 0.01, 32, 0.1
NEGLIGIBLE, RIDGE = 0.05, 1e-3  # singular values, of the largest; a probe's penalty, of the features' total variance
Features = Callable[[np.ndarray], np.ndarray]  # (N, D) points -> (N, F)


@dataclass
class Distribution:
    """A discrete distribution of labelled points: (N, D) points, of which one may occur several times, (N,) labels, and (N,) masses that sum to 1;
    ValueError where shapes do not agree, a number is not finite, or masses are none."""

    points: np.ndarray
    labels: np.ndarray
    masses: np.ndarray

    def __post_init__(self):
        self.points, self.labels = np.asarray(self.points, dtype=float), np.asarray(self.labels, dtype=float)
        shape, finite = self.points.shape, np.isfinite(self.points).all() and np.isfinite(self.labels).all()
        if len(shape) != 2 or self.labels.shape != shape[:1] or not finite:
            raise ValueError(
                f"points {shape} and labels {self.labels.shape}: give (N, D) points, N labels, all finite."
            )
        self.masses = _shares(self.masses, len(self.points), "masses")

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


def mixture(components: Sequence[Distribution], proportions: Sequence[float]) -> Distribution:
    """P_mix = sum_i lambda_i P_i (section 2); ValueError when proportions are not one each, negative, or do not sum to 1."""
    shares = _shares(proportions, len(components), "proportions")
    parts = [(part.points, part.labels, share * part.masses) for share, part in zip(shares, components, strict=True)]
    return Distribution(*map(np.concatenate, zip(*parts, strict=True)))


def covariance_forms(components: Sequence[Distribution], features: Features) -> np.ndarray:
    """(F, n, n): symmetric Q with lambda' Q lambda = Cov_mix[phi, Y] for each feature and all proportions lambda.

    Expectations under a mixture are linear in lambda, and lambda sums to 1: with c_i = E_i[phi Y], m_i = E_i[phi] and y_i = E_i[Y], Q_ij is the mean
    of c_i - m_i y_j and c_j - m_j y_i.
    """
    moments = []
    for part in components:
        values = features(part.points)
        moments.append(part.masses @ np.column_stack([part.labels, values, values * part.labels[:, None]]))
    labels, means, products = np.split(np.array(moments), [1, 1 + values.shape[1]], axis=1)
    halves = products.T[:, :, None] - means.T[:, :, None] * labels[:, 0]
    return (halves + halves.swapaxes(1, 2)) / 2


def cancelling(form: np.ndarray, start: Sequence[float], end: Sequence[float]) -> np.ndarray:
    """(R, n): all proportions from `start` to `end` at which the covariance is zero, in this order; R is 0, 1 or 2.

    For two components, from (1, 0) to (0, 1), these are all there are. For more the zeros are a quadric in the simplex, and segments cut it in such
    points. Zeros closer than about 1e-6 count as one. `form` is one of `covariance_forms`, (n, n). ValueError when the ends are no proportions, or the
    covariance is zero all along, so that every mixture would be an answer.
    """
    start, end = (_shares(proportions, len(form), "proportions") for proportions in (start, end))
    a, b, c = start @ form @ start, start @ form @ end, end @ form @ end  # (1-t)^2 a + 2t(1-t) b + t^2 c
    scale = np.abs([a, b, c]).max()
    if scale <= TOLERANCE * np.abs(form).max():
        raise ValueError(f"from {start.tolist()} to {end.tolist()} the covariance is zero all along; name other ends.")
    a, b, c = np.array([a, b, c]) / scale
    square, half = a - 2 * b + c, b - a  # t^2 square + 2t half + a
    inside = half**2 - square * a
    root = np.sqrt(inside) if inside > TOLERANCE else 0.0
    stable = -half - np.copysign(root, half)  # adds numbers of one sign: nothing cancels
    found = [np.clip(over / under, 0, 1) for over, under in ((stable, square), (a, stable)) if under != 0]
    zeros = [t for t in found if abs((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c) <= TOLERANCE]
    times = np.unique(zeros if root else zeros[:1])[:, None]
    return (1 - times) * start + times * end


@dataclass
class Cancellations:
    """Proposition 2.1 on random components: how often random proportions cancel, and those that do, found exactly."""

    draws: int
    cancelled: int
    most_that_cancel: float  # upper end of the 95% interval of their share
    within: dict[str, float]  # share of draws with a smaller covariance than this
    exact: int  # proportions found that cancel, on one random segment for each set of components
    largest_covariance: float  # of these mixtures, taken from their points


def draw_cancellations(*, seed: int = 0) -> Cancellations:
    """A million mixtures: 1,000 proportions, uniform on the simplex, of each of 1,000 sets of four components, at least one of them correlated. A
    component is three normal numbers with random masses and labels of +1 or -1; the number is the feature."""
    rng, drawn, zeros = np.random.default_rng(seed), [], []
    while len(drawn) < 1_000:
        parts = [Distribution(rng.normal(size=(3, 1)), rng.choice([-1, 1], 3), rng.dirichlet([1] * 3)) for _ in range(4)]  # fmt: skip
        (form,) = covariance_forms(parts, np.asarray)
        if np.abs(np.diag(form)).max() > 1e-6:
            proportions = rng.dirichlet([1] * 4, 1_000)
            drawn.append(np.abs(np.einsum("ri,ij,rj->r", proportions, form, proportions)))
            for found in cancelling(form, *rng.dirichlet([1] * 4, 2)):
                zeros.append(abs(mixture(parts, found).covariance(np.asarray)[0]))
    drawn = np.concatenate(drawn)
    within = {f"{bound:g}": float((drawn < bound).mean()) for bound in (0.1, 0.01, 1e-3, 1e-4, 1e-5)}
    cancelled, most = int((drawn <= TOLERANCE).sum()), wilson_interval((drawn <= TOLERANCE).mean(), len(drawn))[1]
    return Cancellations(len(drawn), cancelled, float(most), within, len(zeros), float(max(zeros)))


def figure_2() -> list[Distribution]:
    """The four components as reconstructed (see the top), to be mixed equally: majorities that differ take more features to describe, so less is lost."""
    corners, majority = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / np.sqrt(2), np.array([1, -1, 1, -1])
    around = [[i, (i + 1) % 4, i - 1] for i in range(4)]
    return [Distribution(corners[three], majority[three] * [1, 1, -1], [0.5, 0.25, 0.25]) for three in around]


def train(distribution: Distribution, count: int, width: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """(count, width, D): hidden weights of `count` networks c + sum_j gamma_j max(w_j x, 0)^2, trained independently by SGD; no steps, untrained.

    Squared error, batches of 32, weight decay, a rate that falls to zero over the second half. Of squared units the strongest grow first, and the others
    decay once nothing is left to fit: the sparsity bias that the paper speaks of. (Plain ReLUs of this width grow alike: so trained, they lost no
    component.) Heads are not returned: they are retrained.
    """
    points, place = np.unique(distribution.points, axis=0, return_inverse=True)
    at = np.eye(len(points))[place.ravel()]  # (N, points): one with two labels is computed once
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
    """(count, N, width): phi_j(x) = max(w_j x, 0)^2."""
    return np.maximum(points @ weights.swapaxes(1, 2), 0) ** 2


def probe_accuracy(features: np.ndarray, distribution: Distribution) -> np.ndarray:
    """(count,): share of the mass whose sign a retrained head gets right (section 2, linear probing): ridge regression with a constant on
    (count, N, width) features as they are. Standardised, what has all but decayed would be back."""
    masses, labels = distribution.masses[:, None], distribution.labels
    centred, mean = features - (masses * features).sum(1, keepdims=True), distribution.masses @ labels
    gram = centred.swapaxes(1, 2) @ (masses * centred)
    strength = RIDGE * np.trace(gram, axis1=1, axis2=2) + np.finfo(float).tiny  # features may all be constant
    moments = (masses * centred).swapaxes(1, 2) @ (labels - mean)
    heads = np.linalg.solve(gram + strength[:, None, None] * np.eye(gram.shape[1]), moments[:, :, None])
    return (np.sign((centred @ heads)[:, :, 0] + mean) == np.sign(labels)) @ distribution.masses


@dataclass
class Row:
    """Networks of one kind over all initialisations, with heads retrained on each distribution."""

    name: str
    width: int
    steps: int  # of all its networks together
    features: float  # in use: their rank on the four corners, on average; units that are alike count once, decayed ones not at all
    mixture: float  # accuracy on average; no more than 0.75 is possible
    components: list[float]  # accuracy on each, on average
    all_fitted: int  # initialisations in which every component is fitted without an error
    interval: tuple[float, float]  # of their share: Wilson's, 95%


@dataclass
class Counterexample:
    """Figure 2, trained: networks on each component and on the mixture, and what retrained heads make of them."""

    initialisations: int
    seed: int
    correlations: list[float]  # of each corner's feature with the label, in the mixture: none is zero
    rows: list[Row]
    directions: dict[str, list[list[float]]]  # hidden weights in the first initialisation

    @property
    def verdict(self) -> str:
        """What came out, in words."""
        direct, single, short, random = (self.rows[k] for k in (0, 1, -2, -1))
        recovered = "recovered" if short.interval[0] > single.interval[1] else "not surely recovered"
        return (
            f"Trained on the mixture, a network uses {single.features:.2f} features, the direct solutions together {direct.features:.2f}, each of them correlated with "
            f"the label in the mixture too ({min(map(abs, self.correlations)):.2f}). A retrained head fits every component in {single.all_fitted} of {self.initialisations} "
            f"initialisations, direct training in {direct.all_fitted}. {MEMBERS} networks of a quarter of the steps each, side by side, do in {short.all_fitted}: at the same "
            f"cost of training, what was lost is {recovered}. As many untrained units do in {random.all_fitted}: on three points width is enough, so this shows what training on a "
            "mixture drops, not that trained features beat random ones."
        )


def train_counterexample(*, initialisations: int = 100, steps: int = STEPS, seed: int = 0) -> Counterexample:
    """Direct solutions of `steps`; on the mixture one network of four times these, one four times as wide (and as dear), and short trainings of `steps`
    side by side; untrained units as many."""
    parts, count, wide, rng = figure_2(), initialisations, MEMBERS * WIDTH, np.random.default_rng(seed)
    mixed, corners = mixture(parts, [0.25] * 4), np.concatenate([part.points[:1] for part in parts])
    direct = [train(part, count, WIDTH, steps, rng) for part in parts]
    single, wider = (train(mixed, count, width, MEMBERS * steps, rng) for width in (WIDTH, wide))
    short = train(mixed, MEMBERS * count, WIDTH, steps, rng).reshape(count, wide, -1)
    kinds = [
        ("direct, one network a component", direct, MEMBERS),
        ("mixture, one network", [single], MEMBERS),
        (f"mixture, one network {MEMBERS} times as wide", [wider], MEMBERS),
        *((f"mixture, {k} of {MEMBERS} short trainings", [short[:, : k * WIDTH]], k) for k in (1, 2, MEMBERS)),
        ("untrained", [train(mixed, count, wide, 0, rng)], 0),
    ]
    rows = []
    for name, weights, times in kinds:  # weights: probed on each component its own, or one for all
        together, own = np.concatenate(weights, axis=1), weights * (len(parts) // len(weights))
        right = np.array([probe_accuracy(hidden_features(w, p.points), p) for w, p in zip(own, parts, strict=True)])
        used = np.linalg.matrix_rank(hidden_features(together, corners), rtol=NEGLIGIBLE).mean()
        on_mixture = probe_accuracy(hidden_features(together, mixed.points), mixed).mean()
        fitted = int((right > 1 - TOLERANCE).all(0).sum())
        rows.append(Row(name, together.shape[1], times * steps, float(used), float(on_mixture), right.mean(1).tolist(),
                        fitted, wilson_interval(fitted / count, count)))  # fmt: skip
    first = {f"component {i + 1}": weights[0].tolist() for i, weights in enumerate(direct)}
    first |= {"mixture, one network": single[0].tolist(), f"mixture, {MEMBERS} short trainings": short[0].tolist()}
    correlations = mixed.correlation(lambda points: hidden_features(corners[None], points)[0]).tolist()
    return Counterexample(count, seed, correlations, rows, first)


def plot_counterexample(found: Counterexample, path: Path) -> None:
    """Figure 2 with masses as areas and hidden weights as lines, and how often every component is fitted."""
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    (a, b, c, d, e, f), parts = found.directions, figure_2()
    panels = figure.subplot_mosaic([[a, b, e, "rows"], [c, d, f, "rows"]], width_ratios=[1, 1, 1, 1.3])
    for name, part in zip(found.directions, [*parts, *[mixture(parts, [0.25] * 4)] * 2], strict=True):
        cells, place = np.unique(np.column_stack([part.labels, part.points]), axis=0, return_inverse=True)
        masses = np.bincount(place.ravel(), part.masses)
        order = np.argsort(-masses)  # a minority is drawn on the majority
        colors = np.where(cells[order, 0] > 0, BLUE, ORANGE)
        panels[name].scatter(*cells[order, 1:].T, s=1500 * masses[order], color=colors)
        for x, y in found.directions[name]:
            panels[name].plot([0, x], [0, y], color="black", linewidth=2, zorder=3)
        panels[name].set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")
        panels[name].set_title(name, fontsize=9)
    shares = np.array([row.all_fitted / found.initialisations for row in found.rows])
    low, high = np.array([row.interval for row in found.rows]).T
    colors = [GREY if row.name == "untrained" else BLUE for row in found.rows]
    panels["rows"].barh([row.name for row in found.rows], shares, xerr=[shares - low, high - shares], color=colors, capsize=3)  # fmt: skip
    panels["rows"].invert_yaxis()
    panels["rows"].set_xlabel("initialisations whose retrained head\nfits all four components, share", fontsize=9)
    panels[d].set_xlabel("blue: +1, orange: -1, area: mass, lines: hidden weights", fontsize=8)
    panels["rows"].spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def save_theory(cancellations: Cancellations, counterexample: Counterexample, path: Path) -> None:
    """Write both as JSON."""
    both = {"cancellations": dataclasses.asdict(cancellations), "counterexample": dataclasses.asdict(counterexample)}
    write_json(path, both | {"verdict": counterexample.verdict})


def _shares(values: Sequence[float], count: int, name: str) -> np.ndarray:
    shares = np.asarray(values, dtype=float)
    if shares.shape != (count,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"{name} {shares.tolist()}: give {count} numbers, none below 0, that sum to 1.")
    return shares
