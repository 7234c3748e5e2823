"""README.md of an ensemble's folder, from its config and its results files alone, and the check that it is current."""

import itertools
import json
import re
import shutil
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.files import check_regular_files, replace_file
from concat_ensemble.members.provenance import Provenance, read_provenances
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
from concat_ensemble.reporting.rendering import (
    Markdown,
    escape_text,
    escape_url,
    format_code,
    make_markdown_environment,
)
from concat_ensemble.reporting.tables import (
    METRIC_NAMES,
    best_member,
    hardest_first,
    headings,
    member_gains,
    ordered_rows,
    row_texts,
)
from concat_ensemble.reporting.verdicts import against, describe_compute, doubts, notes, verdict
from concat_ensemble.studies.ensemble_folders import TRAINING_FIGURE, WRITTEN_BY, free_name
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results

FIGURES, CARD = "figures", "README.md"
SPACE = "space"  # key of the metadata with the Hub id of a Space that shows the ensemble
EVAL_RESULTS = ".eval_results"  # where the Hub looks for results on the benchmarks that it registers
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


def write_card(
    folder: Path,
    title: str | None = None,
    *,
    redraw: bool = True,
    earlier: str | None = None,
    space: str | None = None,
) -> Path:
    """Write `README.md` and the figures of an ensemble's folder, and `LICENSE.md` where no licence covers all members.

    What users wrote into an earlier card stays: sections (`## `) under other headings, each after the section that it
    followed, and metadata under other keys.
    The title is that of the earlier card, or the folder's name, when left out. Without `redraw`, figures newer than
    their results stay as they are. `earlier`: The text of the earlier card; when left out, that of the folder.
    `space`: Hub id of a Space that shows the ensemble, to link; it stands in the metadata, so that later cards keep
    it. Each file is written whole or not at all, the card last.

    Raises:
        ValueError: when the folder holds no ensemble, or results of other weights.
        OSError: when it holds a symbolic link.
    """
    config, studies = _read(folder)
    refuse_links(folder, RESULTS, FIGURES, EVAL_RESULTS)  # only for writing: in the Hub's cache every file is a link
    texts = _render_files(folder, title, config, studies, earlier, space)  # first, as the earlier card may be bad
    for stem, study in studies.items():
        if redraw or not _figures_are_current(folder, study, stem):
            _draw_figures(study, folder / FIGURES, stem)
    for path in sorted(texts, key=lambda path: path.name == CARD):
        with replace_file(path) as aside:
            aside.write_text(texts[path], encoding="utf-8")
    return folder / CARD


def renew_card(folder: Path, former: Path) -> str | None:
    """Write the card of a new ensemble's folder that is to take the place of `former`, with the title and the sections
    that a user wrote into the card there.

    A README.md that is no card of ours is left to stay, and no card is written. Of a card that differs from what its
    folder's config and results give, which may be by a user's edits, the text goes to README.old.md. Returns a
    sentence on that, or None.
    """
    card, title = former / CARD, former.absolute().name
    if not card.exists() and not card.is_symlink():
        write_card(folder, title)
        return None
    if card.is_symlink() or not card.is_file() or WRITTEN_BY not in card.read_text(errors="replace"):
        return f"{card} is your own and stays; concat-ensemble card writes one that keeps your sections."
    try:
        write_card(folder, earlier=card.read_text())
        check_card(former)
    except (OSError, ValueError):
        if not (folder / CARD).is_file():  # since the metadata of the earlier card cannot be read
            write_card(folder, title, earlier="")
        name = free_name(Path("README.old.md"), former)
        shutil.copy2(card, folder / name)
        return f"{card} was not what config and results gave; its text is now in {former / name}."
    return None


def check_card(folder: Path) -> None:
    """Check that the card of an ensemble's folder is what `write_card` would write, and that there are no other
    results for the Hub to show; see `check_files`."""
    config, studies = _read(folder)
    for name in itertools.chain(*(_figure_names(study, stem) for stem, study in studies.items())):
        figure = folder / FIGURES / name
        if not figure.is_file():
            raise ValueError(f"{figure} is not there; write it with concat-ensemble card {folder}.")
    texts = _render_files(folder, None, config, studies)
    for path in sorted((folder / EVAL_RESULTS).glob("*")):
        if path not in texts:
            raise ValueError(f"{path} is not from results, and the Hub shows what it says; remove it.")
    check_files(texts, str(folder))


def check_files(texts: dict[Path, str], arguments: str) -> None:
    """Check that files have these texts, which `concat-ensemble card` with these arguments would write. Raises
    ValueError naming the first line that differs, or the file that is missing."""
    remedy = f"write it with concat-ensemble card {arguments}."
    for path, text in texts.items():
        if not path.is_file():
            raise ValueError(f"{path} is not there; {remedy}")
        lines = itertools.zip_longest(path.read_text(encoding="utf-8").splitlines(), text.splitlines(), fillvalue="")
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
    folder: Path,
    title: str | None,
    config: ConcatEnsembleConfig,
    studies: dict[str, Results],
    earlier: str | None = None,
    space: str | None = None,
) -> dict[Path, str]:
    """The texts of all files but the figures."""
    if earlier is None:
        earlier = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    earlier_metadata, body = split_metadata(earlier, folder / CARD)
    earlier_metadata |= {} if space is None else {SPACE: space}
    if title is None:
        heading = re.search(r"^# (.+)$", body, re.MULTILINE)
        title = re.sub(r"\\(.)", r"\1", heading[1]) if heading else folder.resolve().name
    content, environment = _card_content(title, config, studies), make_markdown_environment()
    space = earlier_metadata.get(SPACE)
    content["space"] = space if is_hub_id(space) else None
    content["training_figure"] = TRAINING_FIGURE if (folder / TRAINING_FIGURE).is_file() else None
    metadata = card_metadata(title, config, studies, earlier_metadata)
    text = environment.get_template("card.md.jinja").render(**content)
    template = files("concat_ensemble.reporting").joinpath("templates/card.md.jinja").read_text()
    texts = {folder / CARD: f"---\n{metadata.to_yaml()}\n---\n\n{keep_user_sections(text, body, template)}"}
    license = folder / LICENSE
    if metadata.license == OTHER and (not license.is_file() or WRITTEN_BY in license.read_text(encoding="utf-8")):
        texts[license] = environment.get_template("license.md.jinja").render(**content)
    for stem, study in studies.items():
        if entries := benchmark_entries(study):
            texts[folder / EVAL_RESULTS / f"{stem}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return texts


def _card_content(title: str, config: ConcatEnsembleConfig, studies: dict[str, Results]) -> dict[str, Any]:
    """What the templates of the card and of the licence show."""
    specs = [config.members[k] for k in config.built_members]
    provenances = read_provenances(config)
    members = [_describe_member(spec, provenance) for spec, provenance in zip(specs, provenances, strict=True)]
    recipes = {"" if each.fine_tuned else each.ensemble_recipe or "" for each in provenances}
    commands = [item.command for item in provenances] + [study.command for study in studies.values()]
    architectures = [spec["architecture"] for spec in specs]
    return {
        "note": Markdown(NOTE),
        "title": title,
        "repo": Markdown(re.sub(r"[^\w./ -]", "", title if "/" in title else f"path/to/{title}")),
        "architectures": list(dict.fromkeys(architectures)),
        "headline": _headline(list(studies.values())),
        "recipe": recipes.pop() if len(recipes) == 1 else None,
        "auto_class": "AutoModelForImageClassification" if is_classifier(config) else "AutoModel",
        "num_features": config.num_features,
        "members": members,
        "license": license_sentence(member_licenses(config)),
        "studies": [
            _describe_study(study) | {"figures": [f"{FIGURES}/{name}" for name in _figure_names(study, stem)]}
            for stem, study in studies.items()
        ],
        "gains": member_gains([format_code(member["architecture"]) for member in members], list(studies.values())),
        "commands": list(dict.fromkeys(command for command in commands if command)),
        "interval_covers": _interval_covers({study.repeats for study in studies.values()}),
        "versions": next((study.versions for study in studies.values()), {}),
    }


def _headline(studies: list[Results]) -> str:
    """The metric on every dataset, not only on the one with the best number."""
    if not studies:
        return "No accuracy was measured."
    accuracies, is_top1 = [], all(study.metric == "top1" for study in studies)
    for study in studies:
        subject, best = study.rows[0], best_member(study)
        dataset = describe_dataset({**study.dataset, "test_images": None})
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


def _describe_member(spec: dict[str, Any], provenance: Provenance) -> dict[str, Any]:
    keys = ("pretraining_data", "license", "steps", "seed", "source")
    described = {key: getattr(provenance, key) for key in keys}
    described |= {key: "not stated" for key, value in described.items() if value is None}
    source = described["source"]
    hub_id, revision = provenance.hub_id, provenance.revision or "main"
    if is_hub_id(hub_id) and re.fullmatch(r"\w[\w./-]*", revision):
        source = Markdown(f"[{escape_text(hub_id)}](https://huggingface.co/{escape_url(f'{hub_id}/tree/{revision}')})")
    if provenance.fine_tuned:  # then the weights are no longer those of the source
        dataset = escape_text(provenance.fine_tuned.dataset or "a dataset that is not stated")
        source = Markdown(f"{escape_text(source)}, fine-tuned on {dataset}")
    return described | {
        "source": source,
        "architecture": spec["architecture"] + (f" {json.dumps(spec['model_args'])}" if spec["model_args"] else ""),
        "num_features": spec["num_features"],
        "input": describe_input(spec["preprocessing"]),
        "sha256": provenance.weights_sha256[:12],
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
            cells["name"] = _bold(cells["name"])
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
        "table": [list(shown.values()), *([cells[key] for key in shown] for cells in texts)],
        "verdict": Markdown(" ".join(filter(None, [escape_text(verdict(study)), *map(_bold, doubts(study))]))),
        "against": against(study),
        "compute": describe_compute(study),
        "data": " ".join(describe_data(study)),
    }


def _bold(text: str) -> Markdown:
    return Markdown(f"**{escape_text(text)}**")


def _describe_intervals(study: Results) -> str:
    if study.repeats > 1:
        return f"mean over {study.repeats} repeats with different seeds, with Student's t intervals"
    if study.num_groups is not None:
        return BOOTSTRAP.format("groups")
    return ONE_REPEAT if study.metric == "top1" else BOOTSTRAP.format("resamples")
