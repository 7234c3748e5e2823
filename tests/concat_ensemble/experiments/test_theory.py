"""Proposition 2.1 and the counterexample of Figure 2, against naive references and by hand."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import Ridge

from concat_ensemble.experiments.theory import (
    BATCH,
    BOUNDS,
    INITIAL,
    LEARNING_RATE,
    RIDGE,
    WEIGHT_DECAY,
    Distribution,
    cancelling_proportions,
    covariance_forms,
    figure_2_components,
    hidden_features,
    log_slope,
    mixture,
    probe_accuracy,
    resample_sets,
    sample_cancellations,
    train_networks,
)
from concat_ensemble.probes.intervals import central_interval, wilson_interval


def shares(count):
    return st.lists(st.integers(1, 20), min_size=count, max_size=count).map(lambda ints: np.array(ints) / sum(ints))


@st.composite
def distributions(draw):
    count = draw(st.integers(1, 4))
    numbers = st.floats(-3, 3, allow_subnormal=False)
    points = draw(st.lists(st.tuples(numbers, numbers), min_size=count, max_size=count))
    labels = draw(st.lists(st.sampled_from([-1, 1]), min_size=count, max_size=count))
    return Distribution(points, labels, draw(shares(count)))


def both_features(points):
    return np.column_stack([points, np.abs(points[:, 0] - points[:, 1])])


def naive_covariance(distribution, values):
    """The definition, one point at a time, in rationals without rounding."""
    moments = [Fraction(0)] * 4
    for value, label, mass in zip(values, distribution.labels, distribution.masses, strict=True):
        value, label, mass = map(Fraction, (value, label, mass))
        moments = [old + mass * new for old, new in zip(moments, (value * label, value, label, 1), strict=True)]
    return float(moments[0] / moments[3] - moments[1] * moments[2] / moments[3] ** 2)


# --- mixtures --------------------------------------------------------------------------------------------------------


@given(st.lists(distributions(), min_size=1, max_size=4), st.data())
@settings(max_examples=50, deadline=None)
def test_the_form_is_the_covariance_of_the_mixture_from_its_points(components, data):
    proportions = data.draw(shares(len(components)))
    mixed = mixture(components, proportions)
    naive = [naive_covariance(mixed, column) for column in both_features(mixed.points).T]
    forms = covariance_forms(components, both_features)
    assert np.array_equal(forms, forms.swapaxes(1, 2))
    np.testing.assert_allclose(np.einsum("i,fij,j->f", proportions, forms, proportions), naive, atol=1e-14)
    np.testing.assert_allclose(mixed.covariance(both_features), naive, atol=1e-14)


def test_correlation_matches_a_sample_with_repeated_points():
    points, labels, copies = [[0.0, 5.0], [1.0, 5.0], [4.0, 5.0]], [1, -1, 1], [1, 2, 5]
    correlation = Distribution(points, labels, np.array(copies) / 8).correlation(np.asarray)
    sample = np.repeat(np.column_stack([points, labels]), copies, axis=0)
    np.testing.assert_allclose(correlation, [np.corrcoef(sample[:, 0], sample[:, 2])[0, 1], 0], atol=1e-15)


@pytest.mark.parametrize(
    ("points", "labels", "masses", "message"),
    [
        ([0.0, 1.0], [1, -1], [0.5, 0.5], r"points \(2,\) and labels \(2,\) must be \(N, D\)"),
        ([[0.0], [1.0]], [1], [0.5, 0.5], r"labels \(1,\)"),
        ([[0.0], [np.nan]], [1, -1], [0.5, 0.5], "all finite"),
        ([[0.0], [1.0]], [1, -1], [0.5, 0.6], r"masses \[0.5, 0.6\] must be 2 numbers, none below 0, that sum to 1"),
        ([[0.0], [1.0]], [1, -1], [1.5, -0.5], "none below 0"),
        ([[0.0], [1.0]], [1, -1], [np.nan, 1.0], "none below 0"),
        ([[0.0], [1.0]], [1, -1], [1.0], "must be 2 numbers"),
    ],
)
def test_an_invalid_distribution_is_refused(points, labels, masses, message):
    with pytest.raises(ValueError, match=message):
        Distribution(points, labels, masses)


def test_another_number_of_proportions_is_refused():
    with pytest.raises(ValueError, match=r"proportions \[0.5, 0.5\] must be 4 numbers"):
        mixture(figure_2_components(), [0.5, 0.5])


# --- Proposition 2.1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "shares_of_the_second"),
    [
        ([[3, -5], [-5, 3]], [0.25, 0.75]),  # 16 t^2 - 16 t + 3
        ([[1, -1], [-1, 1]], [0.5]),  # (1 - 2t)^2: a double zero
        ([[-1, 0], [0, 1]], [0.5]),  # 2t - 1: no square
        ([[3e-200, -5e-200], [-5e-200, 3e-200]], [0.25, 0.75]),
        ([[0, 1], [1, 0]], [0, 1]),  # at both ends
        ([[0, 0], [0, 1]], [0]),  # t^2: double, at an end
        ([[0, 1e-200], [1e-200, 3e-200]], [0]),  # t (2 + t): the other zero is beyond the segment
        ([[1, 0], [0, 1]], []),  # never
        ([[1, 1], [1, 1]], []),  # constant
        ([[-1, 0], [0, 1 + 1e-9]], [0.499999999875]),  # the textbook formula has 7 digits here
    ],
)
def test_zeros_by_hand(form, shares_of_the_second):
    proportions = cancelling_proportions(np.array(form, dtype=float), [1, 0], [0, 1])
    np.testing.assert_allclose(proportions[:, 1], shares_of_the_second, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(proportions.sum(1), 1)


def test_a_segment_of_zeros_is_refused():
    """Between the first two every mixture cancels; towards the third only the first does, and a point inside."""
    form = np.array([[0.0, 0, -1], [0, 0, 0], [-1, 0, 2]])
    with pytest.raises(
        ValueError, match=r"from \[1.0, 0.0, 0.0\] to \[0.0, 1.0, 0.0\] the covariance is zero everywhere"
    ):
        cancelling_proportions(form, [1, 0, 0], [0, 1, 0])
    np.testing.assert_allclose(cancelling_proportions(form, [1, 0, 0], [0, 0, 1]), [[1, 0, 0], [0.5, 0, 0.5]])
    with pytest.raises(ValueError, match=r"proportions \[1.0, 1.0, 0.0\]"):
        cancelling_proportions(form, [1, 1, 0], [0, 0, 1])


@given(st.lists(distributions(), min_size=2, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_the_proportions_cancel_and_no_change_of_sign_is_missed(components, data):
    start, end = data.draw(shares(len(components))), data.draw(shares(len(components)))
    for j, form in enumerate(covariance_forms(components, both_features)):
        at = [(1 - t) * start + t * end for t in np.linspace(0, 1, 41)]
        values = np.array([p @ form @ p for p in at])
        if np.abs(values).max() < 1e-9:
            continue
        zeros = cancelling_proportions(form, start, end)
        for proportions in zeros:
            mixed = mixture(components, proportions)
            assert abs(naive_covariance(mixed, both_features(mixed.points)[:, j])) < 1e-12
        signs = np.sign(values[np.abs(values) > 1e-9])
        assert (np.diff(signs) != 0).sum() <= len(zeros) <= 2


def test_the_share_of_mixtures_near_zero_falls_in_proportion_to_the_bound():
    cancellations = sample_cancellations(seed=3)
    assert (cancellations.num_mixtures, cancellations.cancelled) == (1_000_000, 0)
    assert cancellations.exact > 100 and cancellations.largest_covariance < 1e-12
    low, high = cancellations.slope_interval
    assert 0.9 < low < cancellations.slope < high < 1.1
    for bound, share in cancellations.within.items():
        low, high = cancellations.intervals[bound]
        assert low < share < high
        # Over a million independent mixtures it would be narrower: those of the same set are alike.
        independent = np.diff(wilson_interval(share, 1_000_000))[0]
        assert high - low > (2 if float(bound) > 1e-3 else 1) * independent


@pytest.mark.slow
def test_intervals_over_sets_cover_the_share_and_the_slope():
    """Of as many sets as are sampled, each with a share in proportion to the bound and a constant of its own, so that
    the slope is 1. Intervals as of a million independent mixtures do not cover the share."""
    runs, rng, bounds = 800, np.random.default_rng(0), np.array(BOUNDS)

    def draw_shares(count):
        return np.minimum(np.outer(rng.gamma(2, 1.5, count), bounds), 1)

    truth, covered, independent = draw_shares(1_000_000).mean(0), np.zeros(len(bounds) + 1), np.zeros(len(bounds))
    for _ in range(runs):
        shares = rng.binomial(1_000, draw_shares(1_000)) / 1_000
        resampled = resample_sets(shares, rng)
        ends = [central_interval(values) for values in (*resampled.T, log_slope(resampled))]
        covered += [low <= true <= high for (low, high), true in zip(ends, (*truth, 1.0), strict=True)]
        ends = [wilson_interval(share, 1_000_000) for share in shares.mean(0)]
        independent += [low <= true <= high for (low, high), true in zip(ends, truth, strict=True)]
    assert covered.min() >= 0.92 * runs and covered.max() <= 0.98 * runs
    assert independent[0] < 0.5 * runs


# --- Figure 2 --------------------------------------------------------------------------------------------------------


def test_the_components_are_as_described_and_one_mixture_cancels_exactly():
    parts = figure_2_components()
    for part in parts:
        assert sorted(part.masses) == [0.25, 0.25, 0.5] and len(np.unique(part.points, axis=0)) == 3
    mixed, corners = mixture(parts, [0.25] * 4), np.array([part.points[0] for part in parts])
    here = (mixed.points[:, None] == corners).all(-1)
    np.testing.assert_allclose((mixed.masses * mixed.labels) @ here / (mixed.masses @ here), [0.5, -0.5, 0.5, -0.5])

    def second_corner(points):
        return (points == corners[1]).all(1)[:, None].astype(float)

    # E[phi Y] - E[phi] E[Y] = (2t - 1) / 4 - 1/8 from the first component to the third: 0 at t = 3/4
    (form,) = covariance_forms(parts, second_corner)
    np.testing.assert_allclose(
        cancelling_proportions(form, [1, 0, 0, 0], [0, 0, 1, 0]), [[0.25, 0, 0.75, 0]], atol=1e-15
    )
    np.testing.assert_allclose(mixed.correlation(second_corner), -1 / np.sqrt(12))


def test_training_is_sgd_on_the_squared_error():
    """Against autograd, for one network and the same random numbers."""
    mixed, rng = mixture(figure_2_components(), [0.4, 0.3, 0.2, 0.1]), np.random.default_rng(5)
    weights = torch.tensor(rng.normal(scale=INITIAL, size=(1, 3, 2))[0], requires_grad=True)
    head, constant = torch.tensor(rng.normal(scale=INITIAL, size=(1, 3))[0], requires_grad=True), torch.zeros(1)
    constant = constant.double().requires_grad_()
    points, labels = torch.tensor(mixed.points), torch.tensor(mixed.labels)
    for step in range(50):
        counts = torch.tensor(rng.multinomial(BATCH, mixed.masses, size=1)[0])
        outputs = (points @ weights.T).relu() ** 2 @ head + constant
        decay = WEIGHT_DECAY / 2 * (weights.square().sum() + head.square().sum())
        ((counts * (outputs - labels) ** 2).sum() / BATCH / 2 + decay).backward()
        with torch.no_grad():
            for parameter in (weights, head, constant):
                parameter -= LEARNING_RATE * min(1, 2 * (1 - step / 50)) * parameter.grad
                parameter.grad = None
    trained = train_networks(mixed, 1, width=3, steps=50, rng=np.random.default_rng(5))
    np.testing.assert_allclose(trained[0], weights.detach().numpy(), rtol=1e-9)


def test_a_retrained_head_is_a_ridge_regression():
    rng, mixed = np.random.default_rng(0), mixture(figure_2_components(), [0.4, 0.3, 0.2, 0.1])
    features = hidden_features(rng.normal(size=(30, 2, 2)), mixed.points)
    for phi, accuracy in zip(features, probe_accuracy(features, mixed), strict=True):
        trace = (mixed.masses @ (phi - mixed.masses @ phi) ** 2).sum()
        ridge = Ridge(alpha=RIDGE * trace).fit(phi, mixed.labels, sample_weight=mixed.masses)
        assert accuracy == pytest.approx(mixed.masses @ (np.sign(ridge.predict(phi)) == mixed.labels))
    collapsed = np.array([[[2.0], [0.0], [0.0]], [[1.0], [1.0], [1.0]]])  # two corners alike; all alike
    part = figure_2_components()[0]
    np.testing.assert_allclose(probe_accuracy(collapsed, part), [0.75, 0.75])


def test_the_command_shows_that_a_mixture_drops_what_a_component_needs(run, tmp_path):
    code, out, err = run("theory", "--initialisations", "12")
    assert (
        (code, err) == (0, "")
        and "in 1,000,000 mixtures, the share within a bound of zero falls with the bound to the power of 1.0" in out
        and "written: theory/theory.json" in out
    )
    assert Image.open(tmp_path / "theory" / "theory.png").size == (1800, 660)
    content = json.loads((tmp_path / "theory" / "theory.json").read_text())
    assert content["verdict"] in out
    direct, single, wider, one, two, four, untrained = content["counterexample"]["rows"]
    assert direct["all_fitted"] == untrained["all_fitted"] == 12
    assert max(row["all_fitted"] for row in (single, wider, one)) <= 2
    assert two["all_fitted"] <= four["all_fitted"] and four["all_fitted"] >= 7, "1 - 2^(1-4) of 12 are 10.5"
    assert single["features"] < 2.2 < 3.5 < direct["features"]
    assert all(abs(row["mixture"] - 0.75) < 0.02 for row in content["counterexample"]["rows"])
    code, _, err = run("theory")
    assert (
        code == 2 and err == "error: theory/theory.json is there already; add --overwrite or name another --output.\n"
    )
    code, _, err = run("theory", "--output", "theory/theory.png")
    assert code == 2 and "cannot be written (Not a directory)" in err and len(err.splitlines()) == 1
