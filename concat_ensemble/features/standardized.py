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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.float64 if split.dtype == np.float64 else torch.float32
        self.shape = split.blocks[0].shape[0], split.num_features
        self.fast_dtype = torch.bfloat16 if self.dtype == torch.float32 and _has_bfloat16(self.device) else self.dtype
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
        parts = [slice(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
        standardized._cached[standardized.dtype] = [(part, rows[part]) for part in parts]
        return standardized

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
        """X'X / n (D, D) in float64; within a chunk, summed in the precision of the rows."""
        total = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for _, chunk in self.chunks():
            total += chunk.T @ chunk
        return total / len(self)

    def gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X'X / n (D, D) @ (D, C) in the fast precision, without computing X'X."""
        total, matrix = torch.zeros_like(matrix), matrix.to(self.fast_dtype)
        for _, chunk in self.chunks(fast=True):
            total += chunk.T @ (chunk @ matrix)
        return total / len(self)

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


def moments(split: TableSplit) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of each feature, in one pass with sums in float64; 1 for a constant feature.

    The sums of squares are about each chunk's own mean, which loses no digits (Chan, Golub and LeVeque 1979).
    """
    count = 0
    mean = squares = torch.zeros(split.num_features, dtype=torch.float64)
    for start in range(0, split.blocks[0].shape[0], CHUNK):
        chunk = _read_rows(split, start).double()
        chunk_mean = chunk.mean(0)
        shift, total = chunk_mean - mean, count + len(chunk)
        squares = squares + (chunk - chunk_mean).square_().sum(0) + shift**2 * count * len(chunk) / total
        mean, count = mean + shift * len(chunk) / total, total
    mean, scale = mean.numpy(), (squares / count).sqrt().numpy()
    exact = split.dtype == np.float64
    # A constant feature differs from its mean by rounding alone.
    scale[scale <= (1e-14 if exact else 1e-6) * np.abs(mean)] = 1.0
    dtype = np.float64 if exact else np.float32
    return mean.astype(dtype), scale.astype(dtype)


def _read_rows(split: TableSplit, start: int) -> torch.Tensor:
    """The chunk (at most CHUNK, D) that starts at this row; torch needs a contiguous, writable array."""
    return torch.from_numpy(np.require(split.rows(slice(start, start + CHUNK)), requirements=["C", "W"]))


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


def _free_memory(device: torch.device) -> int:  # bytes
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
