"""What a config says about where its members' weights come from, which anybody may have written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from concat_ensemble.schema import Amount, Count, Seed, Text, check_type

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig


@dataclass
class Compute:
    """What a training cost."""

    gflops: Amount | None = None
    images: Count = 0


@dataclass
class FineTuned:
    """A further training of the weights that the rest of a provenance is about."""

    dataset: Text | None = None
    steps: Count | None = None


@dataclass
class Provenance:
    """The keys of a member's provenance that cards and results use; others stay in the config alone."""

    source: Text | None = None
    hub_id: Text | None = None
    revision: Text | None = None
    license: Text | None = None
    pretraining_data: Text | None = None
    objective: Text | None = None
    steps: Count | None = None
    seed: Seed | None = None
    compute: Compute | None = None
    command: Text | None = None
    ensemble_recipe: Text | None = None
    recipe: dict[str, Any] | None = None  # of the training
    weights: Text | None = None  # "EMA" or "teacher", if they are such averages
    weights_sha256: Text = ""
    label_names: list[Text] | None = None
    dataset: Text | None = None  # of a distillation
    fine_tuned: FineTuned | None = None


def read_provenances(config: ConcatEnsembleConfig) -> list[Provenance]:
    """The provenance of each built member. Raises ValueError naming the member and the key of a value of another type
    than `Provenance` has."""
    provenances = []
    for k in config.built_members:
        try:
            provenances.append(check_type(config.members[k]["provenance"], Provenance, f"members[{k}].provenance"))
        except ValueError as error:
            raise ValueError(f"the ensemble's config: {error}; correct or remove it in config.json.") from error
    return provenances
