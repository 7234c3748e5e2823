"""README.md of an ensemble's folder, from its config and its results files alone."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig, refuse_links
from concat_ensemble.plots import describe_dataset, plot_accuracy_against_members
from concat_ensemble.probing import members_sha256, versions
from concat_ensemble.results import Results, Row

RESULTS, FIGURES = "results", "figures"
# With which text opens a tag, a link, code, or another cell of a table.
MARKUP = {ord(sign): f"&#{ord(sign)};" for sign in "<>[]|`"}
METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class accuracy",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error",
}


def write_card(folder: Path, title: str | None = None) -> Path:
    """Write `README.md` and the figures of an ensemble's folder.

    Args:
        folder: With `config.json`, and `results/*.json` as `concat-ensemble probe` leaves them.
        title: The folder's name when left out.

    Raises:
        ValueError: when the folder holds no ensemble, or a results file that belongs to other weights.
        OSError: when it holds a symbolic link.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no ensemble (no config.json); make one with concat-ensemble build.")
    refuse_links(folder, RESULTS, FIGURES)
    config = ConcatEnsembleConfig.from_pretrained(folder)
    studies = {path: Results.load(path) for path in sorted((folder / RESULTS).glob("*.json"))}
    for path, study in studies.items():
        if study.members_sha256 != members_sha256(config):
            raise ValueError(f"{path} was measured on other weights than {folder} holds; probe again with --overwrite.")
        plot_accuracy_against_members(study, folder / FIGURES / f"{path.stem}.png")
    title = title or folder.resolve().name
    content = _environment().get_template("card.md.jinja").render(**_content(title, config, studies))
    card = ModelCard(f"---\n{_metadata(title, config, list(studies.values())).to_yaml()}\n---\n\n{content}")
    card.save(folder / "README.md")
    return folder / "README.md"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("concat_ensemble", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _metadata(title: str, config: ConcatEnsembleConfig, studies: list[Results]) -> ModelCardData:
    provenances = [config.members[k]["provenance"] for k in config.built_members]
    hub_members = list(dict.fromkeys(p["hub_id"] for p in provenances if p.get("hub_id")))
    evaluations = [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(study.dataset.get("name")),
            dataset_name=describe_dataset({**study.dataset, "test_images": None}),
            dataset_config=study.dataset.get("config"),
            dataset_split="test",
            dataset_revision=study.dataset.get("revision"),
            metric_type="accuracy" if metric == "top1" else metric,
            # The Hub merges results that differ in task or dataset arguments only, so what was probed and how stands
            # in the metric.
            metric_name=f"linear probe {name}",
            metric_value=round(float(sum(run.metrics[metric] for run in study.rows[0].runs) / study.repeats), 4),
            metric_args={
                "protocol": study.protocol,
                "repeats": study.repeats,
                **({"classes": study.dataset["classes"]} if study.dataset.get("classes") else {}),
            },
        )
        for study in studies
        for metric, name in METRIC_NAMES.items()
        if metric in study.rows[0].runs[0].metrics
    ]
    return ModelCardData(
        language=None,
        library_name="transformers",
        pipeline_tag=_task(config),
        license=_license(provenances),
        license_name=None if _license(provenances) != "other" else "see-members",
        license_link=None if _license(provenances) != "other" else "#members",
        tags=["concat-ensemble", "timm", "image-feature-extraction", "linear-probe", "custom_code"],
        base_model=hub_members or None,
        base_model_relation="merge" if hub_members else None,
        datasets=list(dict.fromkeys(study.dataset["name"] for study in studies if study.dataset.get("on_hub"))) or None,
        metrics=["accuracy"] if studies else None,
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
    )


def _task(config: ConcatEnsembleConfig) -> str:
    return (
        "image-classification"
        if config.architectures == ["ConcatEnsembleForImageClassification"]
        else "image-feature-extraction"
    )


def _license(provenances: list[dict]) -> str:
    """The members' common licence; `other` where they differ or one names none, for then the card's table of members
    decides.
    """
    named = {provenance.get("license") for provenance in provenances}
    return named.pop() if len(named) == 1 and None not in named else "other"


def _content(title: str, config: ConcatEnsembleConfig, results: dict[Path, Results]) -> dict[str, Any]:
    studies = list(results.values())
    members = [_member(config.members[k]) for k in config.built_members]
    names = list(dict.fromkeys(f"`{member['architecture']}`" for member in members))
    named = {str(config.members[k]["provenance"].get("ensemble_recipe") or "") for k in config.built_members}
    commands = [config.members[k]["provenance"].get("command") for k in config.built_members] + [
        study.command for study in studies
    ]
    repeats = max((study.repeats for study in studies), default=1)
    title = plain_text(title)
    return {
        "title": title,
        "repo": title if "/" in title else f"path/to/{title}",
        "summary": f"{len(members)} image backbone{'s' if len(members) > 1 else ''} ({', '.join(names)}) as one model, whose features are those of "
        f"{'all of them' if len(members) > 1 else 'it'} side by side: {config.num_features:,} columns.",
        "recipe": plain_text(named.pop()) if len(named) == 1 else None,
        "figures": [f"{FIGURES}/{path.stem}.png" for path in results],
        "auto_class": "AutoModelForImageClassification" if _task(config) == "image-classification" else "AutoModel",
        "num_features": config.num_features,
        "members": members,
        "studies": [_study(study) for study in studies],
        "commands": [_line(str(command)).replace("`", "") for command in dict.fromkeys(commands) if command],
        "interval_covers": "the draw of the seeds and of the data"
        if repeats > 1
        else "the draw of the test images only (one repeat)",
        "versions": plain_text(studies[0].versions) if studies else versions(),
    }


def _member(spec: dict[str, Any]) -> dict[str, Any]:
    provenance, pixels = plain_text(spec["provenance"]), spec["preprocessing"]
    shown = {
        key: provenance.get(key, "not stated") for key in ("source", "pretraining_data", "license", "steps", "seed")
    }
    revision = provenance.get("revision", "main")
    if re.fullmatch(r"[\w.-]+/[\w.-]+@[\w.-]+", f"{provenance.get('hub_id')}@{revision}"):
        shown["source"] = f"[{provenance['hub_id']}](https://huggingface.co/{provenance['hub_id']}/tree/{revision})"
    channels, height, width = pixels["input_size"]
    return shown | {
        "architecture": spec["architecture"] + (f" {json.dumps(spec['model_args'])}" if spec["model_args"] else ""),
        "num_features": spec["num_features"],
        "input": f"{channels}x{height}x{width}",
        "sha256": str(provenance.get("weights_sha256", ""))[:12],
    }


def _line(text: str) -> str:
    return "".join(filter(str.isprintable, " ".join(text.split())))


def plain_text(value: Any) -> Any:
    """The same, with every text in it as Markdown shows it: in one line, and what looks like markup only looks so."""
    if isinstance(value, str):
        return _line(value).translate(MARKUP)
    if dataclasses.is_dataclass(value):
        shown = {field.name: plain_text(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **shown)
    if isinstance(value, dict):
        return {plain_text(key): plain_text(item) for key, item in value.items()}
    return [plain_text(item) for item in value] if isinstance(value, list) else value


def _study(measured: Results) -> dict[str, Any]:
    study = plain_text(measured)
    subject = study.rows[0]
    return {
        "title": describe_dataset(study.dataset),
        "subject": subject.name,
        "protocol": measured.protocol,
        "drawn": study.rows[0].draw_deviation is not None,
        "interval_kind": f"mean over {study.repeats} repeats with other seeds, Student's intervals"
        if study.repeats > 1
        else "one repeat; intervals over the test images, Wilson's and (paired) the bootstrap's, with McNemar's test",
        "rows": [row_texts(study, row) | {"bold": row.kind == "ensemble"} for row in study.rows],
        "verdict": verdict(study),
        "compute": compute_sentence(study),
    }


def compute_sentence(study: Results) -> str:
    """What the training of the ensemble and of each baseline cost, and which of them may be called equal: those within 1%."""
    subject = study.rows[0]
    others = [row for row in study.rows if row.kind == "baseline" and row.gflops]
    if not subject.gflops or not others:
        return ""
    told = []
    for row in others:
        share = row.gflops / subject.gflops
        told.append(
            f"{row.name} {row.gflops:,.0f} GFLOP, "
            + ("equal compute" if abs(share - 1) <= 0.01 else f"{share:.2f} times as much")
        )
    return f"Training {subject.name} took {subject.gflops:,.0f} GFLOP; {'; '.join(told)}."


def row_texts(study: Results, row: Row) -> dict[str, str]:
    """A row of a study's table, as people read it."""
    low, high = row.interval
    shown = {
        "name": row.name,
        "num_members": str(row.num_members or ""),
        "width": f"{row.width:,}",
        "steps": "" if row.steps is None else f"{row.steps:,}",
        "top1": f"{100 * row.mean:.1f}",
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "draws": "" if row.draw_deviation is None else f"{100 * row.draw_deviation:.1f}",
        "paired": "",
        "p": "",
    }
    if row is not study.rows[0]:
        mean, (low, high), p = study.difference(study.rows[0].name, row.name)
        shown["paired"] = f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        shown["p"] = "<0.001" if p < 0.001 else f"{p:.3f}"
        if not math.isfinite(low):  # one repeat that does not say which images it got right
            shown |= {"paired": f"{100 * mean:+.1f}", "p": ""}
    return shown


def verdict(study: Results) -> str:
    """What the table says about the concatenation, in words, for and against."""
    subject = study.rows[0]
    best = max((row for row in study.rows if row.kind == "member"), key=lambda row: row.mean, default=None)
    others = [row for row in study.rows if row.kind in ("baseline", "control")]
    compared = [
        _compared(study, subject, row, "its best, " if row is best else "") for row in [*filter(None, [best]), *others]
    ]
    text = f"{subject.name} is {'; '.join(compared)}." if compared else ""
    narrowed = [row for row in study.rows if row.kind == "narrowed"]
    if best and narrowed:
        at = "; ".join(f"by {row.name.rpartition(', ')[2]} {_compared(study, row, best)}" for row in narrowed)
        text += f" At one member's width: {at}."
    controls = [row for row in study.rows if row.name in ("untrained members", "raw pixels")]
    rival = max(controls, key=lambda row: row.mean, default=None)
    if rival and rival.mean > subject.mean - 0.05:
        text += f" **{rival.name.capitalize()} do about as well, so this dataset does not show that the members' features are of use.**"
    return text


def _compared(study: Results, row: Row, other: Row, what: str = "") -> str:
    gap, (low, high), _ = study.difference(row.name, other.name)
    doubt = "" if low > 0 or high < 0 else " (not beyond chance)"
    return f"{abs(100 * gap):.1f} points {'above' if gap > 0 else 'below'} {what}{other.name}{doubt}"
