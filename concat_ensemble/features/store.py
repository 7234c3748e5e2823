"""Features on disk: one folder per member, whose rows are found by the hash of the image that they belong to.

A block is a folder of safetensors shards. Which block is a member's follows from what it computes (weights, architecture,
arguments, preprocessing, dtypes), and which row is an image's from the image's bytes: nothing stale can be read, and a
limit, another split, a shuffle or a copy of the dataset finds what is there.

Shards are safetensors files: for 50,000 x 2,048 float32, `datasets` (Arrow) takes 16 times as long to write them, 1.5
times to read them all and 4 times to read some at random (tests/benchmarks/feature_storage.py, on 2 cores).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from concat_ensemble.members.checkpoints import weights_sha256

logger = logging.getLogger(__name__)

ABOUT = "about.json"  # says whose features a block holds, for people
HASH_BYTES = 16  # of sha256: two of 10^12 images meet with probability 1e-15


def default_store() -> Path:
    """Where blocks are kept unless told otherwise: in `HF_ASSETS_CACHE`."""
    return cached_assets_path("concat-ensemble", namespace="features")


def image_hashes(split: Dataset) -> list[bytes]:
    """One hash per image of a split of `load_data`, of its encoded bytes."""
    hashes = []
    for batch in split.select_columns("image").with_format(None).iter(batch_size=256):
        for encoded in batch["image"]:
            content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
            hashes.append(hashlib.sha256(content).digest()[:HASH_BYTES])
    return hashes


def block_key(backbone: nn.Module, computed: dict[str, Any]) -> str:
    """Name of a member's block: its live weights and what else decides its features, never where it is said to come from
    (which a fine-tuning leaves stale)."""
    computed = computed | {"weights": weights_sha256(backbone.state_dict())}
    return hashlib.sha256(json.dumps(computed, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Block:
    """One member's features of all images that it has seen, in a folder.

    Every shard is written aside, flushed and renamed, so a kill leaves whole shards alone; it carries a checksum, so a
    damaged one is found on opening, set aside and extracted again.
    """

    def __init__(self, folder: Path, architecture: str = "unknown"):
        self.folder, self.architecture = folder, architecture
        self._shards: list[np.ndarray] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._read: set[str] = set()

    def lock(self) -> FileLock:
        """Held by whoever extracts into this block; others wait, and then find the rows there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABOUT).write_text(json.dumps({"architecture": self.architecture}))
        return FileLock(self.folder / ".lock")

    def refresh(self) -> Block:
        """Open the shards that were written since the last look."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                images, features = _opened(path)
            except (SafetensorError, ValueError) as error:
                logger.warning("%s is damaged (%s); its images are extracted again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._read.add(path.name)
            self._shards.append(features)
            self._places |= {image: (len(self._shards) - 1, row) for row, image in enumerate(images)}
        return self

    def missing(self, images: Sequence[bytes]) -> set[bytes]:
        return {image for image in images if image not in self._places}

    def write(self, images: Sequence[bytes], features: torch.Tensor) -> None:
        """Add rows. The same images give a shard of the same name, so that work done twice is stored once.

        Raises:
            OSError: on a full disk; what was there is untouched.
        """
        name = hashlib.sha256(b"".join(images)).hexdigest()[:24]
        hashes = torch.from_numpy(
            np.frombuffer(b"".join(images), dtype=np.uint8).reshape(len(images), HASH_BYTES).copy()
        )
        aside = self.folder / f".{name}.tmp"
        try:
            save_file(
                {"features": features.contiguous(), "images": hashes},
                aside,
                metadata={"checksum": _checksum(hashes, features)},
            )
            aside.rename(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise OSError(
                f"cannot write features to {self.folder} ({error}); free some space or set HF_ASSETS_CACHE; what was there is kept."
            ) from error

    def rows(self, images: Sequence[bytes]) -> Rows:
        places = np.array([self._places[image] for image in images], dtype=np.int64).reshape(-1, 2)
        return Rows(self._shards, places[:, 0], places[:, 1])


def stored_blocks(store: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """What lies in a store: per block its `key`, `architecture`, `images`, `width`, `bytes`, and `idle_days` since it was
    last read. With `verify` every shard is read, and `damaged` says how many were removed."""
    found = []
    for folder in sorted(path for path in store.iterdir() if path.is_dir()):
        shards = sorted(folder.glob("*.safetensors"))
        if verify:
            Block(folder).refresh()
        whole = [path for path in shards if path.exists()]
        shapes = [_shape(path) for path in whole]
        about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else {}
        read = max((path.stat().st_atime for path in [folder, *whole]), default=time.time())
        found.append(
            {
                "key": folder.name,
                "architecture": about.get("architecture", "unknown"),
                "images": sum(rows for rows, _ in shapes),
                "width": shapes[0][1] if shapes else 0,
                "bytes": sum(path.stat().st_size for path in whole),
                "idle_days": (time.time() - read) / 86_400,
                "damaged": len(shards) - len(whole),
            }
        )
    return found


def _shape(path: Path) -> tuple[int, int]:
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("features").get_shape())
    except SafetensorError:
        return 0, 0


class Rows:
    """Rows of a block in the order of a dataset, memory-mapped: read when sliced."""

    def __init__(self, shards: list[np.ndarray], shard: np.ndarray, row: np.ndarray):
        self._shards, self._shard, self._row = shards, shard, row

    def __len__(self) -> int:
        return len(self._row)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._shards[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self._shards[0].dtype

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        """(rows, width), as stored."""
        shard, row = self._shard[part], self._row[part]
        out = np.empty((len(row), self.shape[1]), self.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            out[here] = self._shards[number][row[here]]
        return out


def _opened(path: Path) -> tuple[list[bytes], np.ndarray]:
    with safe_open(path, framework="pt") as file:
        images, features, checksum = (
            file.get_tensor("images"),
            file.get_tensor("features"),
            (file.metadata() or {}).get("checksum"),
        )
    if checksum != _checksum(images, features):
        raise ValueError("its checksum is wrong")
    flat = images.numpy().tobytes()
    return [flat[start : start + HASH_BYTES] for start in range(0, len(flat), HASH_BYTES)], features.numpy()


def _checksum(images: torch.Tensor, features: torch.Tensor) -> str:
    digest = xxhash.xxh3_128(images.numpy())
    digest.update(features.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
