"""Weights on disk: one safetensors file per member, one for a head or projection, and an index. Since a checkpoint
may come from a stranger, its names, files and shapes are checked before any weight takes memory."""

import filecmp
import json
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from .configuration_concat_ensemble import check_json_size

INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"(?:member-(?P<member>\d+)|projection|head|model)(?:-\d{5}-of-\d{5})?\.safetensors")
MAX_HEADER, MAX_TENSORS, MAX_NAME = 2**24, 100_000, 500  # bytes of JSON, tensors of a file, characters of their names
MAX_UNPACKED = 10  # times the size on disk; trained weights shrink to 0.9, all-zero ones to a thousandth
ASIDE = ".saving-"  # how the folder is called in which files are written before they replace others
CARD_FILES = ("README.md", "LICENSE.md", "results/*.json", "figures/*.png", ".eval_results/*.yaml")


def part_name(key: str) -> str:
    """The part of an ensemble that has this weight, and its file's name: `member-00`, ..., `projection` or `head`."""
    if member := re.match(r"members\.(\d+)\.", key):
        return f"member-{int(member[1]):02d}"
    return "projection" if key.startswith("projection.") else "head"


@contextmanager
def open_checkpoint(
    name, expected: dict[str, torch.Tensor], with_head: bool, hub_arguments: dict, *, allow_pickles: bool = False
) -> Iterator[str]:
    """Find or fetch the files of the parts that a model has, and check them. Yield where transformers shall load from:
    `name`, or a temporary folder with an index of these files alone, since it fetches every file that an index names.

    Args:
        name: A folder or a repo on the Hub. `hub_arguments`: Such as `revision`, `subfolder` and `token`.
        expected: The model's weights without its head, of which keys, shapes and identity matter: of a tensor with
            several names, one must be there. `with_head`: If it has one.
        allow_pickles: Whether transformers may read pickles where there are no safetensors.

    Raises:
        ValueError: if the checkpoint has no weights of these parts, or not those that are expected.
        OSError: for a file that is missing, broken, or named outside the folder.
    """
    optional = {**hub_arguments, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(name, "model.safetensors", **optional)
    index_path = None if single else cached_file(name, INDEX_NAME, **optional)
    if single:
        _check_shapes([single], expected, name)
    parts = {part_name(key) for key in expected} | ({"head"} if with_head else set())
    if index_path is None:  # transformers says that there are no weights, or reads pickles if it is allowed to
        if allow_pickles and not single:
            _check_pickles(name, expected, parts, hub_arguments)
        yield name
        return
    shards = _select_shards(index_path, parts)
    names = sorted(set(shards.values()))
    paths = map(os.path.abspath, cached_files(name, names, **hub_arguments) or ())
    files = dict(zip(names, paths, strict=True))
    _check_shapes(list(files.values()), expected, name)
    index = {"metadata": {}, "weight_map": {key: files[shard] for key, shard in shards.items()}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, hub_arguments.get("subfolder", ""), INDEX_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(index))
        yield folder


def _select_shards(index_path: str, parts: set[str]) -> dict[str, str]:
    """Name of the file by key of the weight, for the files that hold these parts."""
    try:
        check_json_size(index_path)
        weight_map = json.loads(Path(index_path).read_text())["weight_map"]
        unsafe = sorted(shard for shard in set(weight_map.values()) if not re.fullmatch(r"[A-Za-z0-9._-]+", shard))
        needed = {shard for key, shard in weight_map.items() if part_name(key) in parts}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise OSError(f"{index_path} is not an index of weights ({error!r}); fetch or save it again.") from error
    if unsafe:
        raise OSError(f"{index_path} is an index with the bad file name {unsafe[0]!r}; fetch or save it again.")
    if not needed:
        raise ValueError(f"{index_path} has no weights of {', '.join(sorted(parts))}; choose other active_members.")
    return {key: shard for key, shard in weight_map.items() if shard in needed}


def _check_pickles(name, expected: dict[str, torch.Tensor], parts: set[str], hub_arguments: dict) -> None:
    """Raise ValueError if pickles are too small for the expected weights, before a model is allocated."""
    optional = {**hub_arguments, "_raise_exceptions_for_missing_entries": False}
    files = [cached_file(name, WEIGHTS_NAME, **optional)]
    if files[0] is None:
        index_path = cached_file(name, WEIGHTS_INDEX_NAME, **optional)
        shards = sorted(set(_select_shards(index_path, parts).values())) if index_path else []
        files = cached_files(name, shards, **hub_arguments) or () if shards else ()
    needed = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in expected.values()}.values())
    if files and needed > MAX_UNPACKED * sum(map(os.path.getsize, files)):
        refuse_misfit(list(expected), [], name)


def open_safetensors(path: str | Path) -> safe_open:
    """As `safe_open(path, "pt")`. Raises SafetensorError also for more and longer names than any network has."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise SafetensorError(f"its header of {length:,} bytes has more than {MAX_HEADER:,}")
    weights = safe_open(path, framework="pt")
    names = weights.keys()
    if len(names) > MAX_TENSORS or max(map(len, names), default=0) > MAX_NAME:
        raise SafetensorError(f"it has more than {MAX_TENSORS:,} tensors or names of more than {MAX_NAME} characters")
    return weights


def _check_shapes(files: list[str], expected: dict[str, torch.Tensor], name) -> None:
    """Raise ValueError unless the files hold the expected weights and no others, before a model is allocated."""
    shapes = {}
    for file in files:
        try:
            with open_safetensors(file) as weights:
                shapes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise OSError(f"{file} is not a whole safetensors file ({error}); fetch or save it again.") from error
    _check_fit(shapes, expected, name)
    _check_tied(files, expected, name)


def _check_fit(shapes: dict[str, list[int]], expected: dict[str, torch.Tensor], name) -> None:
    """Raise ValueError unless there are the expected shapes, and no others of the parts that are expected."""
    parts = {part_name(key) for key in expected}
    stored = {id(tensor) for key, tensor in expected.items() if key in shapes}  # tied weights under any of their names
    needed = {key: tensor for key, tensor in expected.items() if key in shapes or id(tensor) not in stored}
    missing = [key for key, tensor in needed.items() if shapes.get(key) != list(tensor.shape)]
    refuse_misfit(missing, [key for key in shapes if key not in expected and part_name(key) in parts], name)


def _check_tied(files: list[str], expected: dict[str, torch.Tensor], name) -> None:
    """Raise ValueError if a tensor that is stored under several names has several values."""
    names, first = Counter(map(id, expected.values())), {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in filter(lambda key: names[id(expected.get(key))] > 1, weights.keys()):
                tensor = weights.get_tensor(key)
                if not torch.equal(tensor, first.setdefault(id(expected[key]), tensor)):
                    raise ValueError(f"{key} in {name} must equal the weights it is tied to; save the model again.")


def refuse_misfit(missing: list[str], unexpected: list[str], name) -> None:
    """Raise ValueError if a checkpoint lacks weights or has others than its config asks for."""
    if missing or unexpected:
        misfit = f"{len(missing)} missing {sorted(missing)[:3]}; {len(unexpected)} unexpected {sorted(unexpected)[:3]}"
        raise ValueError(f"the weights in {name} do not fit its config: {misfit}.")


def check_savable(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    """Raise ValueError unless a model that expects these keys, shapes and ties could load the weights from files."""
    for key, tensor in weights.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
            kind = "one without memory" if getattr(tensor, "is_meta", False) else type(tensor).__name__
            remedy = "save the model before it is quantized or sharded, and do so again after loading"
            raise ValueError(f"{name} cannot be saved: {key} is no plain tensor but {kind}; {remedy}.")
    try:
        _check_fit({key: list(tensor.shape) for key, tensor in weights.items()}, expected, name)
        others = [key for key in weights if key not in expected and key.startswith(("members.", "projection."))]
        refuse_misfit([], others, name)
    except ValueError as error:
        remedy = "undo what changed its layers, such as quantization"
        raise ValueError(f"{name} could not be loaded again: {error} To save it, {remedy}.") from error


def holds_weights(name: str | Path, commit: str | None, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a folder, or a repo in the cache, holds exactly these weights, up to their dtype."""
    options = {"revision": commit, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    try:
        file = cached_file(name, INDEX_NAME, **options) if str(name) else None
        if file is None:
            return False
        shards = json.loads(Path(file).read_text())["weight_map"]
        if not weights.keys() <= shards.keys():
            return False
        for shard in {shards[key] for key in weights}:
            path = cached_file(name, shard, **options)
            with open_safetensors(path) as stored:
                for key in weights.keys() & set(stored.keys()):
                    tensor = weights[key].detach().cpu()
                    if not torch.equal(stored.get_tensor(key).to(tensor.dtype), tensor):
                        return False
    except (OSError, LookupError, TypeError, ValueError, SafetensorError):  # no folder, or none of an ensemble
        return False
    return True


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder within `folder` to write to. Its files replace those of `folder` only when the block ends
    without an error: first the weights, at last their index. Shards that a new index does not name are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{ASIDE}*"):  # by a process that was killed
        writer = re.fullmatch(r"(\d{1,9})-\d+", left_over.name.removeprefix(ASIDE))
        if not (writer and _is_running(int(writer[1]))):
            shutil.rmtree(left_over, ignore_errors=True)
    aside = folder / f"{ASIDE}{os.getpid()}-{threading.get_native_id()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        files = sorted(aside.iterdir(), key=lambda path: (path.name == INDEX_NAME, path.suffix != ".safetensors"))
        for path in files:  # renamed, not copied: a loaded model's tensors may be the old file, mapped into memory
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors gives access to the owner alone
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if files and files[-1].name == INDEX_NAME:
        shards = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
        for path in folder.glob("*.safetensors"):
            if SHARD_NAME.fullmatch(path.name) and path.name not in shards:
                path.unlink()


def _is_running(process: int) -> bool:
    """Whether this machine has a process of this number. On Windows, where asking would stop it, none counts."""
    try:
        if os.name == "posix":
            os.kill(process, 0)
        return os.name == "posix"
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True


def save_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write a file or more per part, and the index."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        parts.setdefault(part_name(key), {})[key] = tensor
    weight_map = {}
    for part, tensors in parts.items():
        pattern = f"{part}{{suffix}}.safetensors"
        split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
        for file, keys in split.filename_to_tensors.items():
            shard = {key: tensors[key].detach().cpu().contiguous() for key in keys}
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(keys, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def list_saved_members(folder: Path) -> set[int]:
    """Numbers of the members whose weights are in the folder."""
    matches = (SHARD_NAME.fullmatch(path.name) for path in folder.glob("member-*.safetensors"))
    return {int(match["member"]) for match in matches if match}


def copy_card(source: Path, folder: Path) -> bool:
    """Copy card, results and figures, but no links, from `source` if it has the same weights as `folder`. Returns
    whether it has."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    if not source.is_dir() or any(filecmp.cmpfiles(source, folder, weights, shallow=False)[1:]):
        return False
    for file in [file for pattern in CARD_FILES for file in source.glob(pattern)]:
        if file.resolve() == source.resolve() / file.relative_to(source):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
    return True
