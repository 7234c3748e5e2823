"""Whether the numbers on a card can be reproduced: everything is probed again, and compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from concat_ensemble.data.loading import SCATTERED
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.data.sources import DIGITS
from concat_ensemble.errors import argument, describe_error, first_line
from concat_ensemble.files import describe_missing_folder, is_hub_id
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel
from concat_ensemble.studies.claims import Check, compare_results
from concat_ensemble.studies.options import ProbeOptions
from concat_ensemble.studies.probe_study import probe_repeats
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results

SUBSET = ("limit", "shots", "seed", "group_column")  # what goes with a recipe


def verify_ensemble(
    folder: Path,
    model: ConcatEnsembleModel,
    *,
    datasets: Sequence[str] = (),
    baselines: Sequence[str] = (),
    **extraction,
) -> list[Check]:
    """Probe an ensemble again on every dataset of the results in `folder`, as they say that it was done, and compare.

    Only datasets on the Hub and those that come with this package are loaded, since a stranger may have written the
    results: `datasets` names others. A dataset that cannot be loaded, or results of something other than a linear
    probe, are a check that does not hold.

    Args:
        folder: Of the ensemble.
        model: The ensemble.
        datasets: Names of your own copies of datasets that are not on the Hub. One serves all results; of several,
            each those that name it.
        baselines: The baselines of the results, as `probe` takes them; "NAME=ENSEMBLE" for one with another name.
        extraction: The fields of `ExtractionOptions`.

    Raises:
        ValueError: for no results, or results of other weights than `model`'s.
    """
    checks, options = [], ExtractionOptions(**extraction)
    for path in sorted((folder / RESULTS).glob("*.json")):
        study = Results.load(path)
        if study.members_sha256 != members_sha256(model.config):
            raise ValueError(f"{path} was measured on other weights than the files in {folder} have; probe again.")
        try:
            again = measure_again(study, model, datasets=datasets, baselines=baselines, extraction=options)
        except (ValueError, OSError) as error:
            dataset, row = describe_dataset(study.dataset), study.rows[0]
            checks.append(Check(dataset, row.name, row.mean, metric=study.metric, differences=[describe_error(error)]))
        else:
            checks += compare_results(study, again)
    if not checks:
        raise ValueError(f"{folder} has no results of a probe; make some with concat-ensemble probe {folder}.")
    return checks


def measure_again(
    study: Results,
    model: ConcatEnsembleModel,
    *,
    datasets: Sequence[str] = (),
    baselines: Sequence[str] = (),
    extraction: ExtractionOptions,
) -> Results:
    """The results of `probe` with the dataset, the seeds and the options that results record. Raises ValueError or
    OSError where there is no such dataset or probe."""
    if study.probe.get("kind") != "linear":
        raise ValueError(f"{study.probe.get('kind')!r} is no linear probe, and nothing else is measured again")
    dataset = read_dataset(study.dataset, datasets)
    options = ProbeOptions(
        repeats=study.repeats,
        metric=study.metric,
        class_weight=study.probe.get("class_weight"),
        controls=study.controls,
    )
    about = {"baselines": _find_baselines(study, baselines), "options": options, "extraction": extraction}
    again = probe_repeats(model, study.ensemble, dataset, **about).results
    if dataset.name in datasets:  # by its own name here; its images are compared
        own_path = {key: study.dataset[key] for key in ("name", "path_sha256") if key in study.dataset}
        again.dataset = {key: again.dataset[key] for key in again.dataset if key != "path_sha256"} | own_path
    if again.audit and (dataset.record["name"] == DIGITS or dataset.record["name"].startswith(SCATTERED)):
        for key in ("sha256", "test_sha256"):
            again.audit.pop(key)  # these images are made here, by libraries that may compress them otherwise
    return again


def _find_baselines(study: Results, baselines: Sequence[str]) -> dict[str, str]:
    """The ensembles, by the names of the rows in the results that they are for."""
    rows, sources = {row.name for row in study.rows if row.kind == "baseline"}, {}
    for text in baselines:
        name, _, source = text.partition("=")
        if not source or name not in rows:
            name, source = Path(text).name, text
        if name in rows:
            sources[name] = source
    return sources


def read_dataset(recorded: dict[str, Any], own: Sequence[str] = ()) -> DatasetOptions:
    """The options of `probe` for a dataset that results record, where it is on the Hub or comes with this package, or
    else one of the user's `own` in its place. Raises ValueError for any other, and for values that are no options."""
    fields = [field.name for field in dataclasses.fields(DatasetOptions)]
    names = ("recipe", *SUBSET) if recorded.get("recipe") else fields
    values = {name: recorded[name] for name in names if name in recorded}
    if values.get("classes"):
        values["classes"] = ",".join(map(str, values["classes"]))
    options = msgspec.convert(values, DatasetOptions)
    name = options.record["name"] if options.name is None else options.name  # "" is no default
    if name in own:
        return options
    if is_public(name):
        if str(options.record.get("revision")).startswith("refs/pr/"):
            raise ValueError(f"revision={options.revision!r} is a pull request, which anybody can open; probe again")
        return options
    if len(own) == 1 and not options.recipe:
        return dataclasses.replace(options, name=own[0])
    problem = f"{name!r} is not a dataset on the Hub, or also a path here, which results do not open by themselves"
    raise ValueError(f"{problem}; name your copy of it with {argument('datasets')}, such as imagefolder:FOLDER")


def is_public(name: str) -> bool:
    """Whether a dataset's name can only mean one on the Hub or one that comes with this package."""
    plain = name.removeprefix(SCATTERED)
    if plain == DIGITS:
        return True
    try:
        validate_repo_id(plain)
    except HFValidationError:
        return False
    return "/" in plain and not Path(plain).exists()


def fetch_ensemble(ensemble: str, revision: str | None = None) -> Path:
    """The folder of an ensemble, downloaded where `ensemble` is a Hub id. Raises ValueError if it is neither."""
    if Path(ensemble).is_dir():
        return Path(ensemble)
    if not is_hub_id(ensemble):
        raise FileNotFoundError(describe_missing_folder(ensemble))
    try:
        return Path(snapshot_download(ensemble, revision=revision, library_name="concat-ensemble"))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        problem = f"{ensemble} is neither a folder nor on the Hub ({first_line(error)})"
        raise ValueError(f"{problem}; check its name, or log in with hf auth login.") from error
