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
from accelerate.utils import RNG_STATE_NAME
from timm.models import save_for_hf
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.files import replace_folder, without_folders, write_json
from concat_ensemble.members.origins import remove_origin
from concat_ensemble.schema import Amount, Count, check_type, decode_json
from concat_ensemble.training.images import TEST_SIZE, Images
from concat_ensemble.training.recipe import Settings

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
    `images`, which it was trained on. Its licence is that of its provenance, where it starts from other weights, else
    the one that the settings name, if any. It replaces `folder` in one step.
    """
    pixels = {**dataclasses.asdict(images.pixels), "crop_mode": "center"}
    named = provenance.get("license") or images.settings.license
    license = {"license": named} if named else {}
    config = {"pretrained_cfg": pixels | license, "provenance": provenance | license}
    config["label_names"] = images.class_names
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = timm.create_model(architecture, num_classes=model.num_classes, **model_args)
    plain.load_state_dict(weights, assign=True)
    remove_origin(plain)
    layout = {"model_config": config, "model_args": model_args, "data_config": pixels}
    with replace_result(folder, identity) as aside:
        save_for_hf(plain, str(aside), safe_serialization=True, **layout)


def public_dataset(settings: Settings) -> str:
    """The name of a training's dataset as its provenance has it: of a path on this machine only the last part, which
    cannot be taken for an id on the Hub."""
    name = without_folders(settings.dataset)
    return Path(name).name if Path(settings.dataset).exists() else name


@contextmanager
def replace_result(folder: Path, identity: dict) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder`, with its state file, when the block ends without an error."""
    with replace_folder(folder) as aside:
        yield aside
        write_json(aside / STATE_FILE, {"identity": _public_values(identity)})


def matches_identity(folder: Path, identity: dict, settings: Settings) -> bool:
    """Whether a checkpoint or a result exists. It must be from the training with this identity. A field of the
    settings that its own identity lacks was added later: it had the value that is now the default.

    Raises:
        ValueError: if it is from another training, or from none.
    """
    if not folder.exists():
        return False
    there, here = _public_values(read_state(folder).identity), _public_values(identity)
    there = {key: value for key, value in _public_values(settings.defaults()).items() if key in here} | there
    if there.get("test_size") == TEST_SIZE and here.get("test_size") is None:
        there["test_size"] = None  # the default of older versions; `data` says whether that makes a difference
    for key in sorted(here.keys() | there.keys()):
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{folder} is of another training: its {key} is {_shorten(there.get(key))}, here "
                f"{_shorten(here.get(key))}. Continue that training, name another output=, or delete the folder."
            )
    return True


def check_processes(checkpoint: Path, num_processes: int) -> None:
    """Raise ValueError if a checkpoint was saved by another number of processes: how batches are divided and which
    random numbers are used would be those of neither training.
    """
    before = len(list(checkpoint.glob(f"{RNG_STATE_NAME}_*.pkl")))  # one for each process
    if before != num_processes:
        raise ValueError(
            f"{checkpoint} was saved by {before} process{'es' if before > 1 else ''}, and now there would be "
            f"{num_processes}. Launch as many as before with the same --parallelism, or delete {checkpoint.parent} to "
            "train this network anew."
        )


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
