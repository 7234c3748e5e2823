"""What results record about the weights and the software that they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from concat_ensemble.members.provenance import read_provenances

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
    from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel

PACKAGES = ("concat-ensemble", "torch", "timm", "transformers", "scikit-learn")


def members_sha256(config: ConcatEnsembleConfig) -> list[str]:
    """SHA-256 of each built member's weights, which ties results to these weights; empty where the config has none."""
    return [provenance.weights_sha256 for provenance in read_provenances(config)]


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    return {package: version(package) for package in PACKAGES}


def training_cost(
    model: ConcatEnsemblePreTrainedModel, positions: Sequence[int] | None = None
) -> tuple[int | None, float | None]:
    """Training steps and training GFLOP of some built members together, by position; of all when left out. Either is
    None when a member's provenance does not state it."""
    provenances = read_provenances(model.config)
    members = provenances if positions is None else [provenances[k] for k in positions]
    steps = [member.steps for member in members if member.steps is not None]
    gflops = [member.compute.gflops for member in members if member.compute and member.compute.gflops is not None]
    return (sum(steps) if len(steps) == len(members) else None), (sum(gflops) if len(gflops) == len(members) else None)
