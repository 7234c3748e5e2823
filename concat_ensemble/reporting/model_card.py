"""README.md of an ensemble's folder, from its config and its results files alone; and whether it still says what they do."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig, refuse_links
from concat_ensemble.reporting.card_metadata import (
    LICENSE,
    benchmark_entries,
    card_metadata,
    is_hub_id,
    member_licenses,
    one_line,
    pipeline_tag,
    probe_name,
)
from concat_ensemble.reporting.figures import plot_accuracy_against_members
from concat_ensemble.reporting.licenses import OTHER, joint_license
from concat_ensemble.studies.probing import members_sha256
from concat_ensemble.studies.results import RESULTS, Results, Row, points, short_name

FIGURES, CARD = "figures", "README.md"
EVAL_RESULTS = ".eval_results"  # where the Hub looks for the results of its registered benchmarks
NOTE = (
    "<!-- Written by `concat-ensemble card`, which writes it anew from config.json and results/. Sections (##) and metadata of your own stay where "
    "you put them; other edits are lost. -->"
)
# The answer first: a table is cut at the right on narrow screens.
HEADINGS = {
    "name": "",
    "top1": "top-1",
    "interval": "95% interval",
    "paired": "{} minus it, paired",
    "p": "p",
    "width": "columns",
    "num_members": "members",
    "steps": "training steps",
    "parameters": "M parameters",
    "gflops": "GFLOPs",
    "speed": "images/s",
    "draws": "deviation over training draws",
}


def write_card(folder: Path, title: str | None = None) -> Path:
    """Write `README.md` and the figures of an ensemble's folder; `LICENSE.md` too where no known licence covers all members.

    What people wrote into an earlier card stays: sections (`## `) under headings of their own, each after the section that
    it followed, and metadata under keys of their own.

    Args:
        folder: With `config.json`, and `results/*.json` as `concat-ensemble probe` leaves them.
        title: The one of the earlier card, or the folder's name, when left out.

    Raises:
        ValueError: when the folder holds no ensemble, or a results file that belongs to other weights.
        OSError: when it holds a symbolic link.
    """
    config, studies = _read(folder)
    refuse_links(folder, RESULTS, FIGURES)  # not when reading: in the Hub's cache every file is one
    for stem, study in studies.items():
        plot_accuracy_against_members(study, folder / FIGURES / f"{stem}.png")
    for path, text in _files(folder, title, config, studies).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / CARD


def check_card(folder: Path) -> None:
    """
    Raises:
        ValueError: naming the first line of the card that is not what config and results give, or the file that is missing.
    """
    config, studies = _read(folder)
    files = _files(folder, None, config, studies)
    if missing := [stem for stem in studies if not (folder / FIGURES / f"{stem}.png").is_file()]:
        raise ValueError(
            f"{folder / FIGURES / missing[0]}.png is not there; write it with concat-ensemble card {folder}."
        )
    written_alike(files, str(folder))


def written_alike(files: dict[Path, str], arguments: str) -> None:
    """
    Raises:
        ValueError: naming the first line of a file that is not in the text it should have.
    """
    remedy = f"write it anew with concat-ensemble card {arguments}."
    for path, text in files.items():
        if not path.is_file():
            raise ValueError(f"{path} is not there; {remedy}")
        for n, (old, new) in enumerate(
            itertools.zip_longest(path.read_text().splitlines(), text.splitlines(), fillvalue=""), 1
        ):
            if old != new:
                same = sum(
                    1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
                )
                old, new = (repr(line[max(0, same - 20) : same + 40]) for line in (old, new))
                raise ValueError(f"{path}, line {n}, says {old} where config and results give {new}; {remedy}")


def _read(folder: Path) -> tuple[ConcatEnsembleConfig, dict[str, Results]]:
    """Config and results by the names of their files: the hardest dataset first, since most is to be seen there, few labels last."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no ensemble (no config.json); make one with concat-ensemble build.")
    config = ConcatEnsembleConfig.from_pretrained(folder)
    studies = {path: Results.load(path) for path in sorted((folder / RESULTS).glob("*.json"))}
    for path, study in studies.items():
        if study.members_sha256 != members_sha256(config):
            raise ValueError(
                f"{path} was measured on other weights than {folder} holds; probe again with --overwrite."
            )
    return config, {
        path.stem: study for path, study in sorted(studies.items(), key=lambda item: hardest_first(item[1]))
    }


def hardest_first(study: Results) -> tuple[bool, float]:
    return "shots" in study.dataset, study.rows[0].mean


def _files(
    folder: Path, title: str | None, config: ConcatEnsembleConfig, studies: dict[str, Results]
) -> dict[Path, str]:
    """All that is written, as text."""
    earlier = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
    metadata, body = _parted(earlier, folder / CARD)
    if title is None:
        named = re.search(r"^# (.+)$", body, re.MULTILINE)
        title = re.sub(r"\\(.)", r"\1", named[1]) if named else folder.resolve().name
    content, environment = _content(title, config, studies), _environment()
    made = card_metadata(title, config, studies, metadata)
    text = _with_own_sections(environment.get_template("card.md.jinja").render(**content), body, environment)
    files = {folder / CARD: f"---\n{made.to_yaml()}\n---\n\n{text}"}
    is_ours = not (folder / LICENSE).is_file() or NOTE in (folder / LICENSE).read_text()
    if made.license == OTHER and is_ours:
        files[folder / LICENSE] = environment.get_template("license.md.jinja").render(**content)
    for stem, study in studies.items():
        if entries := benchmark_entries(study):
            files[folder / EVAL_RESULTS / f"{stem}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return files


def _parted(card: str, path: Path) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path}: its metadata are not YAML ({' '.join(str(error).split())}); repair or delete it."
        ) from error
    return metadata if isinstance(metadata, dict) else {}, card[found.end() :] if found else card


def _with_own_sections(text: str, earlier: str, environment: jinja2.Environment) -> str:
    """The new text with the sections of the earlier one that are not ours, each after the one that it followed."""
    source, _, _ = environment.loader.get_source(environment, "card.md.jinja")
    ours = [heading for heading, _ in _sections(source)]
    sections, before = _sections(text), ""
    for heading, section in _sections(earlier):
        if heading not in ours:
            places = [n for n, (known, _) in enumerate(sections) if known == before]
            sections.insert(places[0] + 1 if places else len(sections), (heading, section))
        before = heading
    return "\n\n".join(section for _, section in sections) + "\n"


def _sections(text: str) -> list[tuple[str, str]]:
    """Heading and text of each part; the first one is what stands before any heading. Code is not looked into."""
    parts, is_code = [("", [])], False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            parts.append((line.strip(), []))
        parts[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in parts]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("concat_ensemble.reporting", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "code": _code, "command": _command}
    return environment


def _text(value: Any) -> str:
    """One line that means nothing to Markdown or HTML: names come from strangers' files."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(value))


def _code(value: Any) -> str:
    """One line that ends neither the code that it stands in nor a table's cell."""
    return one_line(value).replace("`", "'").replace("|", "\\|")


def _command(value: Any) -> str:
    return one_line(value).replace("```", "'''")


def _license_sentence(licenses: list[str | None]) -> str:
    joint = joint_license(licenses)
    if joint != OTHER:
        return f"Licence of them together: `{joint}`" + (
            ", the most restrictive of theirs." if len(set(licenses)) > 1 else "."
        )
    return f"No known licence covers all members: each keeps its own, and [{LICENSE}]({LICENSE}) lists them."


def _content(title: str, config: ConcatEnsembleConfig, studies: dict[str, Results]) -> dict[str, Any]:
    members = [_member(config.members[k]) for k in config.built_members]
    provenances = [config.members[k]["provenance"] for k in config.built_members]
    names = list(dict.fromkeys(f"`{_code(config.members[k]['architecture'])}`" for k in config.built_members))
    named = {str(provenance.get("ensemble_recipe") or "") for provenance in provenances}
    commands = [told.get("command") for told in provenances] + [study.command for study in studies.values()]
    repeats = {study.repeats for study in studies.values()}
    covered = [
        "the draw of the seeds and of the data (repeats share images, so that they are rather too narrow)"
    ] * bool(repeats - {1})
    covered += ["the draw of the test images only (one repeat)"] * (1 in repeats)
    shown = {stem: escaped(study) for stem, study in studies.items()}
    return {
        "note": NOTE,
        "title": title,
        "repo": re.sub(r"[^\w./ -]", "", title if "/" in title else f"path/to/{title}"),
        "summary": f"{len(members)} image backbone{'s' if len(members) > 1 else ''} ({', '.join(names)}) as one model, whose features are those of "
        f"{'all of them' if len(members) > 1 else 'it'} side by side: {config.num_features:,} columns.",
        "headline": _headline(list(shown.values())),
        "recipe": named.pop() if len(named) == 1 else None,
        "auto_class": "AutoModelForImageClassification"
        if pipeline_tag(config) == "image-classification"
        else "AutoModel",
        "num_features": config.num_features,
        "members": members,
        "license": _license_sentence(member_licenses(config)),
        "studies": [_study(study) | {"figure": f"{FIGURES}/{stem}.png"} for stem, study in shown.items()],
        "adds": _adds(members, list(shown.values())),
        "commands": [command for command in dict.fromkeys(str(command or "") for command in commands) if command],
        "interval_covers": ", or ".join(covered),
        "versions": next((study.versions for study in studies.values()), {}),
    }


def escaped(study: Results) -> Results:
    rows = [dataclasses.replace(row, name=_text(row.name)) for row in study.rows]
    return dataclasses.replace(study, ensemble=_text(study.ensemble), rows=rows)


def _headline(studies: list[Results]) -> str:
    """The second sentence of a card: every dataset in it, not the one that looks best."""
    told = []
    for study in studies:
        subject, best = study.rows[0], best_member(study)
        against = f" ({100 * (subject.mean - best.mean):+.1f} against its best member alone)" if best else ""
        told.append(
            f"{100 * subject.mean:.1f}% of {_text(describe_dataset({**study.dataset, 'test_images': None}))}{against}"
        )
    return (
        f"With it, a {probe_name(studies[0])[0]} is right on {'; '.join(told)}."
        if told
        else "Nothing was measured with it here."
    )


def best_member(study: Results) -> Row | None:
    """By test, which flatters it."""
    return max((row for row in study.rows if row.kind == "member"), key=lambda row: row.mean, default=None)


def _member(spec: dict[str, Any]) -> dict[str, Any]:
    provenance, pixels = spec["provenance"], spec["preprocessing"]
    keys = ("pretraining_data", "license", "steps", "seed")
    shown = {key: provenance.get(key, "not stated") for key in keys}
    hub_id, revision = provenance.get("hub_id"), str(provenance.get("revision", "main"))
    on_hub = is_hub_id(hub_id) and re.fullmatch(r"[\w./-]+", revision)
    link = f"[{hub_id}](https://huggingface.co/{hub_id}/tree/{revision})"
    channels, height, width = pixels["input_size"]
    return shown | {
        "source": link if on_hub else _text(provenance.get("source", "not stated")),
        "architecture": spec["architecture"] + (f" {json.dumps(spec['model_args'])}" if spec["model_args"] else ""),
        "num_features": spec["num_features"],
        "input": f"{channels}x{height}x{width}",
        "sha256": str(provenance.get("weights_sha256", ""))[:12],
    }


def _study(study: Results) -> dict[str, Any]:
    texts = [row_texts(study, row) for row in study.rows]
    shown = headings(study, texts)
    for row, cells in zip(study.rows, texts, strict=True):
        cells["name"] = f"**{cells['name']}**" if row.kind == "ensemble" else cells["name"]
    return {
        "title": describe_dataset(study.dataset),
        "how": probe_name(study)[1],
        "protocol": study.protocol,
        "drawn": study.rows[0].resample_deviation is not None,
        "hardware": study.hardware,
        "interval_kind": f"mean over {study.repeats} repeats with other seeds, Student's intervals"
        if study.repeats > 1
        else "one repeat; intervals over the test images, Wilson's and (paired) the bootstrap's, with McNemar's test",
        "headings": list(shown.values()),
        "rows": [[cells[key] for key in shown] for cells in texts],
        "verdict": verdict(study),
        "against": against(study),
        "compute": compute_sentence(study),
    }


def headings(study: Results, texts: list[dict[str, str]]) -> dict[str, str]:
    """The columns of a study's table: of the `row_texts` of all its rows, those that say anything."""
    always = ("name", "num_members", "width", "steps", "top1", "interval", "paired", "p")
    return {
        key: text.format(study.rows[0].name)
        for key, text in HEADINGS.items()
        if key in always or any(cells[key] for cells in texts)
    }


def _adds(members: list[dict], studies: list[Results]) -> list[list[str]]:
    """A table of what each member does alone and adds to those before it, on the datasets where both were probed."""
    columns = {}
    for study in studies:
        subject, count = study.rows[0].name, len(members)
        alone = [f"{subject}, member {k} alone" for k in range(count)]
        steps = [alone[0], *(f"{subject}, first {k} members" for k in range(2, count)), subject]
        if count > 1 and all(name in study for name in alone + steps):
            added = [points(*study.difference(new, old)[:2]) for old, new in itertools.pairwise(steps)]
            columns[_text(describe_dataset(study.dataset))] = (
                [f"{100 * study[name].mean:.1f}" for name in alone],
                ["", *added],
            )
    if not columns:
        return []
    table = [["", "member", *(heading for title in columns for heading in (f"{title}: alone", "added"))]]
    for k, member in enumerate(members):
        cells = [cell for alone, added in columns.values() for cell in (alone[k], added[k])]
        table.append([str(k), f"`{_code(member['architecture'])}`", *cells])
    return table


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
            f"{short_name(study, row)} {row.gflops:,.0f} GFLOP, "
            + ("equal compute" if abs(share - 1) <= 0.01 else f"{share:.2f} times as much")
        )
    return f"Training {subject.name} took {subject.gflops:,.0f} GFLOP; {'; '.join(told)}."


def row_texts(study: Results, row: Row) -> dict[str, str]:
    """A row of a study's table, as people read it."""
    low, high = row.interval
    shown = {
        "name": short_name(study, row),
        "num_members": str(row.num_members or ""),
        "width": f"{row.num_features:,}",
        "parameters": "" if row.cost is None else _three_digits(row.cost.million_parameters),
        "gflops": "" if row.cost is None else _three_digits(row.cost.gflops),
        "speed": "" if row.cost is None or not row.cost.seconds else f"{1 / row.cost.seconds:,.0f}",
        "steps": "" if row.steps is None else f"{row.steps:,}",
        "top1": f"{100 * row.mean:.1f}",
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "draws": "" if row.resample_deviation is None else f"{100 * row.resample_deviation:.1f}",
        "paired": "",
        "p": "",
    }
    if row is not study.rows[0]:
        mean, interval, p = study.difference(study.rows[0].name, row.name)
        known = math.isfinite(interval[0])
        shown |= {"paired": points(mean, interval), "p": "" if not known else "<0.001" if p < 0.001 else f"{p:.3f}"}
    return shown


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(study: Results) -> str:
    """What the table says about the concatenation, in words, for and against."""
    subject = study.rows[0]
    best = best_member(study)
    others = [row for row in study.rows if row.kind in ("baseline", "control")]
    compared = [
        _compared(study, subject, row, "its best, " if row is best else "") for row in [*filter(None, [best]), *others]
    ]
    text = f"{subject.name} is {'; '.join(compared)}." if compared else ""
    narrowed = [row for row in study.rows if row.kind == "projected"]
    if best and narrowed:
        at = "; ".join(f"by {row.name.rpartition(', ')[2]} {_compared(study, row, best)}" for row in narrowed)
        text += f" At one member's width: {at}."
    if rival := _rival(study):
        text += f" **{rival.name.capitalize()} do about as well, so this dataset does not show that the members' features are of use.**"
    return text


def against(study: Results) -> str:
    """What the table says against it: the other ways to as much or more."""
    subject, best = study.rows[0], best_member(study)
    found = {"better": [], "not beaten beyond chance": [], "not beaten at one member's width": []}
    for row in study.rows[1:]:
        _, (low, high), _ = study.difference(subject.name, row.name)
        if low > 0 or (row.kind == "member" and row is not best):
            continue
        kept = "not beaten at one member's width" if row.kind == "projected" else "not beaten beyond chance"
        found["better" if high < 0 else kept].append(short_name(study, row))
    told = [f"{what}: {'; '.join(names)}." for what, names in found.items() if names]
    if rival := _rival(study):
        told.append(f"within 5 points or better: {rival.name}.")
    return (
        " ".join(sentence[0].upper() + sentence[1:] for sentence in told) or "It beats all that it was compared with."
    )


def _rival(study: Results) -> Row | None:
    """The better control, where it does about as well as the ensemble."""
    controls = [row for row in study.rows if row.name in ("untrained members", "raw pixels")]
    rival = max(controls, key=lambda row: row.mean, default=None)
    return rival if rival and rival.mean > study.rows[0].mean - 0.05 else None


def _compared(study: Results, row: Row, other: Row, what: str = "") -> str:
    gap, (low, high), _ = study.difference(row.name, other.name)
    name = f"{what}{short_name(study, other)}"
    if f"{abs(100 * gap):.1f}" == "0.0":
        return f"level with {name}"
    doubt = "" if low > 0 or high < 0 else " (not beyond chance)"
    return f"{abs(100 * gap):.1f} points {'above' if gap > 0 else 'below'} {name}{doubt}"
