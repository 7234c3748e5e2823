import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from concat_ensemble.probes.intervals import bootstrap_intervals, paired_difference, t_interval, wilson_interval
from concat_ensemble.probes.metrics import ProbeMetrics, calibration_error


def scores_for(predictions, classes):
    return np.eye(classes)[predictions]


def test_metrics_by_hand():
    """Labels 0 0 0 1 1 2, predictions 0 0 1 1 2 2: 4 of 6 are correct. By class 2/3, 1/2, 1/1. F1 2*2/(3+2),
    2*1/(2+2), 2*1/(1+2)."""
    metrics = ProbeMetrics().compute(predictions=scores_for([0, 0, 1, 1, 2, 2], 3), references=[0, 0, 0, 1, 1, 2])
    assert metrics == {
        "top1": pytest.approx(4 / 6),
        "mean_per_class": pytest.approx((2 / 3 + 1 / 2 + 1) / 3),
        "macro_f1": pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3),
        "calibration_error": pytest.approx(4 / 6 - np.e / (np.e + 2)),
    }


def test_top5_is_there_with_more_than_five_classes():
    scores = np.tile([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], (4, 1))  # class 5 has the lowest score in each row
    metrics = ProbeMetrics().compute(predictions=scores, references=[0, 4, 5, 5])
    assert (metrics["top1"], metrics["top5"]) == (0.25, 0.5)


def test_classes_without_labels_do_not_count_in_the_mean():
    """Classes 0 and 2 occur, and one row of each is correct; class 1 is predicted but never a label."""
    metrics = ProbeMetrics().compute(predictions=scores_for([0, 1, 2, 1], 3), references=[0, 0, 2, 2])
    assert metrics["mean_per_class"] == 0.5 and metrics["top1"] == 0.5


def test_wilson_by_hand():
    """z^2 = 3.8415. For 50 of 100 the half-width is 1.96 / 1.038415 * sqrt(0.0025 + 3.8415 / 40000). For 0 of 10 the
    upper end is z^2 / (10 + z^2)."""
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_is_the_formula_and_stays_within_0_and_1(number, part):
    """Wilson 1927, with z = 1.959964 as version 0.1.0 had it: stored intervals stay the same."""
    count, z = round(part * number), 1.959964
    share = count / number
    center = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    low, high = wilson_interval(share, number)
    assert (low, high) == pytest.approx((max(0, center - half), min(1, center + half)), abs=1e-12)
    assert 0 <= low <= share <= high <= 1


def test_t_interval_by_hand():
    """Mean 0.8, standard deviation 0.1, t(2 degrees of freedom) = 4.302653: half-width 4.302653 * 0.1 / sqrt 3."""
    assert t_interval(np.array([0.7, 0.8, 0.9])) == pytest.approx((0.551586, 1.048414), abs=1e-6)
    assert t_interval(np.array([0.5, 0.5, 0.5])) == (0.5, 0.5)


def test_calibration_error_by_hand():
    """Four images at 0.9, three correct: a gap of 0.15; one at 0.6, correct: 0.4. The mean is (4 * 0.15 + 0.4) / 5."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    assert calibration_error(probabilities, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.2)


@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.9]))
def test_the_bootstrap_interval_of_top1_is_nearly_wilsons(seed, share):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 2000)
    predictions = np.where(rng.random(2000) < share, labels, (labels + 1) % 5)
    intervals = bootstrap_intervals(predictions, labels)
    assert intervals["top1"] == pytest.approx(wilson_interval(float(np.mean(predictions == labels)), 2000), abs=0.006)
    metrics = ProbeMetrics().compute(predictions=scores_for(predictions, 5), references=labels)
    for name, (low, high) in intervals.items():
        assert low < metrics[name] < high


def test_the_bootstrap_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    predictions = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 3, 200))
    resampled = []
    for _ in range(2000):
        at = rng.integers(0, 200, 200)
        resampled.append(f1_score(labels[at], predictions[at], average="macro"))
    assert bootstrap_intervals(predictions, labels)["macro_f1"] == pytest.approx(
        np.percentile(resampled, [2.5, 97.5]), abs=0.01
    )


def test_paired_difference_is_mcnemars_test():
    """30 wins and 10 losses of 1,000: p is twice the chance of at most 10 heads in 40; the deviation is sqrt(40 - 0.4)
    / 1,000."""
    correct, other = np.zeros(1000, bool), np.zeros(1000, bool)
    correct[:530], other[30:540] = True, True
    gap, (low, high), p = paired_difference(correct, other)
    assert gap == 0.02 and p == pytest.approx(2 * stats.binom.cdf(10, 40, 0.5))
    assert (low, high) == pytest.approx((0.02 - 1.96 * 0.0063, 0.02 + 1.96 * 0.0063), abs=0.0015)
    assert paired_difference(correct, correct) == (0.0, (0.0, 0.0), 1.0)
