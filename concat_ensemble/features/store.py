"""Features on disk: one folder (block) per member, in which a row is found by the hash of its image.

What a member computes (weights, architecture, arguments, preprocessing, dtypes) decides the name of its block, and the
bytes of an image decide its row. So nothing stale can be read, and a limit, another split, a shuffle or a copy of the
dataset finds the rows that are there.

The rows of an image are the same up to rounding, about 1e-5 of the largest feature, however they were extracted; the
same bits come out where the batches are of the same images, and no other member of the pass has the same geometry with
another mean or std: such a member normalizes the other's pixels anew.

Shards are safetensors files: for 50,000 x 2,048 float32, `datasets` (Arrow) takes 16 times as long to write them, 1.5
times to read them all and 4 times to read some at random (tests/benchmarks/feature_storage.py, on 2 cores).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock
from huggingface_hub import cached_assets_path, constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from concat_ensemble.data.images import HASH_BYTES
from concat_ensemble.errors import describe_error
from concat_ensemble.features.index import HASH, HashIndex, to_bytes, to_hashes
from concat_ensemble.features.table import Rows
from concat_ensemble.files import replace_file, write_json
from concat_ensemble.members.checkpoints import weights_sha256

logger = logging.getLogger(__name__)

ABOUT = "about.json"  # names the architecture, for people, and the format
ROW_BITS = 32  # of the number of a row within its shard
FORMAT = 1  # of a block; 0.1.0 did not state it
# What decides the output of PEFT's and quanto's layers and is not among their weights.
LAYER_SETTINGS = ("active_adapters", "disable_adapters", "scaling", "weight_qtype", "activation_qtype")


def default_store() -> Path:
    """The folder of all blocks by default, in `HF_ASSETS_CACHE`. Raises OSError where it cannot be made."""
    try:
        return cached_assets_path("concat-ensemble", namespace="features")
    except (OSError, ValueError) as error:  # ValueError: a file is in its place
        reason = error.strerror if isinstance(error, OSError) else "a file is in its place"
        problem = f"features cannot be stored in {constants.HF_ASSETS_CACHE} ({reason})"
        raise OSError(f"{problem}; set HF_ASSETS_CACHE to a folder that can be written.") from error


def block_key(backbone: nn.Module, fields: dict[str, Any]) -> str:
    """Name of a member's block: a hash of its live weights and of what else decides its features, such as the
    settings of adapters and of quantized layers. Provenance is no part of it: fine-tuning changes the weights and
    leaves the provenance as it was."""
    fields = fields | {"weights": weights_sha256(backbone.state_dict())}
    settings = {
        layer: {name: str(getattr(module, name, None)) for name in LAYER_SETTINGS}
        for layer, module in backbone.named_modules()
        if hasattr(module, "active_adapters") or hasattr(module, "weight_qtype")
    }
    if settings:
        fields["layers"] = settings
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Block:
    """One member's features of all images that it was run on, in a folder.

    Every shard is written beside its final name and renamed, so a kill leaves whole shards only. It carries a
    checksum, so a damaged shard is noticed when it is opened; it is removed, and its images are extracted again. A
    whole shard of another kind, which is not from this member, is refused.

    Args:
        folder: Of the block.
        architecture: Of the member.
        num_features: Numbers in a row. Default: as many as the first shard has.
        dtype: Of the rows. Default: that of the first shard.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str = "unknown",
        *,
        num_features: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.folder, self.architecture = folder, architecture
        self._num_features, self._dtype = num_features, dtype
        self._shards: list[np.ndarray] = []
        self._index = HashIndex()  # image hash -> shard << ROW_BITS | row
        self._opened: set[str] = set()  # file names

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock to hold while extracting into this block; other extractions wait, and then find the rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"architecture": self.architecture, "format": FORMAT}
        with FileLock(self.folder / ".lock"):
            if _read_about(self.folder) != about:
                write_json(self.folder / ABOUT, about)
            yield

    def refresh(self) -> Block:
        """Open the shards that are new on disk; returns the block itself. Raises ValueError for a shard of rows of
        another length or dtype, and for a block in the format of another version."""
        if (version := _read_about(self.folder).get("format", FORMAT)) != FORMAT:
            problem = f"{self.folder} is in format {version!r} of another version of concat-ensemble"
            raise ValueError(f"{problem}, which must be {FORMAT}; delete the folder, or set HF_ASSETS_CACHE.")
        for path in _shard_paths(self.folder):
            if path.name in self._opened:
                continue
            try:
                images, features = _open_shard(path)
            except SafetensorError as error:
                logger.warning("%s is damaged (%s); its images are extracted again", path, error)
                path.unlink(missing_ok=True)
                continue
            if mismatch := self._describe_mismatch(features):
                raise ValueError(f"{path} has {mismatch}; delete it, and its images are extracted again.")
            self._num_features, self._dtype = features.shape[1], features.dtype
            self._opened.add(path.name)
            self._index.add(images, (len(self._shards) << ROW_BITS) + np.arange(len(images)))
            self._shards.append(features.numpy())
        return self

    def _describe_mismatch(self, features: torch.Tensor) -> str:
        """How rows differ from those of the block; empty where they do not, and where these are not known yet."""
        num_features, dtype = self._num_features or features.shape[1], self._dtype or features.dtype
        if (features.shape[1], features.dtype) == (num_features, dtype):
            return ""
        rows = f"rows of {features.shape[1]:,} numbers in {features.dtype}"
        return f"{rows} that must be {num_features:,} in {dtype}"

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64: where the row of each image is, -1 where the block has none."""
        return self._index.find(hashes)

    def missing(self, images: Iterable[bytes]) -> set[bytes]:
        """Those of these images that have no row in the block."""
        hashes = to_hashes(images)
        return set(to_bytes(hashes[self.find(hashes) < 0]))

    def write(self, images: Sequence[bytes], features: torch.Tensor) -> None:
        """Store the rows (n, D) of n images as one shard. The same images give the same file name, so that work done
        twice is stored once. Raises ValueError for rows that are not like the others of the block, and OSError if the
        disk is full; stored features are not touched."""
        if mismatch := self._describe_mismatch(features):
            raise ValueError(f"{self.architecture} gives {mismatch}; correct num_features in its config.")
        content = b"".join(images)
        hashes = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(len(images), HASH_BYTES).copy())
        tensors = {"features": features.contiguous(), "images": hashes}
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:24]}.safetensors"
        try:
            with replace_file(path) as aside:
                save_file(tensors, aside, metadata={"checksum": _checksum(hashes, features)})
        except (OSError, SafetensorError) as error:
            remedy = "free some space or set HF_ASSETS_CACHE to a larger disk. Stored features are not touched."
            raise OSError(f"cannot write features to {self.folder} ({describe_error(error)}); {remedy}") from error

    def rows(self, images: Sequence[bytes] | np.ndarray) -> StoredRows:
        """The rows (n, D) of n images in this order, read when they are sliced. Raises KeyError for an image that has
        none."""
        places = self.find(to_hashes(images))
        if len(places) and places.min() < 0:
            raise KeyError(f"{np.count_nonzero(places < 0):,} images have no row in {self.folder}")
        return StoredRows(self._shards, places)


class StoredRows(Rows):
    """Rows of a block in the order of a dataset, memory-mapped. Row i is in the shard `places[i] >> ROW_BITS`."""

    def __init__(self, shards: list[np.ndarray], places: np.ndarray):
        super().__init__((len(places), shards[0].shape[1]), shards[0].dtype)
        self._shards, self._places = shards, places

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        places = self._places[part]
        shard, row = places >> ROW_BITS, places & ((1 << ROW_BITS) - 1)
        out = np.empty((len(row), self.shape[1]), self.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            out[here] = self._shards[number][row[here]]
        return out


def stored_blocks(store: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """What is in a store: for each block its `key`, `architecture`, `images`, `num_features`, `bytes`, `idle_days`
    since it was last read, and `damaged`, the shards that were removed. Only `verify` reads and removes shards."""
    blocks = []
    for folder in sorted(path for path in store.glob("[!.]*") if path.is_dir()):
        shards = _shard_paths(folder)
        if verify:
            Block(folder).refresh()
        whole = [path for path in shards if path.exists()]
        shapes = [_shard_shape(path) for path in whole]
        last_read = max((path.stat().st_atime for path in [folder, *whole]), default=time.time())
        block = {
            "key": folder.name,
            "architecture": str(_read_about(folder).get("architecture", "unknown")),
            "images": sum(rows for rows, _ in shapes),
            "num_features": shapes[0][1] if shapes else 0,
            "bytes": sum(path.stat().st_size for path in whole),
            "idle_days": (time.time() - last_read) / 86_400,
            "damaged": len(shards) - len(whole),
        }
        blocks.append(block)
    return blocks


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _read_about(folder: Path) -> dict[str, Any]:
    """What a block's file says; nothing where it is missing or damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, RecursionError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _shard_shape(path: Path) -> tuple[int, int]:
    try:
        with safe_open(path, framework="pt") as file:
            rows, num_features = file.get_slice("features").get_shape()
            return rows, num_features
    except (SafetensorError, ValueError):
        return 0, 0


def _open_shard(path: Path) -> tuple[np.ndarray, torch.Tensor]:
    """Hashes of the images, and their features (n, D), memory-mapped. Raises SafetensorError for a damaged file, and
    ValueError for one that does not hold these two."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if not _is_shard({name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}):
            remedy = "delete it, and its images are extracted again"
            raise ValueError(f"{path} does not hold a hash and a row of features for each image; {remedy}.")
        images, features = file.get_tensor("images"), file.get_tensor("features")
        checksum = (file.metadata() or {}).get("checksum")
    if checksum != _checksum(images, features):
        raise SafetensorError("its checksum is wrong")
    return images.numpy().view(HASH).reshape(-1), features


def _is_shard(tensors: dict[str, tuple[str, list[int]]]) -> bool:
    """Whether tensors, by name with dtype and shape, are n hashes and n rows of features."""
    if tensors.keys() != {"images", "features"}:
        return False
    (kind, shape), (dtype, rows) = tensors["images"], tensors["features"]
    return kind == "U8" and dtype in ("F32", "F16") and len(rows) == 2 and shape == [rows[0], HASH_BYTES]


def _checksum(images: torch.Tensor, features: torch.Tensor) -> str:
    digest = xxhash.xxh3_128(images.numpy().data)
    digest.update(features.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
