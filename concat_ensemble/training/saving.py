"""What a training leaves behind: networks in timm's layout, and beside each result the identity of its training."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.files import replace_folder, without_folders, write_json
from concat_ensemble.schema import Amount, Count, check_type, decode_json
from concat_ensemble.training.images import Images

STATE_FILE = "training.json"  # in each checkpoint and each result


def save_network(
    model: nn.Module,
    folder: Path,
    *,
    architecture: str,
    model_args: dict,
    images: Images,
    provenance: dict,
    identity: dict,
) -> None:
    """Save a network in timm's own layout, with or without its head, and with the preprocessing and class names of
    `images`, which it was trained on. It replaces `folder` in one step.
    """
    pixels = {**dataclasses.asdict(images.pixels), "crop_mode": "center"}
    pretrained_cfg = {**pixels, "license": "apache-2.0"}
    config = {"pretrained_cfg": pretrained_cfg, "provenance": provenance, "label_names": images.class_names}
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = timm.create_model(architecture, num_classes=model.num_classes, **model_args)
    plain.load_state_dict(weights, assign=True)
    layout = {"model_config": config, "model_args": model_args, "data_config": pixels}
    with replace_result(folder, identity) as aside:
        save_for_hf(plain, str(aside), safe_serialization=True, **layout)


@contextmanager
def replace_result(folder: Path, identity: dict) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder`, with its state file, when the block ends without an error."""
    with replace_folder(folder) as aside:
        yield aside
        write_json(aside / STATE_FILE, {"identity": _public_values(identity)})


def matches_identity(folder: Path, identity: dict) -> bool:
    """Whether a checkpoint or a result exists. It must be from the training with this identity.

    Raises:
        ValueError: if it is from another training, or from none.
    """
    if not folder.exists():
        return False
    there, here = _public_values(read_state(folder).identity), _public_values(identity)
    for key in sorted(here.keys() | there.keys()):
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{folder} is of another training: its {key} is {_shorten(there.get(key))}, here "
                f"{_shorten(here.get(key))}. Continue that training, name another output=, or delete the folder."
            )
    return True


@dataclass
class TrainingState:
    """The state file of a training; a result has no step."""

    identity: dict[str, Any] = field(default_factory=dict)
    step: Count = 0
    seconds: Amount = 0.0
    log: dict[str, Any] = field(default_factory=dict)  # of the logbook
    best: list[dict[str, Any] | None] = field(default_factory=list)  # best evaluation of each network, with its step


def read_state(folder: Path) -> TrainingState:
    """Read the training's state file in a checkpoint or a result."""
    try:
        return check_type(decode_json(folder / STATE_FILE), TrainingState)
    except (OSError, ValueError) as error:
        problem = f"{folder} has no readable {STATE_FILE} of a training ({first_line(error)})"
        raise ValueError(f"{problem}; name another output=, or delete the folder.") from error


def _public_values(identity: dict) -> dict:
    """Plain JSON values without the folders of this machine: a result may be published, and its data may be moved."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items()}
        if isinstance(value, list):
            return [strip(each) for each in value]
        return without_folders(value) if isinstance(value, str) else value

    return strip(json.loads(json.dumps(identity)))


def _shorten(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
