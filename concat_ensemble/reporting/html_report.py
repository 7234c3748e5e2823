"""One HTML page that compares ensembles, from their files of results, selections and comparisons alone."""

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import msgspec
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from concat_ensemble.console import printable
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.files import check_regular_files, replace_file
from concat_ensemble.reporting.data_sentences import audit_sentences
from concat_ensemble.reporting.figures import LITERAL, shorten_texts
from concat_ensemble.reporting.rendering import make_html_environment
from concat_ensemble.reporting.tables import METRIC_NAMES, hardest_first, headings, row_texts
from concat_ensemble.reporting.verdicts import notes
from concat_ensemble.studies.overlap_results import Overlap
from concat_ensemble.studies.results import RESULTS, Results, Row, format_points
from concat_ensemble.studies.selection_results import Selection

MARKERS = {"ensemble": "o", "first_members": ".", "member": "+", "projected": "D", "baseline": "s"}


class NamedRow(NamedTuple):
    """A row of some results, and the folder that they are in."""

    folder: str
    study: Results
    row: Row


def write_report(folders: list[Path], output: Path) -> Path:
    """Write the page of `render_report` into a file of its own; `concat-ensemble app` shows it as a tab."""
    page = render_report(folders)
    with replace_file(output) as aside:
        aside.write_text(page, encoding="utf-8")
    return output


def has_results(folder: Path) -> bool:
    """Whether an ensemble's folder has results to report."""
    return any((folder / RESULTS).glob("*.json"))


def render_report(folders: list[Path]) -> str:
    """One page that needs no other file.

    Folders are those of ensembles, or others with JSON files of `probe`, `select` and `compare`, in them or in their
    subfolders `results`, `selection` and `overlap`. Raises ValueError for one without results, or a malformed file.
    """
    studies, selections, overlaps = [], [], []
    for name, folder in zip(_name_folders(folders), folders, strict=True):
        files = _load_folder(folder)
        studies += [(name, content) for content in files.values() if isinstance(content, Results)]
        for path, content in files.items():
            if isinstance(content, Selection):
                selections.append(_describe_selection(f"{name} on {path.stem}", content))
            if isinstance(content, Overlap):
                overlaps.append(_describe_overlap(name, content))
    environment = make_html_environment()
    # The page's policy allows only the script with this digest.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    datasets: dict[tuple[str, str], list[tuple[str, Results]]] = {}  # by name and metric: one metric in a table
    for folder, study in sorted(studies, key=lambda pair: hardest_first(pair[1])):
        datasets.setdefault((describe_dataset(study.dataset), study.metric), []).append((folder, study))
    described = [_describe_dataset(name, metric, studies) for (name, metric), studies in datasets.items()]
    template = environment.get_template("report.html.jinja")
    return template.render(datasets=described, selections=selections, overlaps=overlaps)


def _name_folders(folders: list[Path]) -> list[str]:
    """What the page calls each folder: the path that was given, or of an absolute one the part that distinguishes it
    from the other absolute ones."""
    absolute = [folder.parent for folder in folders if folder.is_absolute()]
    shared = os.path.commonpath(absolute) if absolute else ""
    return [printable(folder.relative_to(shared) if folder.is_absolute() else folder) for folder in folders]


def _load_folder(folder: Path) -> dict[Path, Results | Selection | Overlap | None]:
    """The JSON files of an ensemble's folder, some results among them."""
    check_regular_files(folder)
    parts = [folder, folder / RESULTS, folder / "selection", folder / "overlap"]
    files = {path: _load(path) for part in parts for path in sorted(part.glob("*.json"))}
    if not any(isinstance(content, Results) for content in files.values()):
        raise ValueError(f"{folder} has no results; make some with concat-ensemble probe.")
    return files


def _load(path: Path) -> Results | Selection | Overlap | None:
    """Whichever kind of file this is; None for others, such as a config."""
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({error}); repair or delete it.") from error
    keys = set(content) if isinstance(content, dict) else set()
    if {"rows", "probe"} <= keys:
        return Results.load(path)
    if {"subsets", "contributions"} <= keys:
        return Selection.load(path)
    if {"subjects", "relations"} <= keys:
        return Overlap.load(path)
    return None


def _describe_dataset(name: str, metric: str, studies: list[tuple[str, Results]]) -> dict[str, Any]:
    """The table of everything that was probed on a dataset, best first, its figure, and what to know about both."""
    rows = [NamedRow(folder, study, row) for folder, study in studies for row in study.rows]
    rows.sort(key=lambda named: -named.row.mean)
    texts = [row_texts(study, row) for _, study, row in rows]
    if len(studies) > 1:
        for named, cells in zip(rows, texts, strict=True):
            cells["name"] = f"{named.folder}: {cells['name']}"
    shown = headings(metric, "ensemble", texts)
    sentences = []
    for folder, study in studies:
        named = f"{folder}: " if len(studies) > 1 else ""
        sentences += [f"{named}{sentence}" for sentence in [*audit_sentences(study), *notes(study)]]
    return {
        "name": name if metric == "top1" else f"{name}: {METRIC_NAMES[metric]}",
        "headings": list(shown.values()),
        "rows": [(named.row.kind, [cells[key] for key in shown]) for named, cells in zip(rows, texts, strict=True)],
        "figure": Markup(_plot(rows, METRIC_NAMES[metric])),
        "sentences": sentences,
    }


def _describe_selection(title: str, selection: Selection) -> dict[str, Any]:
    best, members = selection[selection.best], []
    for one in selection.contributions:
        name, chosen = f"{one.member}: {selection.names[one.member]}", "yes" if one.chosen else "no"
        numbers = format_points(one.gain, one.gain_interval), format_points(one.shapley, one.shapley_interval)
        members.append([name, chosen, *numbers])
    accuracy = f"{100 * best.score:.1f} at {best.cost.gflops:.2f} GFLOPs"
    return {"title": title, "members": members, "best": f"{' + '.join(map(str, best.members))}: {accuracy}"}


def _describe_overlap(folder: str, overlap: Overlap) -> dict[str, Any]:
    relations = []
    for one in overlap.relations:
        untrained = "" if one.untrained_r2 is None else f"{one.untrained_r2:.2f}"
        numbers = [f"{one.r2:.2f}", untrained, f"{one.cka:.2f}", f"{100 * one.residual_top1:.1f}"]
        relations.append([overlap.subjects[one.target].name, one.source_name, *numbers])
    title = f"{folder} on {describe_dataset(overlap.dataset)}"
    return {"title": title, "relations": relations, "verdict": overlap.verdict}


@LITERAL
def _plot(rows: list[NamedRow], metric: str) -> str:
    """The metric against cost as SVG, with letters as paths."""
    colors = {folder: f"C{n}" for n, folder in enumerate(sorted({named.folder for named in rows}))}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    points = [named for named in rows if named.row.kind in MARKERS]
    axis, costs = _cost_axis([named.row for named in points])
    for (folder, _, row), cost in zip(points, costs, strict=True):
        low, high = row.interval
        spread = [[100 * max(row.mean - low, 0)], [100 * max(high - row.mean, 0)]]
        style = {"color": colors[folder], "marker": MARKERS[row.kind], "alpha": 0.8, "elinewidth": 0.8}
        axes.errorbar(cost, 100 * row.mean, spread, label=folder if row.kind == "ensemble" else None, **style)
    for folder, _, row in rows:
        if row.kind == "control":
            axes.axhline(100 * row.mean, color=colors[folder], linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{metric} (%)")
    if len(colors) > 1:
        axes.legend(fontsize=8, frameon=False)
    shorten_texts(figure)
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "concat-ensemble", "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _cost_axis(rows: list[Row]) -> tuple[str, list[float]]:
    """Label and values of the first measure of cost that all rows have."""
    gflops = [row.cost.gflops for row in rows if row.cost and row.cost.gflops]
    if len(gflops) == len(rows):
        return "GFLOPs per image", gflops
    training = [row.gflops for row in rows if row.gflops]
    if len(training) == len(rows):
        return "GFLOP of training", training
    return "features", [row.num_features for row in rows]
