import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from concat_ensemble.probes.metrics import ProbeMetrics, wilson_interval


def scores_for(chosen, classes):
    return np.eye(classes)[chosen]


def test_by_hand():
    """Truth 0 0 0 1 1 2, chosen 0 0 1 1 2 2. Right: 4 of 6. By class: 2/3, 1/2, 1/1. F1: 2*2/(3+2), 2*1/(2+2), 2*1/(1+2)."""
    found = ProbeMetrics().compute(predictions=scores_for([0, 0, 1, 1, 2, 2], 3), references=[0, 0, 0, 1, 1, 2])
    assert found == {
        "top1": pytest.approx(4 / 6),
        "mean_per_class": pytest.approx((2 / 3 + 1 / 2 + 1) / 3),
        "macro_f1": pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3),
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
