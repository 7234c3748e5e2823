"""Features on disk: one folder (block) per member, in which a row is found by the hash of its image.

What a member computes (weights, architecture, arguments, preprocessing, dtypes) decides the name of its block, and the
bytes of an image decide its row. So nothing stale can be read, and a limit, another split, a shuffle or a copy of the
dataset finds the rows that are there.

Shards are safetensors files: for 50,000 x 2,048 float32, `datasets` (Arrow) takes 16 times as long to write them, 1.5
times to read them all and 4 times to read some at random (tests/benchmarks/feature_storage.py, on 2 cores).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from concat_ensemble.data.images import HASH_BYTES
from concat_ensemble.features.table import Rows
from concat_ensemble.files import replace_file
from concat_ensemble.members.checkpoints import weights_sha256

logger = logging.getLogger(__name__)

ABOUT = "about.json"  # names the architecture, for people
# What decides the output of PEFT's and quanto's layers and is not among their weights.
LAYER_SETTINGS = ("active_adapters", "disable_adapters", "scaling", "weight_qtype", "activation_qtype")


def default_store() -> Path:
    """The folder of all blocks by default, in `HF_ASSETS_CACHE`."""
    return cached_assets_path("concat-ensemble", namespace="features")


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
    checksum, so a damaged shard is noticed when it is opened; it is removed, and its images are extracted again.
    """

    def __init__(self, folder: Path, architecture: str = "unknown"):
        self.folder, self.architecture = folder, architecture
        self._shards: list[np.ndarray] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # image hash -> (shard, row)
        self._opened: set[str] = set()  # file names

    def lock(self) -> FileLock:
        """Lock to hold while extracting into this block; other extractions wait, and then find the rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABOUT).write_text(json.dumps({"architecture": self.architecture}))
        return FileLock(self.folder / ".lock")

    def refresh(self) -> Block:
        """Open the shards that are new on disk; returns the block itself."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._opened:
                continue
            try:
                images, features = _open_shard(path)
            except (SafetensorError, ValueError) as error:
                logger.warning("%s is damaged (%s); its images are extracted again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._opened.add(path.name)
            self._places |= {image: (len(self._shards), row) for row, image in enumerate(images)}
            self._shards.append(features)
        return self

    def missing(self, images: Iterable[bytes]) -> set[bytes]:
        """Those of these images that have no row in the block."""
        return {image for image in images if image not in self._places}

    def write(self, images: Sequence[bytes], features: torch.Tensor) -> None:
        """Store the rows (n, D) of n images as one shard. The same images give the same file name, so that work done
        twice is stored once. Raises OSError if the disk is full; stored features are not touched."""
        content = b"".join(images)
        hashes = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(len(images), HASH_BYTES).copy())
        tensors = {"features": features.contiguous(), "images": hashes}
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:24]}.safetensors"
        try:
            with replace_file(path) as aside:
                save_file(tensors, aside, metadata={"checksum": _checksum(hashes, features)})
        except (OSError, SafetensorError) as error:
            remedy = "free some space or set HF_ASSETS_CACHE to a larger disk. Stored features are not touched."
            raise OSError(f"cannot write features to {self.folder} ({error}); {remedy}") from error

    def rows(self, images: Sequence[bytes]) -> StoredRows:
        """The rows (n, D) of n images in this order, read when they are sliced."""
        places = np.array([self._places[image] for image in images], dtype=np.int64).reshape(-1, 2)
        return StoredRows(self._shards, places[:, 0], places[:, 1])


class StoredRows(Rows):
    """Rows of a block in the order of a dataset, memory-mapped. Row i is `shards[shard[i]][row[i]]`."""

    def __init__(self, shards: list[np.ndarray], shard: np.ndarray, row: np.ndarray):
        super().__init__((len(row), shards[0].shape[1]), shards[0].dtype)
        self._shards, self._shard, self._row = shards, shard, row

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        shard, row = self._shard[part], self._row[part]
        out = np.empty((len(row), self.shape[1]), self.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            out[here] = self._shards[number][row[here]]
        return out


def stored_blocks(store: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """What is in a store: for each block its `key`, `architecture`, `images`, `num_features`, `bytes`, `idle_days`
    since it was last read, and `damaged`, the shards that were removed. Only `verify` reads and removes shards."""
    blocks = []
    for folder in sorted(path for path in store.iterdir() if path.is_dir()):
        shards = sorted(folder.glob("*.safetensors"))
        if verify:
            Block(folder).refresh()
        whole = [path for path in shards if path.exists()]
        shapes = [_shard_shape(path) for path in whole]
        about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else {}
        last_read = max((path.stat().st_atime for path in [folder, *whole]), default=time.time())
        block = {
            "key": folder.name,
            "architecture": about.get("architecture", "unknown"),
            "images": sum(rows for rows, _ in shapes),
            "num_features": shapes[0][1] if shapes else 0,
            "bytes": sum(path.stat().st_size for path in whole),
            "idle_days": (time.time() - last_read) / 86_400,
            "damaged": len(shards) - len(whole),
        }
        blocks.append(block)
    return blocks


def _shard_shape(path: Path) -> tuple[int, int]:
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("features").get_shape())
    except SafetensorError:
        return 0, 0


def _open_shard(path: Path) -> tuple[list[bytes], np.ndarray]:
    """Hashes of the images, and their features (n, D), memory-mapped."""
    with safe_open(path, framework="pt") as file:
        images, features = file.get_tensor("images"), file.get_tensor("features")
        checksum = (file.metadata() or {}).get("checksum")
    if checksum != _checksum(images, features):
        raise ValueError("its checksum is wrong")
    content = images.numpy().tobytes()
    return [content[start : start + HASH_BYTES] for start in range(0, len(content), HASH_BYTES)], features.numpy()


def _checksum(images: torch.Tensor, features: torch.Tensor) -> str:
    digest = xxhash.xxh3_128(images.numpy().data)
    digest.update(features.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
