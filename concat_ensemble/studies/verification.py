"""Whether the numbers on a card come out again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from torch import nn

from concat_ensemble.data.dataset_recipes import dataset_recipe
from concat_ensemble.data.loading import load_data
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.errors import first_line
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.studies.probing import members_sha256, probe_again
from concat_ensemble.studies.results import RESULTS, Results

NAMING = ("name", "config", "revision", "image_column", "label_column", "classes", "train_split", "validation_split", "test_split", "test_size")  # fmt: skip
DRAWN = ("limit", "shots", "seed")


@dataclass
class Check:
    """One number, measured again. All are shares."""

    dataset: str
    name: str
    card: float  # over all repeats
    run: float  # of the repeat that these weights made
    interval: tuple[float, float]  # its 95%, over test images
    again: float

    @property
    def holds(self) -> bool:
        return self.interval[0] <= self.again <= self.interval[1]

    @property
    def told(self) -> dict:
        return dataclasses.asdict(self) | {"holds": self.holds}


def verify_ensemble(folder: Path, model: nn.Module, **extraction) -> list[Check]:
    """Probe the ensemble of `folder`, its prefixes and its members again on every dataset of its results.

    Raises:
        ValueError: when the results were measured on other weights than `model` has, there
            are none, or a dataset cannot be had.
    """
    found = []
    for path in sorted((folder / RESULTS).glob("*.json")):
        study = Results.load(path)
        if study.members_sha256 != members_sha256(model.config):
            raise ValueError(f"{path} was measured on other weights than the files in {folder} hold; probe again.")
        if study.probe.get("kind") != "linear":
            continue  # a fine-tuning is not a probe of these features
        dataset, seed = study.dataset, study.dataset.get("seed", 0)
        again = probe_again(model, load_recorded_dataset(dataset), study.ensemble, seed, **extraction)
        for row in (row for row in study.rows if row.name in again):
            run = next((run for run in row.runs if run.seed == seed), row.runs[0])
            top1, interval = run.metrics["top1"], wilson_interval(run.metrics["top1"], run.n_test)
            found.append(Check(describe_dataset(dataset), row.name, row.mean, top1, interval, again[row.name]))
    if not found:
        raise ValueError(f"{folder} has no results of a linear probe; make some with concat-ensemble probe {folder}.")
    return found


def load_recorded_dataset(recorded: dict):
    """The dataset of a results file, as it was asked for."""
    drawn = {key: recorded[key] for key in DRAWN if key in recorded}
    if recorded.get("recipe"):
        return dataset_recipe(recorded["recipe"]).load(**drawn)
    return load_data(**{key: recorded[key] for key in NAMING if key in recorded}, **drawn)


def fetched(ensemble: str, revision: str | None = None) -> Path:
    """The folder itself, or a copy of the Hub's.

    Raises:
        ValueError: when there is neither.
    """
    if Path(ensemble).is_dir():
        return Path(ensemble)
    try:
        return Path(snapshot_download(ensemble, revision=revision, library_name="concat-ensemble"))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{ensemble} is neither a folder nor on the Hub ({first_line(error)}); check its name, or log in with hf auth login."
        ) from error
