"""What a results file claims, against the same probe measured again. Nothing here believes a number of the claim: what
is allowed follows from what was measured."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from concat_ensemble.data.audit import Audit
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.errors import argument
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.studies.results import MAJORITY, Results, Row, Run

MAX_DIFFERENCE = 0.01  # of shares: other processors and libraries round differently, which moves a few images
VERSION_1_SELECTION = "validation top-1, then fitted on train + validation"  # in the files of 0.1.0


@dataclass
class Check:
    """A row of the results of one dataset, measured again. All numbers are shares."""

    dataset: str
    name: str
    card: float | None = None  # mean over all repeats; None for a row that the results leave out
    again: float | None = None  # the mean that was measured; None where it could not be
    interval: tuple[float, float] | None = None  # around `again`, in which `card` must be: see `allowed_interval`
    metric: str = "top1"
    differences: list[str] = field(default_factory=list)  # in any number or setting

    @property
    def holds(self) -> bool:
        return not self.differences


def compare_results(claim: Results, again: Results) -> list[Check]:
    """A check for each row of either; differences in what all rows share are those of the first."""
    dataset, checks = describe_dataset(claim.dataset), []
    for row in claim.rows:
        check = Check(dataset, row.name, row.mean, metric=again.metric)
        if row.name in again:
            measured = again[row.name]
            check.again, check.interval = measured.mean, allowed_interval(measured)
            check.differences = list(_row_differences(row, measured))
            if all(earlier.holds for earlier in checks[:1]):  # the differences to a wrong row are wrong, too
                check.differences += _gain_differences(claim, again, row.name)
        else:
            is_baseline = row.kind == "baseline"
            remedy = f"name it with {argument('baselines')}" if is_baseline else "probe has no such row"
            check.differences = [f"it was not measured again: {remedy}"]
        checks.append(check)
    checks[0].differences[:0] = _shared_differences(claim, again)
    for row in again.rows:
        if row.name not in claim and not (row.name == MAJORITY and _is_version_1(claim)):
            left_out = ["the results leave it out"]
            checks.append(Check(dataset, row.name, None, row.mean, None, again.metric, left_out))
    return checks


def allowed_interval(row: Row) -> tuple[float, float]:
    """Where a claim of a measured row's mean must be: Wilson's 95% interval over the images of one test split, but not
    more than `MAX_DIFFERENCE` away, since the images are the same."""
    low, high = wilson_interval(row.mean, row.runs[0].n_test)
    return max(low, row.mean - MAX_DIFFERENCE), min(high, row.mean + MAX_DIFFERENCE)


def _shared_differences(claim: Results, again: Results) -> Iterator[str]:
    """Of the data, the settings of the probe, and which rows there are."""
    probe = again.probe | ({"selection": VERSION_1_SELECTION} if _is_version_1(claim) else {})
    yield from _differing_keys("dataset", claim.dataset, again.dataset)
    yield from _differing_keys("probe", claim.probe, probe)
    if claim.audit is None and not _is_version_1(claim):
        yield _differ("audit", None, again.audit)
    elif claim.audit is not None:
        claimed = Audit.from_dict(claim.audit).to_dict()  # what a card shows of it, also where keys are missing
        for key in ("sha256", "test_sha256"):
            if not (again.audit or {}).get(key) or not claimed[key]:  # images made here; before there was one
                claimed.pop(key)
        yield from _differing_keys("audit", claimed, again.audit or {})
    if claim.class_names and claim.class_names != again.class_names:
        yield _differ("class_names", claim.class_names, again.class_names)
    names = [row.name for row in claim.rows]
    if len(set(names)) < len(names):
        yield f"rows that share a name, among {reprlib.repr(sorted(names))}"
    if names[0] != again.rows[0].name:
        yield _differ("the first row", names[0], again.rows[0].name)


def _is_version_1(claim: Results) -> bool:
    """Whether results are as version 0.1.0 wrote them: without an audit and the majority class."""
    return claim.probe.get("selection") == VERSION_1_SELECTION


def _differing_keys(name: str, claim: dict[str, Any], again: dict[str, Any]) -> Iterator[str]:
    for key, value in claim.items():
        measured = again.get(key)
        if isinstance(value, dict) and isinstance(measured, dict) and value.keys() == measured.keys():
            yield from _differing_keys(f"{name}.{key}", value, measured)
        elif value != measured:
            yield _differ(f"{name}.{key}", value, measured)


def _row_differences(claim: Row, again: Row) -> Iterator[str]:
    low, high = allowed_interval(again)
    if not low <= claim.mean <= high:
        yield f"{100 * claim.mean:.1f} where {100 * again.mean:.1f} was measured"
    for name in ("kind", "num_features", "num_members", "steps", "gflops"):
        if getattr(claim, name) != getattr(again, name):
            yield _differ(name, getattr(claim, name), getattr(again, name))
    if claim.cost is not None:
        for name in ("gflops", "million_parameters"):  # not the seconds, which are those of a machine
            value, measured = getattr(claim.cost, name), 0.0 if again.cost is None else getattr(again.cost, name)
            if not math.isclose(value, measured, rel_tol=0.01):
                yield _differ(f"cost.{name}", value, measured)
    if len(claim.runs) != len(again.runs):
        yield _differ("repeats", len(claim.runs), len(again.runs))
    for run, measured in zip(claim.runs, again.runs, strict=False):
        yield from _run_differences(run, measured)
    yield from _too_narrow("the interval", claim.interval, again.interval)
    if claim.resample_deviation is not None:
        spread = claim.resample_deviation, again.resample_deviation or 0.0
        yield from _too_narrow("the spread over resamples", (0.0, spread[0]), (0.0, spread[1]))


def _run_differences(claim: Run, again: Run) -> Iterator[str]:
    for name in ("seed", "n_train", "n_test", "converged"):
        if getattr(claim, name) != getattr(again, name):
            yield _differ(name, getattr(claim, name), getattr(again, name))
    if claim.at_edge not in (None, again.at_edge):
        yield _differ("at_edge", claim.at_edge, again.at_edge)
    if not again.l2_strength / 10.1 <= claim.l2_strength <= again.l2_strength * 10.1:  # at most the next of the grid
        yield _differ("l2_strength", claim.l2_strength, again.l2_strength)
    measured = _shares(again)
    for name, values in _shares(claim).items():
        if name not in measured:
            yield f"{name} was not measured"
        elif values.shape != measured[name].shape:
            yield _differ(f"the length of {name}", len(values), len(measured[name]))
        elif not np.abs(values - measured[name]).mean() <= MAX_DIFFERENCE + 1e-9:
            yield f"{name} differs by {100 * np.abs(values - measured[name]).mean():.1f} points"


def _shares(run: Run) -> dict[str, np.ndarray]:
    """Every number that a run measures: by name, in the unit of shares of the test images."""
    shares = {f"metrics.{name}": np.array([value]) for name, value in run.metrics.items()}
    for name, interval in run.intervals.items():
        shares |= {f"intervals.{name}[{end}]": np.array([value]) for end, value in enumerate(interval)}
    if run.resamples:
        shares["resamples"] = np.array(run.resamples)
    if run.correct_images is not None:
        shares["correct"] = run.correct_images.astype(float)
    if run.resampled_values is not None:
        shares["resampled"] = run.resampled_values
    if run.confusion_matrix is not None:  # so that the mean is the share of images that are counted elsewhere
        counts = run.confusion_matrix.ravel()
        shares["confusion"] = counts * len(counts) / (2 * run.n_test)
    return shares


def _gain_differences(claim: Results, again: Results, name: str) -> Iterator[str]:
    """In the paired difference of the first row and another, which is known better than either."""
    first = again.rows[0].name
    if name == first or first not in claim:
        return
    gain, interval, _ = claim.difference(first, name)
    measured, allowed, _ = again.difference(first, name)
    if not abs(gain - measured) <= MAX_DIFFERENCE + 1e-9:
        yield f"{100 * gain:+.1f} for the ensemble against it where {100 * measured:+.1f} was measured"
    yield from _too_narrow("the interval of the difference", interval, allowed)


def _too_narrow(name: str, claim: tuple[float, float], again: tuple[float, float]) -> Iterator[str]:
    """A claim that is surer than what was measured: half as wide, beyond a rounding of 0.2 points."""
    width, measured = claim[1] - claim[0], again[1] - again[0]
    if math.isfinite(measured) and not width >= measured / 2 - 0.002:
        yield f"{name} is {100 * width:.1f} points wide where {100 * measured:.1f} were measured"


def _differ(name: str, claim: Any, again: Any) -> str:
    return f"{name}={reprlib.repr(claim)} where it is {reprlib.repr(again)}"
