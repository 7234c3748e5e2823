"""Whether the numbers on a card can be reproduced."""

from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from concat_ensemble.data.audit import audit_splits
from concat_ensemble.data.dataset_recipes import LOAD_ARGUMENTS, dataset_recipe
from concat_ensemble.data.loading import load_data
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.errors import first_line
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel
from concat_ensemble.studies.measuring import ProbeSettings
from concat_ensemble.studies.probing import probe_again
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results, Row

# The arguments of `load_data` that a results file records: which images there are, and which of them are used.
SOURCE_ARGUMENTS = (*LOAD_ARGUMENTS, "classes", "test_size", "use_folders")
SAMPLING_ARGUMENTS = ("limit", "shots", "seed", "group_column")


@dataclass
class Check:
    """One number, the metric of its results, measured again. All are shares."""

    dataset: str
    name: str
    card: float  # mean over all repeats
    run: float  # the repeat that was measured with these weights
    interval: tuple[float, float]  # 95%, of `run` over the test images
    again: float
    metric: str = "top1"

    @property
    def holds(self) -> bool:
        return self.interval[0] <= self.again <= self.interval[1]


def verify_ensemble(folder: Path, model: ConcatEnsemblePreTrainedModel, **extraction) -> list[Check]:
    """Probe an ensemble and its parts again on every dataset of the results in `folder`. Raises ValueError for no
    results, results of other weights than `model`'s, or a dataset that cannot be loaded."""
    checks = []
    for path in sorted((folder / RESULTS).glob("*.json")):
        study = Results.load(path)
        if study.members_sha256 != members_sha256(model.config):
            raise ValueError(f"{path} was measured on other weights than the files in {folder} have; probe again.")
        if study.probe.get("kind") == "linear":  # fine-tuning is not a probe of these features
            checks += _verify_study(study, model, **extraction)
    if not checks:
        raise ValueError(f"{folder} has no results of a linear probe; make some with concat-ensemble probe {folder}.")
    return checks


def load_recorded_dataset(study: Results) -> DatasetDict:
    """Load the dataset that results were measured on, with the same images in each split. Results from before there
    was an audit were measured on all of them."""
    recorded = study.dataset
    sampling = {key: recorded[key] for key in SAMPLING_ARGUMENTS if key in recorded}
    if recorded.get("recipe"):
        data = dataset_recipe(recorded["recipe"]).load(**sampling)
    else:
        data = load_data(**{key: recorded[key] for key in SOURCE_ARGUMENTS if key in recorded}, **sampling)
    return data if study.audit is None else audit_splits(data).data


def fetch_ensemble(ensemble: str, revision: str | None = None) -> Path:
    """The folder of an ensemble, downloaded where `ensemble` is a Hub id. Raises ValueError if it is neither."""
    if Path(ensemble).is_dir():
        return Path(ensemble)
    try:
        return Path(snapshot_download(ensemble, revision=revision, library_name="concat-ensemble"))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        problem = f"{ensemble} is neither a folder nor on the Hub ({first_line(error)})"
        raise ValueError(f"{problem}; check its name, or log in with hf auth login.") from error


def _verify_study(study: Results, model: ConcatEnsemblePreTrainedModel, **extraction) -> list[Check]:
    seed = study.dataset.get("seed", 0)
    settings = ProbeSettings.from_record(study.probe, seed)
    again = probe_again(model, load_recorded_dataset(study), study.ensemble, settings, **extraction)
    checks = []
    for row in study.rows:
        if row.name in again:
            run = next((run for run in row.runs if run.seed == seed), row.runs[0])
            single = Row(row.name, row.kind, row.num_features, runs=[run])
            single.metric = study.metric
            name = describe_dataset(study.dataset)
            checks.append(Check(name, row.name, row.mean, single.mean, single.interval, again[row.name], study.metric))
    return checks
