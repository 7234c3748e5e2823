import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from concat_ensemble.probes.intervals import bootstrap_intervals, paired_difference, wilson_interval
from concat_ensemble.probes.metrics import ProbeMetrics, calibration_error


def scores_for(chosen, classes):
    return np.eye(classes)[chosen]


def test_by_hand():
    """Truth 0 0 0 1 1 2, chosen 0 0 1 1 2 2. Right: 4 of 6. By class: 2/3, 1/2, 1/1. F1: 2*2/(3+2), 2*1/(2+2), 2*1/(1+2)."""
    found = ProbeMetrics().compute(predictions=scores_for([0, 0, 1, 1, 2, 2], 3), references=[0, 0, 0, 1, 1, 2])
    assert found == {
        "top1": pytest.approx(4 / 6),
        "mean_per_class": pytest.approx((2 / 3 + 1 / 2 + 1) / 3),
        "macro_f1": pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3),
        "calibration_error": pytest.approx(4 / 6 - np.e / (np.e + 2)),
    }


def test_top5_is_there_with_more_than_five_classes():
    scores = np.tile([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], (4, 1))  # class 5 comes last in every row
    found = ProbeMetrics().compute(predictions=scores, references=[0, 4, 5, 5])
    assert (found["top1"], found["top5"]) == (0.25, 0.5)


def test_classes_that_the_test_lacks_do_not_count_against_the_mean():
    """Classes 0 and 2 occur, one of each right; class 1 is chosen but never true."""
    found = ProbeMetrics().compute(predictions=scores_for([0, 1, 2, 1], 3), references=[0, 0, 2, 2])
    assert found["mean_per_class"] == 0.5 and found["top1"] == 0.5


def test_wilson_by_hand():
    """z^2 = 3.8415. Of 100 half: half-width 1.96 / 1.038415 * sqrt(0.0025 + 3.8415 / 40000). Of 10 none: z^2 / (10 + z^2) above."""
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_is_scipys_and_stays_within_0_and_1(number, part):
    count = round(part * number)
    low, high = wilson_interval(count / number, number)
    expected = stats.binomtest(count, number).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= count / number <= high <= 1


def test_calibration_error_by_hand():
    """Four images at confidence 0.9, three right: a gap of 0.15; one at 0.6, right: 0.4. Together (4 * 0.15 + 0.4) / 5."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    assert calibration_error(probabilities, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.2)


@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.9]))
def test_bootstrap_of_top1_is_that_of_a_share(seed, share):
    """For many images the percentile interval is nearly Wilson's."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 2000)
    chosen = np.where(rng.random(2000) < share, labels, (labels + 1) % 5)
    found = bootstrap_intervals(chosen, labels)
    assert found["top1"] == pytest.approx(wilson_interval(float(np.mean(chosen == labels)), 2000), abs=0.006)
    metrics = ProbeMetrics().compute(predictions=scores_for(chosen, 5), references=labels)
    for name, (low, high) in found.items():
        assert low < metrics[name] < high


def test_bootstrap_equals_drawing_the_images_again():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    chosen = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 3, 200))
    redrawn = []
    for _ in range(2000):
        at = rng.integers(0, 200, 200)
        redrawn.append(f1_score(labels[at], chosen[at], average="macro"))
    assert bootstrap_intervals(chosen, labels)["macro_f1"] == pytest.approx(
        np.percentile(redrawn, [2.5, 97.5]), abs=0.01
    )


def test_paired_difference_is_mcnemars_test():
    """30 won and 10 lost of 1,000: p is twice the chance of at most 10 heads in 40; the sd is sqrt(40 - 0.4) / 1,000."""
    right, other = np.zeros(1000, bool), np.zeros(1000, bool)
    right[:530], other[30:540] = True, True
    gap, (low, high), p = paired_difference(right, other)
    assert gap == 0.02 and p == pytest.approx(2 * stats.binom.cdf(10, 40, 0.5))
    assert (low, high) == pytest.approx((0.02 - 1.96 * 0.0063, 0.02 + 1.96 * 0.0063), abs=0.0015)
    assert paired_difference(right, right) == (0.0, (0.0, 0.0), 1.0)
