"""Measuring one row of a probe's results: its probe, all metrics with intervals, resamples of the training images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning

from concat_ensemble.data.audit import Audit
from concat_ensemble.data.naming import METRICS
from concat_ensemble.features.table import FeatureTable, labeled_split
from concat_ensemble.probes.estimator import L2_STRENGTHS
from concat_ensemble.probes.intervals import (
    Interval,
    central_interval,
    resample_weights,
    resampled_metrics,
    wilson_interval,
)
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.metrics import RANKING_METRICS, ProbeMetrics, metric_value
from concat_ensemble.studies.results import MAX_CONFUSION, Run, pack_bits, pack_numbers

NEVER = -1e4  # the logit of a class without training images, so that it is not predicted


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How every row of the results is probed. Raises ValueError for an unknown metric or class weight."""

    metric: str = "top1"  # one of `METRICS`: it chooses the L2 strength, and rows are compared in it
    class_weight: str | None = None  # "balanced": each class counts as much as the others
    l2_strengths: tuple[float, ...] = L2_STRENGTHS
    num_resamples: int = 5  # of the training images
    seed: int = 0

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} must be one of {', '.join(METRICS)}.")
        if self.class_weight not in (None, "balanced"):
            raise ValueError(f'class_weight={self.class_weight!r} must be "balanced" or left out.')

    @property
    def record(self) -> dict[str, Any]:
        """The settings as results record them."""
        record = {
            "kind": "linear",
            "metric": self.metric,
            "l2_strengths": list(self.l2_strengths),
            "selection": f"{self.metric} on validation rows, or on folds where few are labeled; then fitted on all",
            "num_resamples": self.num_resamples,
        }
        return record | ({"class_weight": self.class_weight} if self.class_weight else {})


def choose_metric(metric: str | None, customary: str | None, audit: Audit) -> str:
    """The metric of a study: the one that was asked for, else that of the dataset's recipe, else mean per-class recall
    if the classes are imbalanced, where guessing the largest one gives a high top-1, else top-1."""
    return metric or customary or ("mean_per_class" if audit.imbalanced else "top1")


def check_test_split(metric: str, labels: np.ndarray, groups: np.ndarray | None) -> None:
    """Raise ValueError for test images (N,) of which the metric or its interval is not defined, before any work."""
    if metric in RANKING_METRICS and len(np.unique(labels)) < 2:
        raise ValueError(f"metric={metric!r} must have test images of two classes; name another test_split or metric.")
    if groups is not None and len(np.unique(groups)) < 2:
        raise ValueError(
            f"the test images are all of the group {str(groups[0])!r}, which leaves no interval; name another "
            "test_split, or leave group_column out."
        )


def fit_probe(table: FeatureTable, settings: ProbeSettings, *, standardize: bool) -> LinearProbe:
    """Choose the L2 strength on the validation rows, then fit on training and validation rows."""
    probe = LinearProbe(
        settings.l2_strengths,
        standardize,
        metric=settings.metric,
        class_weight=settings.class_weight,
        seed=settings.seed,
    )
    validation = table["validation"] if "validation" in table.blocks else None
    return probe.fit(table["train"], validation=validation)


def class_scores(probe: LinearProbe, table: FeatureTable) -> np.ndarray:
    """(N, C) log-probabilities of the test rows, with a column for every class of the table.

    They are as comparable between images as AUROC needs. A class without training images is never predicted, and all
    images are equally unlikely to be of it.
    """
    scores = np.full((len(table["test"]), len(table.class_names)), NEVER)
    scores[:, probe.classes_] = log_softmax(probe.logits(table["test"]), axis=1)
    return scores


def measure_probe(probe: LinearProbe, table: FeatureTable, settings: ProbeSettings, *, confusion: bool) -> Run:
    """Score a probe on the test split, and probes like it that are fitted on resamples of the training images."""
    scores = class_scores(probe, table)
    run = _measure_scores(scores, table, settings)
    run.l2_strength, run.at_edge = float(probe.l2_strength_), probe.at_edge_
    run.resamples = _resample_training(probe, table, settings)
    if confusion and len(table.class_names) <= MAX_CONFUSION:
        run.confusion = pack_numbers(_count_confusions(scores, table), "<u4")
    return run


def score_probe(probe: LinearProbe, table: FeatureTable, settings: ProbeSettings) -> float:
    """The metric of a probe on the test split."""
    return metric_value(settings.metric, class_scores(probe, table), table["test"].labels)


def measure_majority(table: FeatureTable, settings: ProbeSettings) -> Run:
    """The run of always predicting the largest class of the training and validation images."""
    counts = np.bincount(labeled_split(table).labels, minlength=len(table.class_names))
    scores = np.zeros((len(table["test"]), len(counts)))
    scores[:, counts.argmax()] = 1
    return _measure_scores(scores, table, settings)


@contextmanager
def collect_convergence_warnings() -> Iterator[list[str]]:
    """Yield a list, to which the messages of the block's `ConvergenceWarning`s are added in its end: a study with
    hundreds of fits warns once, by `warn_of_convergence`. Other warnings are left alone."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield messages
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def warn_of_convergence(messages: list[str]) -> None:
    """Warn once of all fits that did not converge."""
    if messages:
        count = f"{len(messages)} fits" if len(messages) > 1 else "one fit"
        warnings.warn(f"{count} of the probes did not converge: {messages[0]}", ConvergenceWarning, stacklevel=3)


def _measure_scores(scores: np.ndarray, table: FeatureTable, settings: ProbeSettings) -> Run:
    test, metric = table["test"], settings.metric
    values = ProbeMetrics().compute(predictions=scores, references=test.labels, metrics=[metric]) or {}
    names = [name for name in METRICS if name in values]
    resampled = resampled_metrics(scores, test.labels, metrics=names, groups=test.groups, seed=settings.seed)
    needed = metric != "top1" or test.groups is not None
    return Run(
        seed=settings.seed,
        metrics=values,
        l2_strength=0.0,
        n_train=len(labeled_split(table)),
        n_test=len(test),
        intervals={name: list(_interval(name, draws, values[name], test.labels)) for name, draws in resampled.items()},
        correct=pack_bits(scores.argmax(axis=1) == test.labels),
        resampled=pack_numbers(resampled[metric], "<f4") if needed else "",
    )


def _interval(metric: str, draws: np.ndarray, value: float, labels: np.ndarray) -> Interval:
    """The bootstrap's interval; where all resamples give 0 or 1, of which it learns nothing, Wilson's over the images,
    or over those of the rarest class for a metric that averages classes."""
    if value in (0, 1) and np.ptp(draws) == 0:
        rarest = int(np.unique(labels, return_counts=True)[1].min())
        return wilson_interval(value, len(labels) if metric == "top1" else rarest)
    return central_interval(draws, value)


def _resample_training(probe: LinearProbe, table: FeatureTable, settings: ProbeSettings) -> list[float]:
    """The metric on the test split with bootstrap resamples of the training images: within classes, so that none is
    missing, and of whole groups where there are groups. Empty for a single group, which has no spread."""
    labeled, scores = labeled_split(table), []
    if labeled.groups is not None and len(np.unique(labeled.groups)) < 2:
        return []
    chunks = resample_weights(labeled.labels, labeled.groups, seed=settings.seed, num_resamples=settings.num_resamples)
    for weights in np.concatenate(list(chunks), axis=1).T if settings.num_resamples else []:
        resampled = LinearProbe([probe.l2_strength_], probe.standardize, class_weight=settings.class_weight, tol=1e-4)
        resampled.fit(labeled, sample_weight=weights)  # without drawing rows, which would be read in a random order
        scores.append(score_probe(resampled, table, settings))
    return scores


def _count_confusions(scores: np.ndarray, table: FeatureTable) -> np.ndarray:
    """(C, C) test images by class and predicted class."""
    count = len(table.class_names)
    return np.bincount(table["test"].labels * count + scores.argmax(axis=1), minlength=count**2)
