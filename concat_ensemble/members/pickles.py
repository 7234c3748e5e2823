"""Reading pickled checkpoints without running anything that is in them.

`torch.load(weights_only=True)` makes tensors, plain containers and types of a list; anything else is refused. Here,
the list has stand-ins for the types that training scripts store beside the weights, so that not even the code of these
types runs, such as that of numpy for the state of a dtype, which a stranger may have made up.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from concat_ensemble.errors import first_line
from concat_ensemble.modeling.weights_concat_ensemble import MAX_UNPACKED


class Attributes(dict):
    """In place of an `argparse.Namespace`: a dict of its attributes."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"the state of a Namespace is {type(state).__name__}, not dict")
        self.update(state)


class PlainDict:
    """In place of a subclass of dict: making one gives an empty dict, which the unpickler fills."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class Placeholder:
    """In place of a value that is not needed, such as a metric: it ignores its content."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> "Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: dict[type, tuple[str, ...]] = {
    Attributes: ("argparse.Namespace", "types.SimpleNamespace"),
    PlainDict: (
        "collections.defaultdict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ),
    Placeholder: (
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list")),
        *(f"builtins.{name}" for name in ("range", "slice", "str", "tuple")),
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *("numpy.dtype", "numpy.ndarray", "torch.torch_version.TorchVersion"),
        *(f"pathlib.{local}{system}Path" for local in ("", "_local.") for system in ("Posix", "Windows")),
    ),
}


def refuse_bomb(path: Path) -> None:
    """Raise ValueError for a zip file that unpacks to far more than its size, because weights hardly compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile):  # whoever reads the file reports this
        return
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path} would unpack to {unpacked:,} bytes, too many for weights; use a trusted source.")


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save`. An `argparse.Namespace` comes out as a dict, and numpy's values as placeholders.

    Raises:
        ValueError: for a file that is damaged or would unpack to too much, and for one with objects of another type.
    """
    refuse_bomb(path)
    try:
        with _allow_stand_ins():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = f"{path} holds more than tensors{f', such as {named[1]}' if named else ''}"
        remedy = 'torch.save(torch.load(FILE, weights_only=False)["state_dict"], "weights.pth")'
        advice = "if you trust its author, save its weights alone in Python, or as .safetensors"
        raise ValueError(f"{problem}, and loading that could run code; {advice}: {remedy}.") from error
    except Exception as error:  # torch raises errors of any kind for a damaged file
        problem = f"{path} is not a whole PyTorch checkpoint ({first_line(error)})"
        raise ValueError(f"{problem}; fetch or save it again.") from error


@contextmanager
def _allow_stand_ins() -> Iterator[None]:
    """Allow the stand-ins, and nothing that this process allows elsewhere, such as numpy's own scalars."""
    allowed = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([(kind, name) for kind, names in STAND_INS.items() for name in names])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(allowed)
