"""Intervals over repeats and images, against scipy and against simulations with a known truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from concat_ensemble.probes.repeats import (
    adjust_p_values,
    estimate_over_repeats,
    estimate_over_repeats_and_images,
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
