"""Intervals against closed forms, scikit-learn on repeated rows, and their coverage in simulations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from concat_ensemble.data.naming import METRICS
from concat_ensemble.probes import intervals
from concat_ensemble.probes.intervals import (
    central_interval,
    paired_difference,
    paired_resampled_difference,
    resample_weights,
    resampled_metrics,
    t_interval,
    wilson_interval,
)
from concat_ensemble.probes.metrics import default_metrics, metric_value
from tests.concat_ensemble.probes.test_metrics import scored_images


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


def test_paired_difference_is_mcnemars_test():
    """30 wins and 10 losses of 1,000: p is twice the chance of at most 10 heads in 40; the deviation is sqrt(40 - 0.4)
    / 1,000."""
    correct, other = np.zeros(1000, bool), np.zeros(1000, bool)
    correct[:530], other[30:540] = True, True
    gap, (low, high), p = paired_difference(correct, other)
    assert gap == 0.02 and p == pytest.approx(2 * stats.binom.cdf(10, 40, 0.5))
    assert (low, high) == pytest.approx((0.02 - 1.96 * 0.0063, 0.02 + 1.96 * 0.0063), abs=0.0015)
    assert paired_difference(correct, correct) == (0.0, (0.0, 0.0), 1.0)


def repeated(scores, labels, weights):
    rows = np.repeat(np.arange(len(labels)), weights.astype(int))
    return scores[rows], labels[rows]


def all_weights(labels, groups=None, **settings):
    return np.concatenate(list(resample_weights(labels, groups, **settings)), axis=1)


@settings(max_examples=25)
@given(scored_images(), st.booleans(), st.integers(0, 100))
def test_resamples_are_metrics_of_repeated_images(images, grouped, seed):
    scores, labels = images
    groups = np.arange(len(labels)) // 2 if grouped and len(labels) > 2 else None
    values = resampled_metrics(scores, labels, metrics=METRICS, groups=groups, seed=seed, num_resamples=5)
    weights = all_weights(labels, groups, seed=seed, num_resamples=5)
    assert {name: len(numbers) for name, numbers in values.items()} == dict.fromkeys(METRICS, 5)
    for resample in range(5):
        rows = repeated(scores, labels, weights[:, resample])
        if len(np.unique(rows[1])) > 1:
            expected = {name: metric_value(name, *rows) for name in METRICS}
            assert {name: numbers[resample] for name, numbers in values.items()} == pytest.approx(expected)


def test_resamples_equal_scikit_learn_with_sample_weight():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    scores = np.stack([np.zeros(300), (rng.normal(size=300) + labels).round(1)], axis=1)
    values = resampled_metrics(scores, labels, metrics=METRICS, num_resamples=20)
    for resample, weight in enumerate(all_weights(labels, num_resamples=20).T):
        for name, reference in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            assert values[name][resample] == pytest.approx(reference(labels, scores[:, 1], sample_weight=weight))
        f1 = f1_score(labels, scores.argmax(1), average="macro", sample_weight=weight)
        assert values["macro_f1"][resample] == pytest.approx(f1)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 100))
def test_every_class_keeps_its_number_of_images(labels, seed):
    labels = np.array(labels)
    weights = all_weights(labels, seed=seed, num_resamples=30)
    assert weights.shape == (len(labels), 30)
    for c in np.unique(labels):
        assert (weights[labels == c].sum(0) == np.sum(labels == c)).all()


def test_images_of_a_class_are_drawn_equally_often():
    labels = np.repeat([0, 1], [3, 40])
    weights = all_weights(labels, num_resamples=4000)
    assert np.abs(weights.mean(1) - 1).max() < 5 * 0.99 / 4000**0.5
    assert weights[0].var() == pytest.approx(2 / 3, abs=0.05)  # binomial of 3 draws with 1/3: 3 * 1/3 * 2/3


@pytest.mark.parametrize("seed", range(30))
def test_six_rows_of_two_classes_always_have_intervals(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0, 0, 0, 0, 0, 1])
    scores = rng.normal(size=(6, 2))
    values = resampled_metrics(scores, labels, metrics=default_metrics(2), seed=seed)
    for name, numbers in values.items():
        low, high = central_interval(numbers, metric_value(name, scores, labels))
        assert np.isfinite(numbers).all() and 0 <= low <= metric_value(name, scores, labels) <= high <= 1


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_groups_are_drawn_whole_and_both_of_two_classes_are_in_every_resample(seed, num_groups):
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(num_groups), rng.integers(0, num_groups, 10)])
    labels = (rng.random(len(groups)) < rng.choice([0.1, 0.5])).astype(int)
    labels[:2] = 0, 1
    weights = all_weights(labels, np.array(list("abcdefghijkl"))[groups], seed=seed, num_resamples=20)
    for group in range(num_groups):
        assert (weights[groups == group] == weights[groups == group][0]).all()
    for c in (0, 1):
        assert (weights[labels == c].sum(0) > 0).all()
    assert (np.array([weights[np.flatnonzero(groups == g)[0]] for g in range(num_groups)]).sum(0) == num_groups).all()


def test_groups_widen_the_interval_by_what_their_images_share():
    """40 groups of 25 images that are all correct or all wrong hold as much as 40 images."""
    correct = np.repeat(np.arange(40) % 4 > 0, 25)
    labels = np.tile([0, 1], 500)
    scores = np.eye(2)[np.where(correct, labels, 1 - labels)]
    groups = np.repeat(np.arange(40), 25)
    by_image, by_group = (
        np.std(resampled_metrics(scores, labels, metrics=["top1"], groups=g)["top1"]) for g in (None, groups)
    )
    assert by_image == pytest.approx((0.75 * 0.25 / 1000) ** 0.5, rel=0.1)
    assert by_group == pytest.approx((0.75 * 0.25 / 40) ** 0.5, rel=0.1)


def test_one_group_is_refused():
    with pytest.raises(ValueError, match=r"one group 'a'.*groups=None"):
        resampled_metrics(np.eye(2), np.array([0, 1]), metrics=["top1"], groups=np.array(["a", "a"]))
    with pytest.raises(ValueError, match="metric='f1' must be one of top1"):
        resampled_metrics(np.eye(2), np.array([0, 1]), metrics=["f1"])


def test_resamples_do_not_depend_on_scores_or_on_the_other_metrics():
    rng = np.random.default_rng(0)
    labels = np.arange(50) % 3
    scores = rng.normal(size=(50, 3))
    alone = resampled_metrics(scores, labels, metrics=["macro_f1"], seed=4)
    together = resampled_metrics(scores, labels, metrics=METRICS, seed=4)
    assert np.array_equal(alone["macro_f1"], together["macro_f1"])
    one_better = resampled_metrics(scores + np.eye(3)[labels], labels, metrics=["top1"], seed=4)["top1"]
    assert (one_better >= together["top1"]).all()  # paired: more images are correct in every resample
    assert not np.array_equal(alone["macro_f1"], resampled_metrics(scores, labels, metrics=["macro_f1"])["macro_f1"])


def test_chunks_bound_the_memory_and_cover_all_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "CHUNK_SIZE", 700)
    labels = np.arange(100) % 2
    chunks = list(resample_weights(labels, num_resamples=30))
    assert [chunk.shape for chunk in chunks] == [(100, 7)] * 4 + [(100, 2)]
    assert len(resampled_metrics(np.eye(2)[labels], labels, metrics=["auroc"], num_resamples=30)["auroc"]) == 30


def test_perfect_predictions_of_some_classes_have_the_interval_of_width_0():
    labels = np.array([0, 1] * 5)
    values = resampled_metrics(np.eye(10)[labels], labels, metrics=["macro_f1"])["macro_f1"]
    assert central_interval(values, 1.0) == (1.0, 1.0)


@pytest.mark.parametrize("name", METRICS)
def test_a_value_lies_in_its_interval_with_many_small_classes(name):
    """Resamples repeat images, which biases macro F1 and average precision by more than their spread."""
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 300
    scores = rng.normal(size=(900, 300)) + 3 * np.eye(300)[labels]
    value = metric_value(name, scores, labels)
    values = resampled_metrics(scores, labels, metrics=[name], num_resamples=200)[name]
    low, high = central_interval(values, value)
    assert low < value < high and high - low == pytest.approx(np.diff(np.percentile(values, [2.5, 97.5]))[0])
    if name == "average_precision":
        assert central_interval(values)[0] > value


def test_intervals_of_two_classes_cover_the_truth_in_about_95_of_100():
    """The truth is the mean over many test sets like these: 100 positive images and 300 others."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], [300, 100])

    def draw():
        return np.stack([np.zeros(400), rng.normal(size=400) + 1.5 * labels - 0.75], axis=1)

    def measure(scores):
        return np.array([metric_value(name, scores, labels) for name in METRICS])

    truth, covered = np.mean([measure(draw()) for _ in range(500)], axis=0), np.zeros(len(METRICS))
    for seed in range(200):
        scores = draw()
        values = resampled_metrics(scores, labels, metrics=METRICS, seed=seed, num_resamples=300)
        ends = [central_interval(values[name], point) for name, point in zip(METRICS, measure(scores), strict=True)]
        covered += [low <= true <= high for (low, high), true in zip(ends, truth, strict=True)]
    assert covered.min() >= 180 and covered.max() <= 199


def test_a_paired_difference_has_the_interval_and_p_of_a_normal_one():
    """A difference of 2 standard deviations has p = 0.0455."""
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(size=20_000), rng.normal(size=20_000)
    difference, interval, p = paired_resampled_difference(0.7 + shared + 0.01 * noise, 0.68 + shared, 0.7, 0.68)
    assert difference == pytest.approx(0.02) and p == pytest.approx(2 * stats.norm.sf(2), abs=0.006)
    assert interval == pytest.approx((0.02 - 0.0196, 0.02 + 0.0196), abs=5e-4)
    back = paired_resampled_difference(0.68 + shared, 0.7 + shared + 0.01 * noise, 0.68, 0.7)
    assert back[0] == -difference and back[2] == p


def test_equal_models_have_no_difference():
    values = np.random.default_rng(0).normal(size=1000)
    assert paired_resampled_difference(values, values, 0.3, 0.3) == (0.0, (0.0, 0.0), 1.0)


def test_p_is_never_zero():
    values = np.full(999, 0.9)
    assert paired_resampled_difference(values, values - 0.5, 0.9, 0.4)[2] == 2 / 1000


@pytest.mark.parametrize("difference", [0.0, 0.08])
def test_p_of_equal_models_is_uniform_and_small_for_different_ones(difference):
    """Pairs of models on 200 images: about 5% of equal ones have p < 0.05, and most of different ones."""
    rng, labels, significant = np.random.default_rng(0), np.arange(200) % 2, 0
    for seed in range(200):
        points, resampled = [], []
        for share in (0.75 + difference, 0.75):
            predicted = np.where(rng.random(200) < share, labels, 1 - labels)
            points.append(metric_value("mean_per_class", np.eye(2)[predicted], labels))
            values = resampled_metrics(
                np.eye(2)[predicted], labels, metrics=["mean_per_class"], seed=seed, num_resamples=300
            )
            resampled.append(values["mean_per_class"])
        significant += paired_resampled_difference(*resampled, *points)[2] < 0.05
    assert (significant > 80) if difference else (2 <= significant <= 22)
