"""README.md of an ensemble's folder, from its config and its results files alone, and the check that it is current."""

import itertools
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.files import check_regular_files
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig, refuse_links
from concat_ensemble.reporting.card_metadata import (
    benchmark_entries,
    card_metadata,
    is_classifier,
    is_hub_id,
    probe_name,
)
from concat_ensemble.reporting.card_sections import keep_user_sections, split_metadata
from concat_ensemble.reporting.data_sentences import describe_data
from concat_ensemble.reporting.error_figures import plot_class_recall, plot_confusion_matrix
from concat_ensemble.reporting.figures import plot_accuracy_against_members
from concat_ensemble.reporting.licenses import LICENSE, OTHER, license_sentence, member_licenses
from concat_ensemble.reporting.rendering import escape_code, escape_names, escape_text, make_environment
from concat_ensemble.reporting.tables import (
    METRIC_NAMES,
    best_member,
    hardest_first,
    headings,
    member_gains,
    ordered_rows,
    row_texts,
)
from concat_ensemble.reporting.verdicts import against, describe_compute, notes, verdict
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results

FIGURES, CARD = "figures", "README.md"
EVAL_RESULTS = ".eval_results"  # where the Hub looks for results on the benchmarks that it registers
WRITTEN_BY = "<!-- Written by `concat-ensemble card`"
NOTE = (
    f"{WRITTEN_BY} from config.json and results/. It keeps your own sections (##) and metadata where you put them and "
    "overwrites all other edits. -->"
)
ONE_REPEAT = (
    "one repeat, with Wilson intervals over the test images; paired differences with bootstrap intervals and "
    "McNemar's test"
)
BOOTSTRAP = "one repeat; intervals and paired tests by the bootstrap over {} of the test images"
PROBE_DESCRIPTIONS = {
    "linear": "Linear probe: multinomial logistic regression on frozen features. Its L2 strength is chosen on "
    "validation data; the test split is used once.",
    "fine-tuning": "Fine-tuning: the ensemble and its head were trained together on this dataset; the test split was "
    "used once.",
}


def write_card(folder: Path, title: str | None = None, *, redraw: bool = True) -> Path:
    """Write `README.md` and the figures of an ensemble's folder, and `LICENSE.md` where no licence covers all members.

    What users wrote into an earlier card stays: sections (`## `) under other headings, each after the section that it
    followed, and metadata under other keys.
    The title is that of the earlier card, or the folder's name, when left out. Without `redraw`, figures newer than
    their results stay as they are.

    Raises:
        ValueError: when the folder holds no ensemble, or results of other weights.
        OSError: when it holds a symbolic link.
    """
    config, studies = _read(folder)
    refuse_links(folder, RESULTS, FIGURES)  # only for writing: in the Hub's cache every file is a link
    for stem, study in studies.items():
        if redraw or not _figures_are_current(folder, study, stem):
            _draw_figures(study, folder / FIGURES, stem)
    for path, text in _render_files(folder, title, config, studies).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / CARD


def check_card(folder: Path) -> None:
    """Check that the card of an ensemble's folder is what `write_card` would write; see `check_files`."""
    config, studies = _read(folder)
    for name in itertools.chain(*(_figure_names(study, stem) for stem, study in studies.items())):
        figure = folder / FIGURES / name
        if not figure.is_file():
            raise ValueError(f"{figure} is not there; write it with concat-ensemble card {folder}.")
    check_files(_render_files(folder, None, config, studies), str(folder))


def check_files(texts: dict[Path, str], arguments: str) -> None:
    """Check that files have these texts, which `concat-ensemble card` with these arguments would write. Raises
    ValueError naming the first line that differs, or the file that is missing."""
    remedy = f"write it with concat-ensemble card {arguments}."
    for path, text in texts.items():
        if not path.is_file():
            raise ValueError(f"{path} is not there; {remedy}")
        lines = itertools.zip_longest(path.read_text().splitlines(), text.splitlines(), fillvalue="")
        for number, (line, expected) in enumerate(lines, 1):
            if line != expected:
                same = [old == new for old, new in zip(line, expected, strict=False)]
                start = max(0, (same.index(False) if False in same else len(same)) - 20)
                line, expected = repr(line[start : start + 60]), repr(expected[start : start + 60])
                difference = f"says {line} where config and results give {expected}"
                raise ValueError(f"{path}, line {number}, {difference}; {remedy}")


def _figure_names(study: Results, stem: str) -> list[str]:
    """The names of a study's figures: of all rows, and of the ensemble's errors where its results have them."""
    has_errors = bool(study.rows[0].runs[0].confusion)
    return [f"{stem}.png"] + [f"{stem}.{kind}.png" for kind in ("recall", "confusion") if has_errors]


def _figures_are_current(folder: Path, study: Results, stem: str) -> bool:
    measured = (folder / RESULTS / f"{stem}.json").stat().st_mtime_ns
    figures = [folder / FIGURES / name for name in _figure_names(study, stem)]
    return all(figure.is_file() and figure.stat().st_mtime_ns > measured for figure in figures)


def _draw_figures(study: Results, folder: Path, stem: str) -> None:
    names = _figure_names(study, stem)
    plot_accuracy_against_members(study, folder / names[0])
    confusion = study.rows[0].runs[0].confusion_matrix  # of the first repeat; repeats may share images
    if confusion is not None:
        plot_class_recall(confusion, study.class_names, folder / names[1])
        plot_confusion_matrix(confusion, study.class_names, folder / names[2])


def _read(folder: Path) -> tuple[ConcatEnsembleConfig, dict[str, Results]]:
    """Config and results, by the names of their files, `hardest_first`."""
    check_regular_files(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no ensemble (no config.json); make one with concat-ensemble build.")
    config = ConcatEnsembleConfig.from_pretrained(folder)
    studies = {}
    for path in sorted((folder / RESULTS).glob("*.json")):
        studies[path.stem] = Results.load(path)
        if studies[path.stem].members_sha256 != members_sha256(config):
            problem = f"{path} was measured on other weights than {folder} holds"
            raise ValueError(f"{problem}; probe again with --overwrite.")
    return config, dict(sorted(studies.items(), key=lambda item: hardest_first(item[1])))


def _render_files(
    folder: Path, title: str | None, config: ConcatEnsembleConfig, studies: dict[str, Results]
) -> dict[Path, str]:
    """The texts of all files but the figures."""
    earlier = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
    earlier_metadata, body = split_metadata(earlier, folder / CARD)
    if title is None:
        heading = re.search(r"^# (.+)$", body, re.MULTILINE)
        title = re.sub(r"\\(.)", r"\1", heading[1]) if heading else folder.resolve().name
    content, environment = _card_content(title, config, studies), make_environment(keep_trailing_newline=True)
    metadata = card_metadata(title, config, studies, earlier_metadata)
    text = environment.get_template("card.md.jinja").render(**content)
    template = files("concat_ensemble.reporting").joinpath("templates/card.md.jinja").read_text()
    texts = {folder / CARD: f"---\n{metadata.to_yaml()}\n---\n\n{keep_user_sections(text, body, template)}"}
    license = folder / LICENSE
    if metadata.license == OTHER and (not license.is_file() or WRITTEN_BY in license.read_text()):
        texts[license] = environment.get_template("license.md.jinja").render(**content)
    for stem, study in studies.items():
        if entries := benchmark_entries(study):
            texts[folder / EVAL_RESULTS / f"{stem}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return texts


def _card_content(title: str, config: ConcatEnsembleConfig, studies: dict[str, Results]) -> dict[str, Any]:
    """What the templates of the card and of the licence show."""
    specs = [config.members[k] for k in config.built_members]
    members, provenances = [_describe_member(spec) for spec in specs], [spec["provenance"] for spec in specs]
    escaped = {stem: escape_names(study) for stem, study in studies.items()}
    recipes = {str(provenance.get("ensemble_recipe") or "") for provenance in provenances}
    commands = [item.get("command") for item in provenances] + [study.command for study in studies.values()]
    architectures = [f"`{escape_code(member['architecture'])}`" for member in members]
    return {
        "note": NOTE,
        "title": title,
        "repo": re.sub(r"[^\w./ -]", "", title if "/" in title else f"path/to/{title}"),
        "summary": _summarize_members([spec["architecture"] for spec in specs], config.num_features),
        "headline": _headline(list(escaped.values())),
        "recipe": recipes.pop() if len(recipes) == 1 else None,
        "auto_class": "AutoModelForImageClassification" if is_classifier(config) else "AutoModel",
        "num_features": config.num_features,
        "members": members,
        "license": license_sentence(member_licenses(config)),
        "studies": [
            _describe_study(study) | {"figures": [f"{FIGURES}/{name}" for name in _figure_names(study, stem)]}
            for stem, study in escaped.items()
        ],
        "gains": member_gains(architectures, list(escaped.values()), escape_text),
        "commands": list(dict.fromkeys(str(command) for command in commands if command)),
        "interval_covers": _interval_covers({study.repeats for study in studies.values()}),
        "versions": next((study.versions for study in studies.values()), {}),
    }


def _summarize_members(architectures: list[str], num_features: int) -> str:
    count, names = len(architectures), ", ".join(f"`{escape_code(name)}`" for name in dict.fromkeys(architectures))
    if count == 1:
        return f"1 image backbone ({names}) as a model that returns its {num_features:,} pooled features."
    return f"{count} image backbones ({names}) as one model that concatenates their {num_features:,} pooled features."


def _headline(studies: list[Results]) -> str:
    """The metric on every dataset, not only on the one with the best number."""
    if not studies:
        return "No accuracy was measured."
    accuracies, is_top1 = [], all(study.metric == "top1" for study in studies)
    for study in studies:
        subject, best = study.rows[0], best_member(study)
        dataset = escape_text(describe_dataset({**study.dataset, "test_images": None}))
        gain = f" ({100 * (subject.mean - best.mean):+.1f} against its best member alone)" if best else ""
        metric = "" if is_top1 else f" {METRIC_NAMES[study.metric]}"
        accuracies.append(f"{100 * subject.mean:.1f}%{metric} on {dataset}{gain}")
    kind = "Top-1 accuracy" if is_top1 else "Accuracy"
    return f"{kind} ({probe_name(studies[0])}): {'; '.join(accuracies)}."


def _interval_covers(repeats: Iterable[int]) -> str:
    """The variation that the intervals of studies with these numbers of repeats include."""
    repeated = "variation over seeds and data (repeats share images, which makes the intervals somewhat narrow)"
    covers = [repeated] if any(count != 1 for count in repeats) else []
    if 1 in repeats:
        covers.append("variation over test images only (one repeat)")
    return ", or ".join(covers)


def _describe_member(spec: dict[str, Any]) -> dict[str, Any]:
    provenance = spec["provenance"]
    described = {key: provenance.get(key, "not stated") for key in ("pretraining_data", "license", "steps", "seed")}
    source = escape_text(provenance.get("source", "not stated"))
    hub_id, revision = provenance.get("hub_id"), str(provenance.get("revision", "main"))
    if is_hub_id(hub_id) and re.fullmatch(r"[\w./-]+", revision):
        source = f"[{hub_id}](https://huggingface.co/{hub_id}/tree/{revision})"
    return described | {
        "source": source,
        "architecture": spec["architecture"] + (f" {json.dumps(spec['model_args'])}" if spec["model_args"] else ""),
        "num_features": spec["num_features"],
        "input": describe_input(spec["preprocessing"]),
        "sha256": str(provenance.get("weights_sha256", ""))[:12],
    }


def describe_input(preprocessing: dict[str, Any]) -> str:
    """Channels, height and width of a member's input, and which channels of an image these are if it names them."""
    size, numbers = "x".join(map(str, preprocessing["input_size"])), preprocessing.get("channels")
    return f"{size} (channels {', '.join(map(str, numbers))})" if numbers else size


def _describe_study(study: Results) -> dict[str, Any]:
    rows = ordered_rows(study)
    texts = [row_texts(study, row) for row in rows]
    shown = headings(study.metric, study.rows[0].name, texts)
    for row, cells in zip(rows, texts, strict=True):
        if row.kind == "ensemble":
            cells["name"] = f"**{cells['name']}**"
    metric = METRIC_NAMES[study.metric]
    return {
        "title": describe_dataset(study.dataset),
        "probe": PROBE_DESCRIPTIONS.get(study.probe.get("kind", ""), PROBE_DESCRIPTIONS["linear"]),
        "metric": metric[:1].upper() + metric[1:],
        "protocol": study.protocol,
        "has_deviation": study.rows[0].resample_deviation is not None,
        "hardware": study.hardware,
        "intervals": _describe_intervals(study),
        "notes": notes(study),
        "headings": list(shown.values()),
        "rows": [[cells[key] for key in shown] for cells in texts],
        "verdict": verdict(study),
        "against": against(study),
        "compute": describe_compute(study),
        "data": " ".join(describe_data(study)),
    }


def _describe_intervals(study: Results) -> str:
    if study.repeats > 1:
        return f"mean over {study.repeats} repeats with different seeds, with Student's t intervals"
    if study.num_groups is not None:
        return BOOTSTRAP.format("groups")
    return ONE_REPEAT if study.metric == "top1" else BOOTSTRAP.format("resamples")
