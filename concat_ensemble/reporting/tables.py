"""The table of a study: which columns it has and how its numbers are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from concat_ensemble.data.naming import METRICS, describe_dataset
from concat_ensemble.studies.results import Results, Row, format_points, short_name

METRIC_NAMES = {
    "top1": "top-1",
    "mean_per_class": "mean per-class recall",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
}
METRIC_HEADINGS = METRIC_NAMES | {"mean_per_class": "mean per class"}
# Narrow screens cut a table at the right, so that the answer comes first: the metric that rows are compared in
# ("value"), one other metric, and how sure that is.
HEADINGS = {
    "name": "",
    "value": "",
    "beside": "",
    "interval": "95% interval",
    "paired": "{} minus it, paired",
    "p": "p",
    "auroc": METRIC_HEADINGS["auroc"],
    "average_precision": METRIC_HEADINGS["average_precision"],
    "num_features": "features",
    "num_members": "members",
    "steps": "training steps",
    "parameters": "M parameters",
    "gflops": "GFLOPs",
    "speed": "images/s",
    "deviation": "standard deviation over training resamples",
}
# The other columns are left out where all of their cells are empty.
ALWAYS_SHOWN = ("name", "value", "interval", "paired", "p", "num_features", "num_members", "steps")


def headings(metric: str, subject: str, texts: list[dict[str, str]]) -> dict[str, str]:
    """The columns of a table of rows that are compared in `metric` with the ensemble `subject`, from the `row_texts`
    of all rows: their keys and headings."""
    columns = HEADINGS | {"value": METRIC_HEADINGS[metric], "beside": METRIC_HEADINGS[metric_beside(metric)]}
    columns["paired"] = columns["paired"].format(subject)
    columns.pop(metric, None)  # it is there as the value
    return {key: text for key, text in columns.items() if key in ALWAYS_SHOWN or any(cells[key] for cells in texts)}


def metric_beside(metric: str) -> str:
    """The metric that is shown beside a study's own: top-1 hides what happens to small classes, and is what people
    know."""
    return "mean_per_class" if metric == "top1" else "top1"


def ordered_rows(study: Results) -> list[Row]:
    """The ensemble, then all other rows from the best to the worst."""
    return [study.rows[0], *sorted(study.rows[1:], key=lambda row: -row.mean)]


def row_texts(study: Results, row: Row) -> dict[str, str]:
    """The cells of a row of a study's table, by the keys of `HEADINGS` and the names of the metrics; empty where there
    is no number."""
    low, high = row.interval
    shares = {metric: row.values_in(metric) for metric in METRICS if all(metric in run.metrics for run in row.runs)}
    metrics = {metric: f"{100 * values.mean():.1f}" for metric, values in shares.items()}
    cells = dict.fromkeys([*HEADINGS, *METRICS], "") | metrics
    cells |= {
        "name": short_name(study, row),
        "value": metrics[study.metric],
        "beside": metrics.get(metric_beside(study.metric), ""),
        "num_members": str(row.num_members or ""),
        "num_features": f"{row.num_features:,}" if row.num_features else "",
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
    }
    if row.steps is not None:
        cells["steps"] = f"{row.steps:,}"
    if row.resample_deviation is not None:
        cells["deviation"] = f"{100 * row.resample_deviation:.1f}"
    if row.cost is not None:
        cells["parameters"] = _format_three_digits(row.cost.million_parameters)
        cells["gflops"] = _format_three_digits(row.cost.gflops)
        cells["speed"] = f"{1 / row.cost.seconds:,.0f}" if row.cost.seconds else ""
    if row is not study.rows[0]:
        mean, interval, p = study.difference(study.rows[0].name, row.name)
        cells["paired"] = format_points(mean, interval)
        if math.isfinite(interval[0]):
            cells["p"] = "<0.001" if p < 0.001 else f"{p:.3f}"
    return cells


def best_member(study: Results) -> Row | None:
    """The member with the highest metric on the test split, a choice in its favor; None where there are no members."""
    return max((row for row in study.rows if row.kind == "member"), key=lambda row: row.mean, default=None)


def hardest_first(study: Results) -> tuple[bool, float]:
    """Sort key: hard datasets first, where members differ most, and those with few labels last."""
    return "shots" in study.dataset, study.rows[0].mean


def member_gains(architectures: Sequence[str], studies: list[Results]) -> list[list[str]]:
    """A table of each member's metric alone and of what it adds to the members before it, headings first.

    Its columns are the datasets on which all members and all first members were probed; empty where there are none.
    """
    count = len(architectures)
    heading, rows = ["", "member"], [[str(k), architecture] for k, architecture in enumerate(architectures)]
    for study in studies:
        subject = study.rows[0].name
        alone = [f"{subject}, member {k} alone" for k in range(count)]
        path = [alone[0], *(f"{subject}, first {k} members" for k in range(2, count)), subject]
        if count == 1 or not all(name in study for name in alone + path):
            continue
        title = describe_dataset(study.dataset)
        title += f", {METRIC_NAMES[study.metric]}" if study.metric != "top1" else ""
        heading += [f"{title}: alone", "added"]
        gains = [format_points(*study.difference(new, old)[:2]) for old, new in itertools.pairwise(path)]
        for row, name, gain in zip(rows, alone, ["", *gains], strict=True):
            row += [f"{100 * study[name].mean:.1f}", gain]
    return [heading, *rows] if len(heading) > 2 else []


def _format_three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
