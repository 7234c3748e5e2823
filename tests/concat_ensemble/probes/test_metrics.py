import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from concat_ensemble.data.naming import METRICS
from concat_ensemble.probes.metrics import ProbeMetrics, calibration_error, default_metrics, metric_value


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


def test_calibration_error_by_hand():
    """Four images at 0.9, three correct: a gap of 0.15; one at 0.6, correct: 0.4. The mean is (4 * 0.15 + 0.4) / 5."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    assert calibration_error(probabilities, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.2)


@st.composite
def scored_images(draw, max_classes=5):
    """Scores with ties, some of them -inf, and labels that may lack classes, but not all except one."""
    number, num_classes = draw(st.integers(2, 60)), draw(st.integers(2, max_classes))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    labels = rng.integers(0, num_classes, number)
    labels[:2] = rng.permutation(num_classes)[:2]
    scores = rng.normal(size=(number, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return scores.round(draw(st.integers(0, 3))), labels


@settings(max_examples=40)
@given(scored_images())
def test_values_are_scikit_learns(images):
    scores, labels = images
    predicted, present = scores.argmax(1), np.unique(labels)
    assert metric_value("top1", scores, labels) == accuracy_score(labels, predicted)
    recall = np.mean([np.mean(predicted[labels == c] == c) for c in present])  # balanced_accuracy_score warns
    assert metric_value("mean_per_class", scores, labels) == pytest.approx(recall)
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    assert metric_value("macro_f1", scores, labels) == pytest.approx(f1)
    if scores.shape[1] == 2:
        one_against_rest = [(labels == 1, scores[:, 1] - scores[:, 0])]
    else:
        one_against_rest = [(labels == c, scores[:, c]) for c in present]
    for name, reference in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        expected = np.mean([reference(*pair) for pair in one_against_rest])
        assert metric_value(name, scores, labels) == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_auroc_of_log_probabilities_is_scikit_learns_of_the_classes(num_classes):
    rng = np.random.default_rng(0)
    labels = np.arange(80) % num_classes
    logits = rng.normal(size=(80, num_classes)) + np.eye(num_classes)[labels]
    probabilities = softmax(logits, axis=1)
    if num_classes == 2:
        expected = roc_auc_score(labels, probabilities[:, 1])
    else:
        expected = roc_auc_score(labels, probabilities, multi_class="ovr")
    assert metric_value("auroc", np.log(probabilities), labels) == pytest.approx(expected)
    assert metric_value("mean_per_class", logits, labels) == balanced_accuracy_score(labels, logits.argmax(1))


@pytest.mark.parametrize("name", METRICS)
def test_a_weight_is_that_many_images(name):
    rng = np.random.default_rng(0)
    labels, weights = np.arange(40) % 3, rng.integers(0, 4, 40)
    scores = rng.normal(size=(40, 3)) + np.eye(3)[labels]
    weighted = metric_value(name, scores, labels, weights)
    assert weighted == pytest.approx(metric_value(name, scores.repeat(weights, 0), labels.repeat(weights)))


def test_three_in_a_hundred_positive_images_that_are_never_predicted():
    """The majority gives 97% top-1, while AUROC, average precision and recall show what the scores are worth."""
    labels = np.repeat([0, 1], [97, 3])
    scores = np.zeros((100, 2))
    scores[:, 0] = 5 - labels  # positives rank highest but are not predicted
    values = {name: metric_value(name, scores, labels) for name in METRICS}
    assert values == pytest.approx(
        {"top1": 0.97, "mean_per_class": 0.5, "macro_f1": 97 / 197, "auroc": 1.0, "average_precision": 1.0}
    )


def test_macro_f1_averages_over_the_classes_that_occur():
    """Perfect predictions of 2 of 10 classes are 1; a class that is predicted but not there counts as 0."""
    labels = np.array([0, 1, 0, 1])
    assert metric_value("macro_f1", np.eye(10)[labels], labels) == 1.0
    assert ProbeMetrics().compute(predictions=np.eye(10)[labels], references=labels)["macro_f1"] == 1.0
    predicted = np.array([0, 1, 0, 7])  # F1 of 1, 2/3 and 0
    assert metric_value("macro_f1", np.eye(10)[predicted], labels) == pytest.approx(5 / 9)


def test_a_class_that_is_never_scored_ranks_lowest():
    """Class 1 has no finite score, as if it had no training images: an AUROC of one half, not an error."""
    scores = np.array([[1.0, -np.inf, 0.0], [0.0, -np.inf, 1.0], [1.0, -np.inf, 0.5], [0.0, -np.inf, 2.0]])
    labels = np.array([0, 1, 0, 2])
    assert metric_value("top1", scores, labels) == 0.75
    assert metric_value("auroc", scores, labels) == pytest.approx((1 + 0.5 + 1) / 3)


@pytest.mark.parametrize(("num_classes", "ranked"), [(2, True), (3, False), (1000, False)])
def test_two_classes_have_the_ranking_metrics_by_default(num_classes, ranked):
    expected = METRICS if ranked else ("top1", "mean_per_class", "macro_f1")
    assert default_metrics(num_classes) == expected
    labels = np.array([0, 1, 1, 0])
    scores = np.eye(num_classes)[labels]
    measured = ProbeMetrics().compute(predictions=scores, references=labels)
    assert set(measured) - {"top5", "calibration_error"} == set(expected)
    more = ProbeMetrics().compute(predictions=scores, references=labels, metrics=["auroc"])
    assert set(more) - set(measured) == (set() if ranked else {"auroc"}) and more["auroc"] == 1.0


def test_test_images_of_one_class_leave_the_default_ranking_metrics_out():
    measured = ProbeMetrics().compute(predictions=np.eye(2)[[0, 0, 1]], references=[0, 0, 0])
    assert set(measured) == {"top1", "mean_per_class", "macro_f1", "calibration_error"}


@pytest.mark.parametrize(
    ("metric", "scores", "labels", "message"),
    [
        ("f1", np.eye(2), [0, 1], r"metric='f1' must be one of top1, mean_per_class, macro_f1, auroc, average"),
        ("top1", [[0.0, np.nan], [1.0, 0.0]], [0, 1], "scores of row 0 hold NaN"),
        ("auroc", np.eye(3), [2, 2, 2], "two classes, but all are of class 2; take images of more classes"),
        ("top1", np.eye(3), [0, 1, 3], "class numbers from 0 to 2"),
        ("top1", np.eye(3), ["a", "b", "c"], "class numbers from 0 to 2"),
        ("top1", np.eye(3), [0, 1], r"\(3, 3\).*\(2,\)"),
        ("top1", np.ones(3), [0, 1, 1], r"must be \(N, C\)"),
        ("top1", np.ones((0, 3)), [], r"must be \(N, C\)"),
    ],
)
def test_bad_scores_and_labels_are_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric_value(metric, np.array(scores), np.array(labels))
