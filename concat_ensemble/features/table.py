"""Feature tables: the features of a dataset's splits, a block of columns per member, read where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from concat_ensemble.features.store import Rows


class TableSplit:
    """What a probe is fitted on: features (N, sum of the blocks' feature_dims) and labels (N,). Unpacks to both as arrays.

    Args:
        blocks: (N, D_k) each: rows of the store, or arrays, mapped ones too.
        labels: (N,).
        keys: What each block's columns are, as its name in the store: a probe fitted on one table refuses another's.
            None: anything of the same num_features goes.
    """

    def __init__(
        self,
        blocks: Sequence[Rows | np.ndarray | SelectedRows | ConcatenatedRows],
        labels: np.ndarray,
        keys: tuple[str, ...] | None = None,
    ):
        self.blocks, self.labels, self.keys = list(blocks), labels, keys

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.features
        yield self.labels

    @property
    def num_features(self) -> int:
        return sum(block.shape[1] for block in self.blocks)

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(block.dtype for block in self.blocks))

    @property
    def features(self) -> np.ndarray:
        """All of them, in memory, in float32 at least."""
        rows = self.rows(slice(None))
        return rows.astype(np.float32) if rows.dtype == np.float16 else rows

    def rows(self, part: slice | np.ndarray) -> np.ndarray:
        """Some rows' features as they are stored: what is read at a time where the table is larger than memory."""
        blocks = [block[part] for block in self.blocks]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)

    def select(self, numbers: np.ndarray) -> TableSplit:
        """The split of these rows alone; nothing is read or copied."""
        return TableSplit([SelectedRows(block, numbers) for block in self.blocks], self.labels[numbers], self.keys)

    @classmethod
    def concatenate(cls, splits: Sequence[TableSplit]) -> TableSplit:
        """Splits of the same columns, one below another; nothing is read or copied."""
        blocks = [ConcatenatedRows(blocks) for blocks in zip(*(split.blocks for split in splits), strict=True)]
        return cls(blocks, np.concatenate([split.labels for split in splits]), splits[0].keys)


class SelectedRows:
    """Some rows of a block, looked up when they are read."""

    def __init__(self, block: Rows | np.ndarray | SelectedRows, numbers: np.ndarray):
        self._block, self._numbers = block, numbers
        self.shape, self.dtype = (len(numbers), block.shape[1]), block.dtype

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        return self._block[self._numbers[part]]


class ConcatenatedRows:
    """Blocks of the same columns one below another, looked up when they are read."""

    def __init__(self, blocks: Sequence[Rows | np.ndarray | SelectedRows]):
        self._blocks, self._starts = blocks, np.cumsum([0, *map(len, blocks)])
        self.shape = int(self._starts[-1]), blocks[0].shape[1]
        self.dtype = np.result_type(*(block.dtype for block in blocks))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(*part.indices(len(self))) if isinstance(part, slice) else part
        out = np.empty((len(numbers), self.shape[1]), self.dtype)
        for block, start, stop in zip(self._blocks, self._starts[:-1], self._starts[1:], strict=True):
            here = (numbers >= start) & (numbers < stop)
            if here.any():
                out[here] = block[numbers[here] - start]
        return out


@dataclass(frozen=True)
class FeatureTable:
    """Features of the splits of a dataset, in one block of columns per member, memory-mapped.

    `table["train"]` is a `TableSplit`; `table.members([0, 2])` is the table of these members alone.
    """

    blocks: dict[str, list[Rows | np.ndarray]]  # split -> one (N, D_k) block per member
    labels: dict[str, np.ndarray]  # split -> (N,) int64
    class_names: list[str]
    keys: tuple[str, ...] | None = None  # the name of each block in the store: what its columns are
    extracted: int = 0  # images that a member had to be run on; 0 where all features were there
    images_per_second: float | None = None  # of these

    def __getitem__(self, split: str) -> TableSplit:
        if split not in self.blocks:
            raise KeyError(f"no split {split!r} in the table; it has {', '.join(self.blocks)}.")
        return TableSplit(self.blocks[split], self.labels[split], self.keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    @property
    def feature_dims(self) -> list[int]:
        return [block.shape[1] for block in next(iter(self.blocks.values()))]

    def members(self, numbers: Sequence[int]) -> FeatureTable:
        """The table of these members alone."""
        blocks = {split: [blocks[k] for k in numbers] for split, blocks in self.blocks.items()}
        keys = None if self.keys is None else tuple(self.keys[k] for k in numbers)
        return FeatureTable(blocks, self.labels, self.class_names, keys)
