"""Probing ensembles on datasets, both by name: a results file for each dataset, and none is measured twice.

run_probe_study("two-resnets", DatasetOptions(name="digits")).results
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from concat_ensemble.console import errors
from concat_ensemble.data.labels import class_names
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel
from concat_ensemble.studies.ensembles import is_local_ensemble, load_ensemble
from concat_ensemble.studies.options import ProbeOptions
from concat_ensemble.studies.outputs import check_parent
from concat_ensemble.studies.probing import probe_ensemble, with_head
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results


@dataclass
class ProbeStudy:
    """Results on one dataset, their file, and whether they were measured now."""

    results: Results
    path: Path
    is_new: bool


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
    """
    options, extraction = options or ProbeOptions(), extraction or ExtractionOptions()
    _check_options(model, datasets, options)
    for dataset in datasets:
        dataset.record  # noqa: B018 (an unknown recipe is an error before the work)
    ensemble = load_ensemble(model, datasets[0].seed)
    studies = ProbeStudies()
    for dataset in datasets:
        try:
            study = _run_study(ensemble, model, dataset, options=options, extraction=extraction)
            on_study(study)
            studies.finished[dataset.study] = study
        except (ValueError, OSError) as error:
            if len(datasets) == 1:
                raise
            studies.failures[dataset.study] = error
    return studies


def _check_options(model: str, datasets: Sequence[DatasetOptions], options: ProbeOptions) -> None:
    single = {"--output": options.output, "--save-head": options.save_head}
    chosen = [option for option, value in single.items() if value]
    if len(datasets) > 1 and chosen:
        raise ValueError(f"more than one --recipe does not go with {' and '.join(chosen)}; leave one out.")
    if options.save_head and not is_local_ensemble(model):
        raise ValueError(f"--save-head writes into the ensemble's folder, and {model} is not a folder here.")
    name, others = Path(model).name, [Path(baseline).name for baseline in (options.baselines or [])]
    if len({name, *others}) <= len(others):
        raise ValueError(f"--baseline {' and '.join(others)} beside {name}: they share a name; rename a folder.")


def _run_study(
    ensemble: ConcatEnsembleModel,
    model: str,
    dataset: DatasetOptions,
    *,
    options: ProbeOptions,
    extraction: ExtractionOptions,
) -> ProbeStudy:
    folder = Path(model)
    home = folder if is_local_ensemble(model) else Path()
    path = options.output or home / RESULTS / f"{dataset.file_stem}.json"
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a results file, as in --output {path / 'probe.json'}.")
    if path.exists() and not options.overwrite:
        results = Results.load(path)
        has_head = (folder / "head.safetensors").is_file()
        if not _is_same(results, ensemble, dataset, options) or (options.save_head and not has_head):
            problem = f"{path} holds the results of other weights or data, or lacks a repeat, a baseline or the head"
            raise ValueError(f"{problem}; add --overwrite, or name another --output.")
        if not extraction.quiet:
            errors.print(f"{path} is there already; --overwrite probes again.", soft_wrap=True, markup=False)
        return ProbeStudy(results, path, is_new=False)
    check_parent(path)
    _check_repeats(dataset, options.repeats)
    results, head = _probe_repeats(ensemble, folder.name, dataset, options=options, extraction=extraction)
    results.save(path)
    if options.save_head:
        head().save_pretrained(folder)
    return ProbeStudy(results, path, is_new=True)


def _is_same(results: Results, ensemble: ConcatEnsembleModel, dataset: DatasetOptions, options: ProbeOptions) -> bool:
    """Whether results of an earlier run are those that this run would give."""
    same_weights = results.members_sha256 == members_sha256(ensemble.config)
    same_data = dataset.record.items() <= results.dataset.items() and results.repeats == options.repeats
    return same_weights and same_data and all(Path(name).name in results for name in options.baselines or [])


def _probe_repeats(
    ensemble: ConcatEnsembleModel,
    name: str,
    dataset: DatasetOptions,
    *,
    options: ProbeOptions,
    extraction: ExtractionOptions,
) -> tuple[Results, Callable[[], ConcatEnsembleForImageClassification]]:
    """The results of all repeats, and a function that makes a classifier of the first repeat's probe."""
    baselines = {Path(other).name: load_ensemble(other, dataset.seed) for other in (options.baselines or [])}
    repeats, probes, names = [], [], []
    for seed in range(dataset.seed, dataset.seed + options.repeats):
        if options.repeats > 1 and not extraction.quiet:
            errors.print(f"repeat {len(repeats) + 1} of {options.repeats}")
        data = dataclasses.replace(dataset, seed=seed).load()
        about = {"name": name, "described": dataset.describe(data), "baselines": baselines, "seed": seed}
        results, probe = probe_ensemble(ensemble, data, **about, **dataclasses.asdict(extraction))
        repeats.append(results)
        probes.append(probe)
        names = class_names(data["train"])
    merged = Results.merged(repeats)
    merged.command = options.command
    return merged, lambda: with_head(ensemble, probes[0], names)


def _check_repeats(dataset: DatasetOptions, repeats: int) -> None:
    """Raise ValueError where the seed changes neither the test images nor, for scattered ones, their places."""
    if repeats == 1 or dataset.shots:
        return
    first, second = (dataclasses.replace(dataset, seed=dataset.seed + number).load()["test"] for number in range(2))
    if list(first["label"]) == list(second["label"]) and first[0]["image"] == second[0]["image"]:
        reason = f"since {dataset.record['name']} has a test split of its own"
        remedy = "draw from it with --limit or --shots, or leave --repeats out."
        raise ValueError(f"--repeats {repeats} would measure the same images each time, {reason}; {remedy}")
