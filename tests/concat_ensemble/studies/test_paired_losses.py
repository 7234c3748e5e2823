"""Intervals of paired losses against closed forms, and against simulated models that lose as much as the margin."""

import math

import numpy as np
import pytest
from scipy import stats

from concat_ensemble.studies.paired_losses import max_t_quantile, mean_interval, paired_losses, resampled_losses


@pytest.mark.parametrize("count", [1, 4, 15])
def test_the_quantile_of_independent_losses_is_that_of_the_largest_of_so_many_normals(count):
    rng = np.random.default_rng(0)
    centred = np.linalg.qr(rng.normal(size=(2_000, count)))[0].T  # uncorrelated
    expected = stats.norm.ppf(0.5 + 0.95 ** (1 / count) / 2)
    assert max_t_quantile(centred, 10**6) == pytest.approx(expected, abs=0.07)


def test_the_quantile_of_equal_losses_is_that_of_one():
    centred = np.repeat(np.random.default_rng(0).normal(size=(1, 500)), 9, axis=0)
    assert max_t_quantile(centred, 10**6) == pytest.approx(1.96, abs=0.07)
    assert max_t_quantile(centred, 4) == pytest.approx(stats.t.ppf(0.975, 4), rel=0.08), "of five groups"


def test_an_interval_is_that_of_bonett_and_price():
    """`correct` loses 3 of 100 images to the other and wins 8."""
    correct, other = np.ones(100, bool), np.ones(100, bool)
    other[:8], correct[8:11] = False, False
    losses = paired_losses(correct, [other])
    low, high = losses.interval(0)
    won, lost = 4 / 102, 9 / 102
    half = losses.critical * math.sqrt((won + lost - (lost - won) ** 2) / 102)
    assert losses.values[0] == pytest.approx(0.05) and losses.critical == pytest.approx(1.98, abs=0.07)
    assert (low, high) == pytest.approx((5 / 102 - half, 5 / 102 + half))


def test_no_difference_at_all_still_has_a_width():
    same = np.ones(100, bool)
    low, high = paired_losses(same, [same]).interval(0)
    assert high == pytest.approx(1.98 * math.sqrt(2) / 102, rel=0.05) and low == pytest.approx(-high)


def test_copies_of_a_group_are_one_draw():
    """Ten copies of each of 60 images have the error of 60 images, not that of 600."""
    rng = np.random.default_rng(1)
    correct, other = rng.random(60) < 0.9, rng.random(60) < 0.7
    (alone,) = paired_losses(correct, [other], np.arange(60)).errors
    copies = [np.repeat(one, 10) for one in (correct, other)]
    (grouped,) = paired_losses(copies[0], copies[1:], np.repeat(np.arange(60), 10)).errors
    assert grouped == pytest.approx(np.std(correct.astype(float) - other, ddof=1) / math.sqrt(60))
    assert alone == pytest.approx(grouped, rel=0.05)
    assert paired_losses(copies[0], copies[1:]).errors[0] == pytest.approx(grouped / math.sqrt(10), rel=0.05)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(size=40)
    assert mean_interval(values) == pytest.approx(stats.t.interval(0.95, 39, values.mean(), stats.sem(values)))
    grouped = mean_interval(np.repeat(values, 3), np.repeat(np.arange(40), 3))
    assert grouped == pytest.approx(mean_interval(values))
    assert mean_interval(np.ones(10)) == (1.0, 1.0)


def test_the_images_needed_bring_the_upper_end_to_the_margin():
    """As many times more images of the same kind have an interval that ends there."""
    correct, other = np.ones(200, bool), np.ones(200, bool)
    other[:6], correct[6:11] = False, False
    losses = paired_losses(correct, [other, correct & (np.arange(200) % 5 > 0)])
    times = losses.images_needed(0, 0.02) / 200
    assert 5 < times < 50
    more = [np.tile(one, round(times)) for one in (correct, other)]
    later = paired_losses(more[0], more[1:])
    low, high = later.centres[0], later.centres[0] + losses.critical * later.errors[0]
    assert low < 0.02 and high == pytest.approx(0.02, abs=0.001)
    assert losses.images_needed(1, 0.02) == math.inf, "the loss itself is above the margin"


def test_perfect_copies_need_as_many_images_as_one_win_and_one_loss_do():
    same = np.ones(50, bool)
    losses = paired_losses(same, [same])
    assert losses.images_needed(0, 0.01) == pytest.approx(losses.critical * math.sqrt(2) / 0.01, rel=0.05)


def test_resampled_losses_have_the_error_of_their_resamples_and_never_none():
    labels = np.arange(400) % 2
    samples = np.stack([np.random.default_rng(0).normal(0.1, 0.02, 1_000), np.zeros(1_000)])
    losses = resampled_losses(np.array([0.1, 0.0]), samples, labels)
    assert losses.errors[0] == pytest.approx(0.02, rel=0.05) and losses.errors[1] == pytest.approx(math.sqrt(2) / 402)
    few = resampled_losses(np.array([0.1]), samples[:1], labels, groups=np.arange(400) // 80)
    assert few.critical == pytest.approx(stats.t.ppf(0.975, 4), rel=0.08)


def test_the_luckiest_of_many_is_below_the_margin_no_more_often_than_promised():
    """Twelve models lose 2 points each. The luckiest one's own interval ends below 2 points far too often."""
    margin, rng, alone, at_once = 0.02, np.random.default_rng(0), 0, 0
    for _ in range(200):
        shared = rng.random(600)
        correct = shared < 0.9
        # Each model is wrong on images of its own: it loses 5 and wins 3 of 100.
        others = []
        for _ in range(12):
            chance = rng.random(600)
            others.append(np.where(correct, chance > 0.05 / 0.9, chance < 0.03 / 0.1))
        losses = paired_losses(correct, others)
        at_once += min(losses.interval(k)[1] for k in range(12)) < margin
        alone += (losses.centres + 1.96 * losses.errors).min() < margin
    assert at_once <= 12, "2.5% of 200 are 5; more than 12 have a probability of 0.2%"
    assert alone >= 24
