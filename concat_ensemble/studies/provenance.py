"""What results record about the weights and the software that they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
    from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsemblePreTrainedModel

PACKAGES = ("concat-ensemble", "torch", "timm", "transformers", "scikit-learn")


def members_sha256(config: ConcatEnsembleConfig) -> list[str]:
    """SHA-256 of each built member's weights, which ties results to these weights; empty where the config has none."""
    return [config.members[k]["provenance"].get("weights_sha256", "") for k in config.built_members]


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    return {package: version(package) for package in PACKAGES}


def training_cost(
    model: ConcatEnsemblePreTrainedModel, positions: Sequence[int] | None = None
) -> tuple[int | None, float | None]:
    """Training steps and training GFLOP of some built members together, by position; of all when left out. Either is
    None when a member's provenance does not state it."""
    built = model.config.built_members
    members = built if positions is None else [built[k] for k in positions]
    provenances = [model.config.members[k]["provenance"] for k in members]
    steps: list[Any] = [provenance.get("steps") for provenance in provenances]
    gflops: list[Any] = [(provenance.get("compute") or {}).get("gflops") for provenance in provenances]
    return None if None in steps else sum(steps), None if None in gflops else sum(gflops)
