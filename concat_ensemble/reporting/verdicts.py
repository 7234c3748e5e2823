"""What a study's numbers say, in words, for and against the concatenation."""

from __future__ import annotations

from concat_ensemble.reporting.tables import best_member
from concat_ensemble.studies.results import Results, Row, short_name

RIVAL_MARGIN = 0.05  # of top-1: a control that comes so near makes the dataset a poor test of the features
EQUAL_COMPUTE = 0.01  # largest relative difference of compute that is called equal


def verdict(study: Results) -> str:
    """Compare the ensemble with its best member, baselines and controls, and its projections with that member."""
    subject, best = study.rows[0], best_member(study)
    comparisons = [] if best is None else [_compare(study, subject, best, "its best member, ")]
    comparisons += [_compare(study, subject, row) for row in study.rows if row.kind in ("baseline", "control")]
    text = f"{subject.name} is {'; '.join(comparisons)}." if comparisons else ""
    projected = [row for row in study.rows if row.kind == "projected"]
    if best and projected:
        comparisons = [f"{row.name.rpartition(', ')[2]} is {_compare(study, row, best)}" for row in projected]
        text += f" With no more features than one member: {'; '.join(comparisons)}."
    if rival := _rival(study):
        doubt = "so this dataset does not show that what the members learned is useful"
        text += f" **{rival.name.capitalize()} do about as well, {doubt}.**"
    return text


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
    return " ".join(sentences) or "The ensemble is better than everything that it was compared with."


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


def _rival(study: Results) -> Row | None:
    """The better one of the controls, where it comes near the ensemble."""
    controls = [row for row in study.rows if row.name in ("untrained members", "raw pixels")]
    rival = max(controls, key=lambda row: row.mean, default=None)
    return rival if rival and rival.mean > study.rows[0].mean - RIVAL_MARGIN else None


def _compare(study: Results, row: Row, other: Row, title: str = "") -> str:
    """How far `row` is from `other`, whose name `title` precedes."""
    difference, (low, high), _ = study.difference(row.name, other.name)
    points, name = f"{abs(100 * difference):.1f}", f"{title}{short_name(study, other)}"
    if points == "0.0":
        return f"level with {name}"
    doubt = "" if low > 0 or high < 0 else " (not beyond chance)"
    return f"{points} points {'above' if difference > 0 else 'below'} {name}{doubt}"
