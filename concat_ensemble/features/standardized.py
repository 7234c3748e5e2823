"""Standardized rows to fit a probe on, as tensors: kept in memory if they fit, else read again in each pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import psutil
import torch

from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.table import TableSplit

CHUNK = 8_192  # rows: large enough for full speed; 8,192 float32 features of a chunk are a quarter of a GB
CONSTANT = 1e-4  # a feature is constant if its deviation is at most this share of its size; see `moments`
DOUBLE_ROWS = 1_024  # rows or features that are converted to float64 at once
FAST_SIZE = 2**19  # numbers from which rows are multiplied in bfloat16
MEMORY_SHARE = 0.5  # of the free memory, for the rows in full and in half precision


class StandardizedFeatures:
    """Rows (n, D) of a split as (x - mean) / scale, in chunks.

    Chunks are float32, or float64 if the split is. `fast=True` gives bfloat16 on processors that multiply it faster,
    which is precise enough for products that an outer loop corrects.

    Args:
        mean, scale: (D,), from `moments`. None: the rows are used unchanged.
        device: Where the chunks go. Default: the GPU if there is one, else the CPU.
        in_memory: Whether the rows stay in memory between passes. Default: whether enough memory is free.
    """

    def __init__(
        self,
        split: TableSplit,
        mean: np.ndarray | torch.Tensor | None = None,
        scale: np.ndarray | torch.Tensor | None = None,
        *,
        device: str | torch.device | None = None,
        in_memory: bool | None = None,
    ):
        self.device = torch.device(device or default_device())
        self.dtype = torch.float64 if split.dtype == np.float64 else torch.float32
        self.shape = split.blocks[0].shape[0], split.num_features
        self._choose_fast_dtype()
        self._split = split
        to_tensor = partial(torch.as_tensor, dtype=self.dtype, device=self.device)
        self._mean, self._scale = (None if vector is None else to_tensor(vector) for vector in (mean, scale))
        if in_memory is None:
            num_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
            in_memory = 1.5 * num_bytes <= MEMORY_SHARE * _free_memory(self.device)
        self.in_memory = in_memory
        self._cached: dict[torch.dtype, list[tuple[slice, torch.Tensor]]] = {}

    @classmethod
    def from_tensor(cls, rows: torch.Tensor) -> StandardizedFeatures:
        """Rows (n, D) that are standardized already, on the device of the tensor."""
        empty = torch.empty(0, rows.shape[1], dtype=rows.dtype).numpy()
        standardized = cls(TableSplit([empty], empty), device=rows.device, in_memory=True)
        standardized.shape = tuple(rows.shape)
        standardized._choose_fast_dtype()
        parts = [slice(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
        standardized._cached[standardized.dtype] = [(part, rows[part]) for part in parts]
        return standardized

    def _choose_fast_dtype(self) -> None:
        """bfloat16, unless there are so few numbers that converting costs more than multiplying."""
        fast = (
            self.dtype == torch.float32 and self.shape[0] * self.shape[1] >= FAST_SIZE and _has_bfloat16(self.device)
        )
        self.fast_dtype = torch.bfloat16 if fast else self.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def chunks(self, *, fast: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which rows, these rows) for all rows in order."""
        dtype = self.fast_dtype if fast else self.dtype
        if dtype in self._cached:
            yield from self._cached[dtype]
        elif not self.in_memory:
            with keep_freed_memory():  # each chunk takes the place of the one before
                yield from self._read_chunks(dtype)
        else:
            # The fast chunks are made from the exact ones, which are then in memory too.
            exact = self._read_chunks(dtype) if dtype == self.dtype else self.chunks()
            chunks = []
            for rows, chunk in exact:
                chunks.append((rows, chunk.to(dtype)))
                yield chunks[-1]
            self._cached[dtype] = chunks

    def __matmul__(self, matrix: torch.Tensor) -> torch.Tensor:
        """(n, D) @ (D, C)."""
        out = torch.empty(len(self), matrix.shape[1], dtype=self.dtype, device=self.device)
        for rows, chunk in self.chunks():
            torch.mm(chunk, matrix, out=out[rows])
        return out

    def gram(self) -> torch.Tensor:
        """X'X / n (D, D) in float64, also within a chunk.

        In float32 the sums have an error of about 1e-7 of the largest value. One feature with large values on other
        rows than those that it was standardized by then hides what a small L2 strength adds to the others, and the
        matrix is not positive definite any more.
        """
        total = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for _, chunk in self.chunks():
            for part in chunk.split(DOUBLE_ROWS):
                part = part.double()
                total.addmm_(part.T, part)
        return total / len(self)

    def gram_times(self, matrix: torch.Tensor, sample_weight: torch.Tensor) -> torch.Tensor:
        """X'diag(w)X (D, D) @ (D, C) in the fast precision, without computing X'X. sample_weight: (n,)."""
        total, matrix = torch.zeros_like(matrix), matrix.to(self.fast_dtype)
        for rows, chunk in self.chunks(fast=True):
            total += chunk.T @ ((chunk @ matrix) * sample_weight[rows, None]).to(chunk.dtype)
        return total

    def stacked(self) -> torch.Tensor:
        """All rows (n, D) as one tensor."""
        chunks = [chunk for _, chunk in self.chunks()]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def select(self, numbers: np.ndarray) -> StandardizedFeatures:
        """The rows with these numbers."""
        if self.dtype in self._cached:
            return StandardizedFeatures.from_tensor(self.stacked()[torch.from_numpy(numbers).to(self.device)])
        part, settings = self._split.select(numbers), {"device": self.device, "in_memory": self.in_memory}
        return StandardizedFeatures(part, self._mean, self._scale, **settings)

    def sample(self, number: int, seed: int = 0) -> tuple[np.ndarray, StandardizedFeatures]:
        """The numbers of at most `number` random rows, in order, and these rows, kept in memory."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:number])
        part = self._split.select(rows)
        return rows, StandardizedFeatures(part, self._mean, self._scale, device=self.device, in_memory=True)

    def _read_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self), CHUNK):
            chunk = _read_rows(self._split, start).to(self.device, self.dtype)
            if self._mean is not None and self._scale is not None:
                chunk = (chunk - self._mean).div_(self._scale)
            yield slice(start, start + len(chunk)), chunk.to(dtype)


def moments(split: TableSplit, sample_weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale (D,) to standardize each feature by: its standard deviation, if it is not constant.

    A feature is constant if its standard deviation is at most `CONSTANT` times its size, which is the absolute mean or
    the typical (median) deviation of its block's features, whichever is larger. What remains below that is rounding
    (float16 itself has steps of 5e-4 of a value) or a unit of the network that is as good as dead, and dividing by it
    would turn a small change on other rows into a value of thousands. The scale of a constant feature is 1, or the
    typical or its own deviation if that is larger, so that it is never enlarged beyond the others. Dead ReLU units
    that a few rows activate are not constant.

    Takes one pass with sums in float64. The sums of squares are about each chunk's own mean, which loses no digits
    (Chan, Golub and LeVeque 1979).

    Args:
        sample_weight: (n,), at least 0. A weight of 2 counts as the row twice. Default: all the same.
    """
    total, device = 0.0, default_device()
    mean = squares = torch.zeros(split.num_features, dtype=torch.float64, device=device)
    for start in range(0, split.blocks[0].shape[0], CHUNK):
        chunk = _read_rows(split, start).to(device).double()
        weights = torch.ones(len(chunk)) if sample_weight is None else sample_weight[start : start + CHUNK]
        weights = torch.as_tensor(weights, dtype=torch.float64, device=device)[:, None]
        chunk_total = float(weights.sum())
        if chunk_total == 0:
            continue
        chunk_mean = (weights * chunk).sum(0) / chunk_total
        shift, total = chunk_mean - mean, total + chunk_total
        squares = squares + (weights * (chunk - chunk_mean).square_()).sum(0)
        squares += shift**2 * (total - chunk_total) * chunk_total / total
        mean = mean + shift * chunk_total / total
    mean, deviation = mean.cpu().numpy(), (squares / total).sqrt().cpu().numpy()
    ends = np.cumsum([block.shape[1] for block in split.blocks])[:-1]
    scale = np.concatenate(
        [_scale(*pair) for pair in zip(np.split(mean, ends), np.split(deviation, ends), strict=True)]
    )
    dtype = np.float64 if split.dtype == np.float64 else np.float32
    return mean.astype(dtype), scale.astype(dtype)


def _scale(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The scale of each feature of one block, whose rule `moments` states."""
    varying = deviation[deviation > CONSTANT * np.abs(mean)]
    typical = np.median(varying) if len(varying) else 0.0
    constant = deviation <= CONSTANT * np.maximum(np.abs(mean), typical)
    return np.where(constant, np.maximum(np.maximum(deviation, typical), 1.0), deviation)


def kernel(rows: torch.Tensor) -> torch.Tensor:
    """XX' (n, n) in float64 of rows (n, D)."""
    n, size = len(rows), -(-len(rows) // 4)
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    for part in rows.split(DOUBLE_ROWS, dim=1):
        part = part.double()
        for start in range(0, n, size):  # four blocks of rows, each up to the diagonal: 10 of 16 products
            block = slice(start, min(start + size, n))
            total[block, : block.stop].addmm_(part[block], part[: block.stop].T)
    return total.tril_() + total.tril(-1).T


def _read_rows(split: TableSplit, start: int) -> torch.Tensor:
    """The chunk (at most CHUNK, D) that starts at this row; torch needs a contiguous, writable array."""
    return torch.from_numpy(np.require(split.rows(slice(start, start + CHUNK)), requirements=["C", "W"]))


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


def _free_memory(device: torch.device) -> int:  # bytes
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
