"""What a study's numbers say, in words, for and against the concatenation, and how they came about."""

from __future__ import annotations

from concat_ensemble.reporting.tables import METRIC_NAMES, best_member
from concat_ensemble.studies.results import MAJORITY, PIXELS, UNTRAINED, Results, Row, short_name

BETTER, LEVEL, BELOW = "better", "level", "below"
SIGNIFICANT = 0.05
FEW_REPEATS = 5  # with fewer, the spread over repeats is hardly known
RIVAL_MARGIN = 0.05  # of the metric: a control that comes so near makes the dataset a poor test of the features
EQUAL_COMPUTE = 0.01  # largest relative difference of compute that is called equal


def verdict(study: Results) -> str:
    """Compare the ensemble with its best member, baselines and controls, and its projections with that member."""
    subject, best = study.rows[0], best_member(study)
    comparisons = [] if best is None else [_compare(study, subject, best, "its best member, ")]
    comparisons += [_compare(study, subject, row) for row in study.rows if row.kind in ("baseline", "control")]
    text = f"{subject.name} is {'; '.join(comparisons)}." if comparisons else ""
    if text and study.metric != "top1":
        text = f"In {METRIC_NAMES[study.metric]}, {text}"
    projected = [row for row in study.rows if row.kind == "projected"]
    if best and projected:
        comparisons = [f"{row.name.rpartition(', ')[2]} is {_compare(study, row, best)}" for row in projected]
        text += f" With no more features than one member: {'; '.join(comparisons)}."
    return text.strip()


def against(study: Results) -> str:
    """The rows that are as good as the ensemble or better, whatever else the table shows."""
    subject, best = study.rows[0], best_member(study)
    better, level = "Better than the ensemble", "No difference beyond chance"
    level_projected = f"{level}, with no more features than one member"
    names: dict[str, list[str]] = {better: [], level: [], level_projected: []}
    for row in study.rows[1:]:
        _, (low, high), _ = study.difference(subject.name, row.name)
        if low > 0 or (row.kind == "member" and row is not best):
            continue
        finding = better if high < 0 else level_projected if row.kind == "projected" else level
        names[finding].append(short_name(study, row))
    sentences = [f"{finding}: {'; '.join(rows)}." for finding, rows in names.items() if rows]
    if rival := _rival(study):
        sentences.append(f"Less than 5 points below the ensemble, or above it: {rival.name}.")
    if study.controls != "all" and UNTRAINED not in study:
        sentences.append(f"{_left_out(study)} not measured.")
    return " ".join(sentences) or "The ensemble is better than everything that it was compared with."


def notes(study: Results) -> list[str]:
    """What a reader of the table must know about how its numbers came about, in sentences."""
    sentences = []
    if 1 < study.repeats < FEW_REPEATS:
        few = f"{study.repeats} repeats are fewer than {FEW_REPEATS}"
        sentences.append(f"{few}: the intervals are wide, and rough themselves.")
    if study.num_groups is not None and study.repeats == 1:
        sentences.append(f"Intervals and tests are over the {study.num_groups:,} groups of test images.")
    fits = [run for row in study.rows for run in row.runs if run.at_edge is not None]
    if at_edge := sum(bool(run.at_edge) for run in fits):
        grid = "the edge of the grid of L2 strengths"
        sentences.append(f"{at_edge} of {len(fits)} fits chose {grid}; a better one may lie beyond it.")
    if failed := sum(not run.converged for run in fits):
        sentences.append(f"{failed} of {len(fits)} fits did not converge.")
    if study.controls != "all" and UNTRAINED not in study:
        doubt = "so nothing here shows that a gain comes from what the members learned"
        sentences.append(f"{_left_out(study)} left out, {doubt}.")
    elif study.repeats > 1 and study.audit is not None and UNTRAINED in study:
        sentences.append("The untrained members are the same in all repeats.")
    return sentences


def describe_compute(study: Results) -> str:
    """What training the ensemble and each baseline cost, and which costs are equal; empty where that is not known."""
    subject = study.rows[0]
    if not subject.gflops:
        return ""
    sentences = []
    for row in study.rows:
        if row.kind == "baseline" and row.gflops:
            ratio = row.gflops / subject.gflops
            compared = "equal compute" if abs(ratio - 1) <= EQUAL_COMPUTE else f"{ratio:.2f} times as much"
            sentences.append(f"{short_name(study, row)} took {row.gflops:,.0f} GFLOP, {compared}")
    return f"Training {subject.name} took {subject.gflops:,.0f} GFLOP; {'; '.join(sentences)}." if sentences else ""


def _left_out(study: Results) -> str:
    """The controls that were left out, as a subject with its verb."""
    names = [name for name in (UNTRAINED, PIXELS, MAJORITY) if name not in study]
    names = [f"the {name}" if name == MAJORITY else name for name in names]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{text.capitalize()} were"


def _rival(study: Results) -> Row | None:
    """The better one of the controls with features, where it comes near the ensemble."""
    controls = [row for row in study.rows if row.name in (UNTRAINED, PIXELS)]
    rival = max(controls, key=lambda row: row.mean, default=None)
    return rival if rival and rival.mean > study.rows[0].mean - RIVAL_MARGIN else None


def doubts(study: Results) -> list[str]:
    """What speaks against the dataset as a test of the features."""
    sentences, subject = [], study.rows[0].name
    if MAJORITY in study and (finding := _how_near(study, MAJORITY)) != BELOW:
        better = "does better" if finding == BETTER else "does about as well"
        sentences.append(f"Always guessing the largest class {better}.")
    if rival := _rival(study):
        finding = _how_near(study, rival.name)
        if finding == BELOW:
            points = 100 * study.difference(subject, rival.name)[0]
            near = f"come within {points:.1f} points"
        else:
            near = "do better" if finding == BETTER else "do about as well"
        doubt = "so this dataset does not show that what the members learned is useful"
        sentences.append(f"{rival.name.capitalize()} {near}, {doubt}.")
    return sentences


def _how_near(study: Results, control: str) -> str:
    """Whether a control is better than the ensemble, level with it or below it, by the paired test."""
    difference, (low, high), p = study.difference(study.rows[0].name, control)
    if high < 0 or (difference < 0 and p < SIGNIFICANT):
        return BETTER
    return BELOW if low > 0 or (difference > 0 and p < SIGNIFICANT) else LEVEL


def _in_words(study: Results, row: Row) -> str:
    return f"the {MAJORITY}" if row.name == MAJORITY else short_name(study, row)


def _compare(study: Results, row: Row, other: Row, title: str = "") -> str:
    """How far `row` is from `other`, whose name `title` precedes."""
    difference, (low, high), p = study.difference(row.name, other.name)
    points, name = f"{abs(100 * difference):.1f}", f"{title}{_in_words(study, other)}"
    if points == "0.0":
        return f"level with {name}"
    signs = [low > 0 or high < 0, p < SIGNIFICANT]  # the interval and the test, which may differ near the limit
    doubt = "" if all(signs) else f" (at the limit of chance, p = {p:.2g})" if any(signs) else " (not beyond chance)"
    return f"{points} points {'above' if difference > 0 else 'below'} {name}{doubt}"
