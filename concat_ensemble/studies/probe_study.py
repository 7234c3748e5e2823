"""Probing ensembles on datasets, both by name: a results file for each dataset, and none is measured twice.

run_probe_study("two-resnets", DatasetOptions(name="digits")).results
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import DatasetDict

from concat_ensemble.console import errors
from concat_ensemble.data.audit import audit_splits
from concat_ensemble.data.bad_images import without_rows
from concat_ensemble.data.images import image_hashes
from concat_ensemble.data.labels import class_names
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.errors import argument
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel, ConcatEnsemblePreTrainedModel
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.processes import continue_alone, process_state
from concat_ensemble.studies.controls import untrained_like
from concat_ensemble.studies.ensembles import is_local_ensemble, load_ensemble
from concat_ensemble.studies.measuring import class_scores
from concat_ensemble.studies.options import CONTROLS, ProbeOptions
from concat_ensemble.studies.outputs import check_own_folder, check_parent
from concat_ensemble.studies.probing import probe_ensemble, with_head
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, UNTRAINED, Results


class Predictions(NamedTuple):
    """What the ensemble's probe of the first repeat predicts on the test images."""

    images: Sequence[dict[str, Any]]  # N, encoded
    labels: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N, C)
    class_names: list[str]


@dataclass
class ProbeStudy:
    """Results on one dataset, their file, and whether they were measured now. For `ProbeOptions.errors` also where the
    page of errors belongs and, if it is to be written, what it shows."""

    results: Results
    path: Path
    is_new: bool
    errors_page: Path | None = None
    predictions: Predictions | None = None


@dataclass
class ProbeStudies:
    """Studies and failures by the name of the dataset."""

    finished: dict[str, ProbeStudy] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


def run_probe_study(
    model: str,
    dataset: DatasetOptions,
    options: ProbeOptions | None = None,
    extraction: ExtractionOptions | None = None,
) -> ProbeStudy:
    """Probe one ensemble on one dataset, or read the results of an earlier run; see `run_probe_studies`."""
    (study,) = run_probe_studies(model, [dataset], options, extraction).finished.values()
    return study


def run_probe_studies(
    model: str,
    datasets: Sequence[DatasetOptions],
    options: ProbeOptions | None = None,
    extraction: ExtractionOptions | None = None,
    *,
    on_study: Callable[[ProbeStudy], None] = lambda study: None,
) -> ProbeStudies:
    """Probe an ensemble on one or several datasets and write a results file for each; results that exist are read.

    `model` is a folder or Hub id of an ensemble, or any member that `assemble` accepts. `on_study` is called after
    each dataset. Raises ValueError for options that do not go together, and the ValueError or OSError of a dataset
    where there is only one; of several, one that fails does not stop the others.

    Under `accelerate launch` the processes share the extraction for all datasets, where the first failure is raised,
    and then all but the main one end.
    """
    options, extraction = options or ProbeOptions(), extraction or ExtractionOptions()
    _check_options(model, datasets, options)
    for dataset in datasets:
        dataset.record  # noqa: B018 (an unknown recipe is an error before the work)
    ensemble = load_ensemble(model, datasets[0].seed)
    loaded = {}
    if process_state().num_processes > 1:
        new = [dataset for dataset in datasets if not _read_study(ensemble, model, dataset, options)]
        loaded = {dataset: _extract_all(ensemble, dataset, options, extraction) for dataset in new}
        continue_alone()
    studies = ProbeStudies()
    for dataset in datasets:
        try:
            repeats = loaded.get(dataset)
            study = _run_study(ensemble, model, dataset, options=options, extraction=extraction, repeats=repeats)
            on_study(study)
            studies.finished[dataset.study] = study
        except (ValueError, OSError) as error:
            if len(datasets) == 1:
                raise
            studies.failures[dataset.study] = error
    return studies


def _check_options(model: str, datasets: Sequence[DatasetOptions], options: ProbeOptions) -> None:
    chosen = [argument(name) for name in ("output", "save_head") if getattr(options, name)]
    if len(datasets) > 1 and chosen:
        problem = f"more than one {argument('recipe')} does not go with {' and '.join(chosen)}"
        raise ValueError(f"{problem}; leave one out.")
    if options.save_head and not is_local_ensemble(model):
        problem = f"{argument('save_head', True)} writes into the ensemble's folder"
        raise ValueError(f"{problem}, and {model} is not a folder here.")
    name, others = Path(model).name, [Path(baseline).name for baseline in (options.baselines or [])]
    if len({name, *others}) <= len(others):
        named = f"{argument('baselines')} {' and '.join(others)} beside {name}"
        raise ValueError(f"{named}: they share a name; rename a folder.")


def _run_study(
    ensemble: ConcatEnsembleModel,
    model: str,
    dataset: DatasetOptions,
    *,
    options: ProbeOptions,
    extraction: ExtractionOptions,
    repeats: list[DatasetDict] | None,
) -> ProbeStudy:
    if study := _read_study(ensemble, model, dataset, options):
        if not extraction.quiet:
            again = f"{argument('overwrite', True)} probes again"
            errors.print(f"{study.path} is there already; {again}.", soft_wrap=True)
        return study
    path, page = _find_files(model, dataset, options)
    about = {"baselines": _name_baselines(options), "options": options, "extraction": extraction}
    first = probe_repeats(ensemble, Path(model).name, dataset, **about, repeats=repeats)
    first.results.save(path)
    if options.save_head:
        with_head(ensemble, first.probe, class_names(first.data["train"])).save_pretrained(Path(model))
    predictions = _predict(ensemble, first, extraction) if page else None
    return ProbeStudy(first.results, path, is_new=True, errors_page=page, predictions=predictions)


def _find_files(model: str, dataset: DatasetOptions, options: ProbeOptions) -> tuple[Path, Path | None]:
    """Where the results belong, and the page of errors. Raises ValueError for a folder."""
    home = Path(model) if is_local_ensemble(model) else Path()
    path = options.output or home / RESULTS / f"{dataset.file_stem}.json"
    if path.is_dir():
        example = argument("output", str(path / "probe.json"))
        raise ValueError(f"{path} is a folder; name a results file, as in {example}.")
    return path, find_errors_page(model, path) if options.errors else None


def _read_study(
    ensemble: ConcatEnsembleModel, model: str, dataset: DatasetOptions, options: ProbeOptions
) -> ProbeStudy | None:
    """The study of an earlier run, or None if there is none. Raises ValueError or OSError where its results are
    others, or new ones cannot be written."""
    path, page = _find_files(model, dataset, options)
    if not path.exists() or options.overwrite:
        if options.output is None and is_local_ensemble(model):
            check_own_folder(path.parent)
        check_parent(path)
        return None
    results = Results.load(path)
    has_head = not options.save_head or (Path(model) / "head.safetensors").is_file()
    is_whole = has_head and (page is None or page.is_file())
    if not is_whole or not _is_same(results, ensemble, dataset, options):
        problem = f"{path} holds the results of other weights, data or settings, or lacks a repeat, a baseline, "
        problem += "controls, the head or the page of errors"
        raise ValueError(f"{problem}; add {argument('overwrite', True)}, or name another {argument('output')}.")
    return ProbeStudy(results, path, is_new=False, errors_page=page)


def _extract_all(
    ensemble: ConcatEnsembleModel, dataset: DatasetOptions, options: ProbeOptions, extraction: ExtractionOptions
) -> list[DatasetDict]:
    """Store the features of every network that `probe_repeats` measures. Returns the splits of each repeat."""
    repeats = load_repeats(dataset, options.repeats)
    networks: list[tuple[str, ConcatEnsemblePreTrainedModel]] = [("features", ensemble)]
    baselines = _load_baselines(_name_baselines(options), dataset.seed)
    networks += [(f"features: {name}", baseline) for name, baseline in baselines.items()]
    if options.controls == "all":
        networks.append((f"features: {UNTRAINED}", untrained_like(ensemble, dataset.seed)))
    for splits in repeats:
        data = audit_splits(splits).data
        for title, network in networks:
            extract_features(network, data, title=title, **dataclasses.asdict(extraction))
    return repeats


def _name_baselines(options: ProbeOptions) -> dict[str, str]:
    """What `probe_repeats` takes."""
    return {Path(other).name: other for other in options.baselines or []}


def _load_baselines(baselines: Mapping[str, str], seed: int) -> dict[str, ConcatEnsemblePreTrainedModel]:
    return {row_name: load_ensemble(other, seed) for row_name, other in baselines.items()}


def find_errors_page(model: str, results: Path) -> Path:
    """Where the page of errors belongs: beside the results file, but never into the ensemble's folder, which `push`
    publishes, since the page shows images."""
    folder, name = Path(model).resolve(), f"{results.stem}-errors.html"
    if is_local_ensemble(model) and folder in results.resolve().parents:
        return Path(os.path.relpath(folder.parent / f"{folder.name}-{name}"))
    return results.with_name(name)


def _is_same(results: Results, ensemble: ConcatEnsembleModel, dataset: DatasetOptions, options: ProbeOptions) -> bool:
    """Whether results of an earlier run are those that this run would give, perhaps with more controls."""
    same_weights = results.members_sha256 == members_sha256(ensemble.config)
    same_data = dataset.is_recorded(results.dataset) and results.repeats == options.repeats
    same_probe = options.metric in (None, results.metric) and options.class_weight == results.probe.get("class_weight")
    has_controls = CONTROLS.index(results.controls) >= CONTROLS.index(options.controls)
    has_baselines = all(Path(name).name in results for name in options.baselines or [])
    return same_weights and same_data and same_probe and has_controls and has_baselines


class FirstRepeat(NamedTuple):
    """The results of all repeats, with the data and the ensemble's probe of the first."""

    results: Results
    data: DatasetDict
    probe: LinearProbe


def probe_repeats(
    ensemble: ConcatEnsembleModel,
    name: str,
    dataset: DatasetOptions,
    *,
    baselines: Mapping[str, str],
    options: ProbeOptions,
    extraction: ExtractionOptions,
    repeats: list[DatasetDict] | None = None,
) -> FirstRepeat:
    """Probe an ensemble, called `name`, once for each repeat, with the dataset's seed and those after it. `baselines`
    are names of rows and of the ensembles that are loaded for them. `repeats` are those of `load_repeats`, if they are
    loaded already."""
    repeats = load_repeats(dataset, options.repeats) if repeats is None else repeats
    others = _load_baselines(baselines, dataset.seed)
    measured, firsts, metric = [], [], options.metric
    for seed, splits in enumerate(repeats, start=dataset.seed):
        if options.repeats > 1 and not extraction.quiet:
            errors.print(f"repeat {len(measured) + 1} of {options.repeats}")
        audited = audit_splits(splits)
        results, probe = probe_ensemble(
            ensemble,
            audited.data,
            name=name,
            described=dataset.describe(audited),
            audit=audited.audit,
            baselines=others,
            controls=options.controls,
            metric=metric,
            class_weight=options.class_weight,
            seed=seed,
            untrained_seed=dataset.seed,  # the same networks in every repeat, which run each image once
            **dataclasses.asdict(extraction),
        )
        measured.append(results)
        metric = results.metric  # of the first repeat, since the audit of another may suggest another
        firsts = firsts or [(audited.data, probe)]
    merged = Results.merged(measured)
    merged.command = options.command
    [(data, probe)] = firsts
    return FirstRepeat(merged, data, probe)


def _predict(ensemble: ConcatEnsembleModel, first: FirstRepeat, extraction: ExtractionOptions) -> Predictions:
    """Predict the test images, whose features are stored by now."""
    quiet = dataclasses.replace(extraction, quiet=True)
    table = extract_features(ensemble, first.data, **dataclasses.asdict(quiet))
    probabilities = np.exp(class_scores(first.probe, table))
    images = without_rows(first.data, table.skipped)["test"]["image"]
    return Predictions(images, table["test"].labels, probabilities, table.class_names)


def load_repeats(dataset: DatasetOptions, number: int) -> list[DatasetDict]:
    """The splits of each repeat. Raises ValueError where the seed changes neither the test images nor, for scattered
    ones, their places."""
    repeats = [dataclasses.replace(dataset, seed=dataset.seed + k).load_splits() for k in range(number)]
    if number > 1 and not dataset.shots and image_hashes(repeats[0]["test"]) == image_hashes(repeats[1]["test"]):
        reason = f"since {dataset.record['name']} has a test split of its own"
        remedy = f"draw from it with {argument('limit')} or {argument('shots')}, or leave {argument('repeats')} out."
        raise ValueError(f"{argument('repeats', number)} would measure the same images each time, {reason}; {remedy}")
    return repeats
