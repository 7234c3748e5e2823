"""The rows that a probe is fitted on, standardised, as tensors: in memory where they fit, else read again in each pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
import torch

from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.table import TableSplit

CHUNK = 8_192  # rows: large enough for full speed, small enough that a chunk of 8,192 columns is a quarter of a GB
MEMORY_SHARE = 0.5  # of what is free, for the rows in full and in half precision


class StandardizedFeatures:
    """Rows (n, D) of a split, (x - mean) / scale, in chunks.

    Args:
        split: Its labels are not looked at.
        mean, scale: (D,), from `moments`; None for rows as they are.
        device: Where the chunks go; the GPU where there is one.
        in_memory: Whether rows stay there between passes; decided by what is free when left out.

    Chunks are float32, or float64 where the split is. `fast=True` asks for bfloat16 where the processor multiplies that
    faster: good enough for products that an outer loop corrects.
    """

    def __init__(
        self,
        split: TableSplit,
        mean: np.ndarray | None = None,
        scale: np.ndarray | None = None,
        *,
        device: str | torch.device | None = None,
        in_memory: bool | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.float64 if split.dtype == np.float64 else torch.float32
        self.shape = split.blocks[0].shape[0], split.num_features
        self.fast_dtype = torch.bfloat16 if self.dtype == torch.float32 and _has_bfloat16(self.device) else self.dtype
        self._split = split
        if mean is not None:
            mean, scale = (torch.as_tensor(vector, dtype=self.dtype, device=self.device) for vector in (mean, scale))
        self._mean, self._scale = mean, scale
        if in_memory is None:
            size = 4 if self.dtype == torch.float32 else 8
            in_memory = self.shape[0] * self.shape[1] * size * 1.5 <= MEMORY_SHARE * _free(self.device)
        self.in_memory = in_memory
        self._cached: dict[torch.dtype, list[tuple[slice, torch.Tensor]]] = {}

    @classmethod
    def from_tensor(cls, rows: torch.Tensor) -> StandardizedFeatures:
        """Rows (n, D) that are standardized already, on the device of the tensor."""
        empty = torch.empty(0, rows.shape[1], dtype=rows.dtype).numpy()
        standardized = cls(TableSplit([empty], empty), device=rows.device, in_memory=True)
        standardized.shape = tuple(rows.shape)
        starts = range(0, len(rows), CHUNK)
        chunks = [(slice(n, min(n + CHUNK, len(rows))), rows[n : n + CHUNK]) for n in starts]
        standardized._cached[standardized.dtype] = chunks
        return standardized

    def __len__(self) -> int:
        return self.shape[0]

    def chunks(self, *, fast: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which rows, these rows) until all were there."""
        dtype = self.fast_dtype if fast else self.dtype
        if dtype in self._cached:
            yield from self._cached[dtype]
            return
        if not self.in_memory:
            with keep_freed_memory():  # each chunk takes the place of the one before
                yield from self._made(dtype)
            return
        exact = dtype == self.dtype
        source = self._made(dtype) if exact else ((rows, chunk.to(dtype)) for rows, chunk in self.chunks())
        kept = []
        for piece in source:
            kept.append(piece)
            yield piece
        self._cached[dtype] = kept

    def __matmul__(self, matrix: torch.Tensor) -> torch.Tensor:
        """(n, D) @ (D, C)."""
        out = torch.empty(len(self), matrix.shape[1], dtype=self.dtype, device=self.device)
        for rows, chunk in self.chunks():
            torch.mm(chunk, matrix, out=out[rows])
        return out

    def gram(self) -> torch.Tensor:
        """(D, D) X'X / n, summed in the rows' own precision within a chunk and in float64 over chunks."""
        total = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64, device=self.device)
        for _, chunk in self.chunks():
            total += chunk.T @ chunk
        return total / len(self)

    def gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X'X / n (D, D) @ (D, C), without the former, and roughly: in the fast precision."""
        total, matrix = torch.zeros_like(matrix), matrix.to(self.fast_dtype)
        for _, chunk in self.chunks(fast=True):
            total += chunk.T @ (chunk @ matrix)
        return total / len(self)

    def sample(self, number: int, seed: int = 0) -> tuple[np.ndarray, StandardizedFeatures]:
        """`number` rows drawn at random, in memory, and which they are."""
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self))[:number])
        few = StandardizedFeatures(
            self._split.select(drawn), self._mean, self._scale, device=self.device, in_memory=True
        )
        return drawn, few

    def _made(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self), CHUNK):
            chunk = _read(self._split, start).to(self.device, self.dtype)
            if self._mean is not None:
                chunk = (chunk - self._mean).div_(self._scale)
            yield slice(start, start + len(chunk)), chunk.to(dtype)


def moments(split: TableSplit) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, 1 where it is constant, in one pass with sums in float64."""
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, split.blocks[0].shape[0], CHUNK):
        chunk = _read(split, start).double()
        here = chunk.mean(0)
        # Chan, Golub and LeVeque 1979: sums of squares about each chunk's own mean lose no digits.
        shift, total = here - mean, count + len(chunk)
        squares = squares + (chunk - here).square_().sum(0) + shift**2 * count * len(chunk) / total
        mean, count = mean + shift * len(chunk) / total, total
    mean, scale = mean.numpy(), (squares / count).sqrt().numpy()
    exact = split.dtype == np.float64
    # A constant column differs from its rounded mean by rounding alone.
    scale[scale <= (1e-14 if exact else 1e-6) * np.abs(mean)] = 1.0
    dtype = np.float64 if exact else np.float32
    return mean.astype(dtype), scale.astype(dtype)


def _read(part: TableSplit, start: int) -> torch.Tensor:
    return torch.from_numpy(
        np.require(part.rows(slice(start, start + CHUNK)), requirements="CW")
    )  # torch wants its own


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
