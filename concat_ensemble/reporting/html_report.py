"""One HTML page that compares ensembles, from their results, selections and overlaps alone."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.reporting.figures import LITERAL
from concat_ensemble.reporting.model_card import HEADINGS, hardest_first, row_texts
from concat_ensemble.studies.results import Results, Row, points

# What a figure has for its axis of cost: the first that all of its rows know.
COSTS = {
    "GFLOPs per image": lambda row: row.cost and row.cost.gflops,
    "GFLOP of training": lambda row: row.gflops,
    "columns": lambda row: row.num_features,
}
MARKERS = {"ensemble": "o", "first_members": ".", "member": "+", "projected": "D", "baseline": "s"}


def write_report(folders: list[Path], output: Path) -> Path:
    """Write one page that needs nothing but itself.

    Args:
        folders: Of ensembles, or any with `*.json` of `probe`, `select` and `compare` in them or in `results`, `selection`
            and `overlap` below.
        output: The file.

    Raises:
        ValueError: for a folder without results, and a file of these that cannot be read.
    """
    found: dict[str, list] = {"studies": [], "selections": [], "overlaps": []}
    for folder in folders:
        paths = [
            path for part in ("", "results", "selection", "overlap") for path in sorted((folder / part).glob("*.json"))
        ]
        before = len(found["studies"])
        for path in paths:
            kind, content = _read(path)
            if kind:
                found[kind].append((str(folder), content))
        if len(found["studies"]) == before:
            raise ValueError(f"{folder} has no results; make some with concat-ensemble probe.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("concat_ensemble.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The page's policy lets the one script run whose digest it names.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    datasets: dict[str, list[tuple[str, Results]]] = {}
    for name, study in sorted(found["studies"], key=lambda pair: hardest_first(pair[1])):
        datasets.setdefault(describe_dataset(study.dataset), []).append((name, study))
    page = environment.get_template("report.html.jinja").render(
        datasets=[_dataset(name, studies) for name, studies in datasets.items()],
        selections=found["selections"],
        overlaps=found["overlaps"],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)
    return output


def _read(path: Path) -> tuple[str | None, Any]:
    """Which list of the page a file belongs to, and what it says there."""
    try:
        content = json.loads(path.read_text())
        keys = set(content) if isinstance(content, dict) else set()
        if {"rows", "probe"} <= keys:
            return "studies", Results.load(path)
        if {"subsets", "contributions"} <= keys:
            return "selections", _selection(path.stem, content)
        if {"subjects", "relations"} <= keys:
            return "overlaps", _overlap(content)
        return None, None  # a config, or somebody's own
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); write it anew.") from error


def _dataset(name: str, studies: list[tuple[str, Results]]) -> dict[str, Any]:
    """A table of all that was probed on a dataset, the best first, and its figure."""
    rows = [(folder, study, row) for folder, study in studies for row in study.rows]
    rows.sort(key=lambda found: -found[2].mean)
    texts = [row_texts(study, row) for _, study, row in rows]
    for (folder, _, _), cells in zip(rows, texts, strict=True):
        cells["name"] = f"{folder}: {cells['name']}" if len(studies) > 1 else cells["name"]
    shown = {key: text.format("ensemble") for key, text in HEADINGS.items() if any(cells[key] for cells in texts)}
    return {
        "name": name,
        "headings": list(shown.values()),
        "rows": [(row.kind, [cells[key] for key in shown]) for (_, _, row), cells in zip(rows, texts, strict=True)],
        "figure": Markup(_figure(rows)),
    }


def _selection(dataset: str, content: dict) -> dict[str, Any]:
    best = next(subset for subset in content["subsets"] if subset["members"] == content["best"])
    members = [
        {
            "name": f"{one['member']}: {content['names'][one['member']]}",
            "chosen": bool(one["chosen"]),
            "gain": points(one["gain"], one["gain_interval"]),
            "shapley": "" if one["shapley"] is None else points(one["shapley"], one["shapley_interval"]),
        }
        for one in content["contributions"]
    ]
    chosen = " + ".join(map(str, best["members"]))
    return {"dataset": dataset, "members": members, "best": f"{chosen}: {100 * best['top1']:.1f} at {best['cost']['gflops']:.2f} GFLOPs"}  # fmt: skip


def _overlap(content: dict) -> dict[str, Any]:
    names = [subject["name"] for subject in content["subjects"]]
    relations = [
        [names[one["wanted"]], one["source"], *(f"{one[key]:.2f}" for key in ("r2", "untrained_r2", "cka")), f"{100 * one['rest_top1']:.1f}"]
        for one in content["relations"]
    ]  # fmt: skip
    return {
        "dataset": describe_dataset(content["dataset"]),
        "relations": relations,
        "verdict": list(content["verdict"]),
    }


@LITERAL
def _figure(rows: list[tuple[str, Results, Row]]) -> str:
    """Top-1 against cost as SVG, its letters as paths."""
    colors = {name: f"C{n}" for n, name in enumerate(sorted({folder for folder, _, _ in rows}))}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    shown = [(folder, row) for folder, _, row in rows if row.kind in MARKERS]
    cost = next(name for name in COSTS if all(COSTS[name](row) for _, row in shown) or name == "columns")
    for folder, row in shown:
        low, high = row.interval
        spread = [[100 * max(row.mean - low, 0)], [100 * max(high - row.mean, 0)]]
        axes.errorbar(COSTS[cost](row), 100 * row.mean, spread, color=colors[folder], marker=MARKERS[row.kind], alpha=0.8,
                      elinewidth=0.8, label=folder if row.kind == "ensemble" else None)  # fmt: skip
    for folder, _, row in rows:
        if row.kind == "control":
            axes.axhline(100 * row.mean, color=colors[folder], linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(cost)
    axes.set_ylabel("top-1 (%)")
    if len(colors) > 1:
        axes.legend(fontsize=8, frameon=False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "concat-ensemble", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
