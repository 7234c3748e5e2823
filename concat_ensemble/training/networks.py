"""Networks before their training: with random weights, or with the weights of another training under a new head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.files import without_folders
from concat_ensemble.members.assemble import assemble
from concat_ensemble.training.recipe import NetworkSettings

# What a network's provenance says of the training before it.
STATED = ("hub_id", "revision", "license", "pretraining_data", "objective", "steps", "weights", "weights_sha256")


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a backbone that a training starts from."""

    tensors: Mapping[str, torch.Tensor]
    provenance: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, str]:
        """What distinguishes these weights from others, for the identity of a training."""
        return {"initial_weights_sha256": self.provenance["weights_sha256"]} if self.tensors else {}

    def describe(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """The provenance of a network that is trained from these weights."""
        if not self.tensors:
            return provenance
        first = {key: self.provenance[key] for key in ("source", *STATED) if self.provenance.get(key) is not None}
        seen = first.get("pretraining_data") or f"the data of {first['source']}"
        data = {"initial_weights": first, "pretraining_data": f"{seen}; then {provenance['pretraining_data']}"}
        return provenance | data | {key: first[key] for key in ("license",) if key in first}


def read_initial_weights(settings: NetworkSettings) -> InitialWeights:
    """Read the weights that a training starts from, which are none where it starts from random ones.

    Raises:
        ValueError, FileNotFoundError: if the source has no single network of the settings' architecture.
    """
    source = settings.initial_source
    if source is None:
        return InitialWeights({}, {})
    if "=" not in source and Path(source).is_file():
        source = f"{settings.architecture.split('.')[0]}={source}"
    return _read(source, settings.architecture, json.dumps(settings.model_args))


def create_network(settings: NetworkSettings, num_classes: int, model_args: dict[str, Any]) -> Any:
    """Create a timm model. Its head is always random."""
    network = timm.create_model(settings.architecture, num_classes=num_classes, **model_args)
    initial = read_initial_weights(settings).tensors
    if initial:  # all but the head is there, and nothing else
        network.load_state_dict(initial, strict=False)
    return network


def check_buildable(settings: NetworkSettings, model_args: dict[str, Any]) -> None:
    """Raise ValueError if timm cannot create a network, or the network cannot take an image."""
    try:
        with torch.device("meta"):
            network: nn.Module = timm.create_model(settings.architecture, num_classes=2, **model_args)
            if settings.gradient_checkpointing:
                network.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
            network(torch.zeros(2, *settings.input_size))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        checkpointing = " and gradient_checkpointing=True" if settings.gradient_checkpointing else ""
        raise ValueError(
            f"architecture={settings.architecture} with model_args={model_args}{checkpointing} must be a network for "
            f"images of input_size={settings.input_size}; timm says: {first_line(error)}."
        ) from error


@lru_cache(maxsize=1)  # every network of a recipe starts from the same ones
def _read(source: str, architecture: str, model_args: str) -> InitialWeights:
    ensemble = assemble(source, model_args=json.loads(model_args))
    names = [member["architecture"] for member in ensemble.config.members]
    if names != [architecture.split(".")[0]]:
        expected = f"one network of architecture={architecture}"
        raise ValueError(f"initial_checkpoint={source} must hold {expected}, not {', '.join(names)}.")
    (backbone,) = ensemble.members.values()
    return InitialWeights(
        backbone.state_dict(), ensemble.config.members[0]["provenance"] | {"source": without_folders(source)}
    )
