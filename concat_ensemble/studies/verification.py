"""Whether the numbers on a card can be reproduced."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from concat_ensemble.data.dataset_recipes import LOAD_ARGUMENTS, dataset_recipe
from concat_ensemble.data.loading import load_data
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.errors import first_line
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.studies.probing import probe_again
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results

# The arguments of `load_data` that a results file records: which images there are, and which of them are used.
SOURCE_ARGUMENTS = (*LOAD_ARGUMENTS, "classes", "test_size")
SAMPLING_ARGUMENTS = ("limit", "shots", "seed")


@dataclass
class Check:
    """One number, measured again. All are shares."""

    dataset: str
    name: str
    card: float  # mean over all repeats
    run: float  # the repeat that was measured with these weights
    interval: tuple[float, float]  # 95%, of `run` over the test images
    again: float

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


def load_recorded_dataset(recorded: dict[str, Any]) -> DatasetDict:
    """Load the dataset that a results file describes, with the same images in each split."""
    sampling = {key: recorded[key] for key in SAMPLING_ARGUMENTS if key in recorded}
    if recorded.get("recipe"):
        return dataset_recipe(recorded["recipe"]).load(**sampling)
    return load_data(**{key: recorded[key] for key in SOURCE_ARGUMENTS if key in recorded}, **sampling)


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
    top1 = probe_again(model, load_recorded_dataset(study.dataset), study.ensemble, seed, **extraction)
    checks = []
    for row in study.rows:
        if row.name in top1:
            run = next((run for run in row.runs if run.seed == seed), row.runs[0])
            share, name = run.metrics["top1"], describe_dataset(study.dataset)
            interval = wilson_interval(share, run.n_test)
            checks.append(Check(name, row.name, row.mean, share, interval, top1[row.name]))
    return checks
