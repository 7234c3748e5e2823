"""One HTML page that compares ensembles, from their results, selections and overlaps alone."""

import base64
import hashlib
import io
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from concat_ensemble.plots import LITERAL, describe_dataset
from concat_ensemble.results import Results, Row, points

NUMBERS = {
    "members": lambda row: row.num_members or None,
    "columns": lambda row: row.width,
    "training steps": lambda row: row.steps,
    "GFLOPs per image": lambda row: row.cost and row.cost.gflops,
    "GFLOP of training": lambda row: row.gflops,
}
# What a panel has for its axis of cost: the first that all of its rows know.
COSTS = ("GFLOPs per image", "GFLOP of training", "columns")
MARKERS = {"ensemble": "o", "prefix": ".", "member": "+", "narrowed": "D", "baseline": "s"}


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
        loader=jinja2.PackageLoader("concat_ensemble", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The page's policy lets the one script run whose digest it names.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    rows = [row for name, study in found["studies"] for row in _rows(name, study)]
    page = environment.get_template("report.html.jinja").render(
        rows=rows,
        numbers=[name for name in NUMBERS if any(row["numbers"][name] is not None for row in rows)],
        figure=Markup(_figure(found["studies"])),
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


def _rows(name: str, study: Results) -> Iterator[dict[str, Any]]:
    for row in study.rows:
        low, high = (100 * bound for bound in row.interval)
        yield {
            "ensemble": name,
            "dataset": describe_dataset(study.dataset),
            "row": row.name,
            "kind": row.kind,
            "numbers": {name: number(row) for name, number in NUMBERS.items()},
            "top1": 100 * row.mean,
            "interval": f"{low:.1f} to {high:.1f}",
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
def _figure(studies: list[tuple[str, Results]]) -> str:
    """Top-1 against cost as SVG, a panel for each dataset, its letters as paths."""
    by_dataset: dict[str, list[tuple[str, Row]]] = {}
    for name, study in studies:
        by_dataset.setdefault(describe_dataset(study.dataset), []).extend((name, row) for row in study.rows)
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(name for name, _ in studies))}
    figure = Figure(figsize=(6.4, 3.6 * len(by_dataset)), layout="constrained")
    for axes, (dataset, rows) in zip(
        figure.subplots(len(by_dataset), squeeze=False).flat, by_dataset.items(), strict=True
    ):
        shown = [(name, row) for name, row in rows if row.kind in MARKERS]
        cost = next(name for name in COSTS if all(NUMBERS[name](row) for _, row in shown) or name == COSTS[-1])
        for name, row in shown:
            low, high = row.interval
            spread = [[100 * max(row.mean - low, 0)], [100 * max(high - row.mean, 0)]]
            axes.errorbar(NUMBERS[cost](row), 100 * row.mean, spread, color=colors[name], marker=MARKERS[row.kind], alpha=0.8,
                          elinewidth=0.8, label=name if row.kind == "ensemble" else None)  # fmt: skip
        for name, row in rows:
            if row.kind == "control":
                axes.axhline(100 * row.mean, color=colors[name], linestyle=":", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(cost)
        axes.set_ylabel("top-1 (%)")
        axes.set_title(textwrap.fill(dataset, 80), fontsize=9, loc="left")
        axes.legend(fontsize=8, frameon=False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "concat-ensemble", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
