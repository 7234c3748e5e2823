"""Intervals over repeats and images, against scipy and against simulations with a known truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.probes.repeats import (
    adjust_p_values,
    estimate_over_repeats,
    estimate_over_repeats_and_images,
    mean_squares,
)

TRUTH, RUNS = 0.05, 400


def draw_differences(rng, repeats, images, *, between_repeats, between_images):
    """(repeats, images) differences of correctness, -1, 0 or 1, with a mean of TRUTH over all repeats and images."""
    expected = TRUTH + rng.normal(0, between_repeats, (repeats, 1)) + rng.normal(0, between_images, images)
    expected = np.clip(expected, -0.9, 0.9)
    signs = np.where(rng.random((repeats, images)) < np.abs(expected), np.sign(expected), 0)
    other = (rng.random((repeats, images)) < 0.08) * rng.choice([-1, 1], (repeats, images))
    return np.clip(np.where(signs == 0, other, signs), -1, 1)


def coverage(estimate, repeats, images, **spread):
    rng, covered = np.random.default_rng(1), 0
    truth = np.mean([draw_differences(rng, 50, 2_000, **spread).mean() for _ in range(40)])
    for _ in range(RUNS):
        low, high = estimate(draw_differences(rng, repeats, images, **spread)).interval
        covered += low <= truth <= high
    return covered / RUNS


@pytest.mark.parametrize(
    "spread",
    [
        {"between_repeats": 0.02, "between_images": 0.15},
        {"between_repeats": 0.03, "between_images": 0.3},
        {"between_repeats": 0.02, "between_images": 0.0},
        {"between_repeats": 0.0, "between_images": 0.3},
    ],
)
@pytest.mark.parametrize(("repeats", "images"), [(8, 450), (4, 200)])
def test_the_interval_over_repeats_and_images_covers_the_truth(repeats, images, spread):
    assert 0.92 <= coverage(estimate_over_repeats_and_images, repeats, images, **spread) <= 0.98


@pytest.mark.parametrize("repeats", [3, 8])
def test_students_interval_covers_the_mean_of_independent_repeats(repeats):
    rng, covered = np.random.default_rng(repeats), 0
    for _ in range(200):
        low, high = estimate_over_repeats(rng.normal(TRUTH, 0.03, repeats)).interval
        covered += low <= TRUTH <= high
    assert 0.92 <= covered / 200 <= 0.98


@pytest.mark.parametrize(
    ("share", "images", "repeats"), [(0.9, 270, 4), (0.97, 88, 4), (0.97, 270, 3), (0.99, 270, 4), (0.995, 270, 4)]
)
def test_the_interval_of_a_share_near_1_covers_it(share, images, repeats):
    """Of repeats with networks and test images of their own; some have all images right in all of them."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(RUNS):
        of_networks = rng.beta(300 * share, 300 * (1 - share), repeats)
        shares = rng.binomial(images, of_networks) / images
        low, high = estimate_over_repeats(shares, images * repeats).share_interval
        covered += low <= share <= high
    assert 0.92 <= covered / RUNS <= 0.98


@pytest.mark.parametrize("share", [0.99, 0.995, 0.998])
def test_all_images_right_in_all_repeats_is_no_certainty(share):
    """In up to half of such studies nothing spreads, and an interval of width 0 would be wrong in all of these. The
    other ones are wide, so that more than 95% cover."""
    rng, covered, covered_if_of_width_0, without_spread = np.random.default_rng(0), 0, 0, 0
    for _ in range(200):
        shares = rng.binomial(88, share, 3) / 88
        estimate = estimate_over_repeats(shares, 264)
        low, high = estimate.share_interval
        covered += low <= share <= high
        narrow_low, narrow_high = estimate_over_repeats(shares).share_interval
        covered_if_of_width_0 += narrow_low <= share <= narrow_high
        without_spread += not estimate.error
    assert covered / 200 >= 0.92 and covered_if_of_width_0 <= covered - 0.8 * without_spread
    assert without_spread > 5


def test_images_that_are_all_right_in_all_repeats_have_wilsons_interval_over_them():
    """Crossed repeats have 450 different images, repeats of their own four times as many."""
    estimate = estimate_over_repeats_and_images(np.ones((4, 450)))
    assert estimate.share_interval == wilson_interval(1.0, 450)
    assert estimate_over_repeats(np.ones(4), 1_800).share_interval == wilson_interval(1.0, 1_800)


@pytest.mark.parametrize("difference", [0.0, 0.02])
def test_two_one_sided_tests_at_the_margin_are_wrong_in_5_of_100(difference):
    """A difference as large as the margin is called parity in 5%; none at all in more where there is the power."""
    rng, margin, called = np.random.default_rng(0), 0.02, 0
    for _ in range(1_000):
        called += estimate_over_repeats(rng.normal(difference, 0.01, 8)).equivalence_p_value(margin) < 0.05
    assert called / 1_000 == pytest.approx(0.05, abs=0.02) if difference == margin else called > 900


def test_holms_adjustment_keeps_the_chance_of_any_false_claim_at_5_of_100():
    rng, false_claims = np.random.default_rng(0), 0
    for _ in range(RUNS):
        p_values = [estimate_over_repeats(rng.normal(mean, 1, 8)).p_value() for mean in (0, 0, 0, 0, 3)]
        false_claims += min(adjust_p_values(p_values)[:4]) < 0.05
    assert 0.02 < false_claims / RUNS < 0.08


def test_mean_squares_are_those_of_scipys_analyses_of_variance():
    """Of one factor at a time, where the other is part of the rest."""
    values = np.random.default_rng(0).normal(size=(5, 40)) + np.linspace(0, 1, 40) + np.arange(5)[:, None] / 4
    of_repeats, of_images, of_rest = mean_squares(values)
    rest = 4 * 39 * of_rest
    assert stats.f_oneway(*values).statistic == pytest.approx(of_repeats / ((39 * of_images + rest) / 195))
    assert stats.f_oneway(*values.T).statistic == pytest.approx(of_images / ((4 * of_repeats + rest) / 160))


def test_students_interval_is_too_narrow_where_images_are_shared():
    spread = {"between_repeats": 0.0, "between_images": 0.3}
    assert coverage(lambda values: estimate_over_repeats(values.mean(1)), 8, 450, **spread) < 0.85


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.floats(0.001, 0.5))
def test_students_estimate_is_scipys(values, margin):
    estimate = estimate_over_repeats(values)
    if not estimate.error > 1e-9:
        return
    expected = stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.95)
    assert estimate.interval == pytest.approx((interval.low, interval.high))
    assert estimate.p_value() == pytest.approx(expected.pvalue)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert estimate.equivalence_p_value(margin) == pytest.approx(max(above, below))


def test_images_that_favour_neither_system_leave_students_estimate():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 1)) + np.tile([0.5, -0.5], (6, 20)) * rng.choice([-1, 1], (6, 40))
    values -= values.mean(0) - values.mean()  # all images have the same mean
    estimate, students = estimate_over_repeats_and_images(values), estimate_over_repeats(values.mean(1))
    assert (estimate.mean, estimate.error, estimate.freedom) == pytest.approx(
        (students.mean, students.error, students.freedom)
    )


def test_equal_repeats_are_judged_by_their_images():
    row = np.random.default_rng(0).choice([-1, 0, 1], 300)
    estimate = estimate_over_repeats_and_images(np.tile(row, (5, 1)))
    assert estimate.error == pytest.approx(row.std(ddof=1) / np.sqrt(300)) and estimate.freedom == np.inf


def test_the_interval_of_a_share_by_hand():
    """Mean 0.9, standard error 0.1 / sqrt 3, t = 4.302653: logit 2.197225 +- 4.302653 * 0.057735 / 0.09 = 2.760154."""
    low, high = estimate_over_repeats([0.8, 0.9, 1.0]).share_interval
    assert low == pytest.approx(1 / (1 + math.exp(2.760154 - 2.197225)), abs=1e-5)
    assert high == pytest.approx(1 / (1 + math.exp(-2.760154 - 2.197225)), abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_the_interval_of_a_share_stays_within_0_and_1_around_the_mean(values):
    low, high = estimate_over_repeats(values).share_interval
    assert 0 <= low <= np.mean(values) + 1e-12 and np.mean(values) - 1e-12 <= high <= 1


def test_shares_that_are_1_up_to_rounding_have_an_interval():
    """scikit-learn's AUROC of perfect scores is often 0.9999999999999999."""
    low, high = estimate_over_repeats([0.9999999999999999, 1.0]).share_interval
    assert 1 - 1e-12 < low <= high <= 1


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_equal_shares_have_the_interval_of_width_0(value):
    assert estimate_over_repeats([value] * 3).share_interval == pytest.approx((value, value))


def test_no_spread_says_nothing():
    estimate = estimate_over_repeats_and_images(np.full((3, 4), 0.5))
    assert estimate.interval == (-np.inf, np.inf) and estimate.p_value() == estimate.equivalence_p_value(0.6) == 1


@pytest.mark.parametrize("values", [[0.7 - 0.5, 0.8 - 0.6], [0.1 + 0.2, 0.3], [0.5, 0.5]])
def test_spread_of_rounding_alone_is_no_spread(values):
    """0.7 - 0.5 and 0.8 - 0.6 differ in their last digits; an interval of that width would be found beyond chance."""
    estimate = estimate_over_repeats(values)
    assert estimate.interval == (-np.inf, np.inf) and estimate.p_value() == 1
    assert estimate.share_interval == (estimate.mean, estimate.mean)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1), (2, 2, 2)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match="at least two repeats and two images"):
        estimate_over_repeats_and_images(np.zeros(shape))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_adjustment_is_the_closed_test_with_bonferroni(p_values):
    number = range(len(p_values))
    subsets = [set(each) for size in number for each in itertools.combinations(number, size + 1)]
    closed = [
        max(min(1, len(each) * min(p_values[k] for k in each)) for each in subsets if claim in each)
        for claim in number
    ]
    assert adjust_p_values(p_values) == pytest.approx(closed)
