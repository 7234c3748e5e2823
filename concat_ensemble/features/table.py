"""Feature tables: the features of a dataset's splits, one block per member, read from where they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class Rows(ABC):
    """Rows (n, D) of one block that are read when they are sliced. An array can stand in its place."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        """Read these rows."""


class TableSplit:
    """Features (N, sum of D_k) and labels (N,) of one split, to fit a probe on. Unpacks to both as arrays.

    Args:
        blocks: (N, D_k) for each member. labels: (N,).
        keys: The name of each block in the store. A probe fitted on a split with keys refuses a split with other keys.
            None: any split with the same number of features is accepted.
        groups: (N,) numbers or names, such as the patient of each image. Rows of one group are never separated where
            rows are drawn or cut. None: each row is a group of its own.
    """

    def __init__(
        self,
        blocks: Sequence[Rows | np.ndarray],
        labels: np.ndarray,
        keys: tuple[str, ...] | None = None,
        groups: np.ndarray | None = None,
    ):
        self.blocks, self.labels, self.keys, self.groups = list(blocks), labels, keys, groups

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
        """(N, `num_features`), all in memory; float16 is converted to float32."""
        rows = self.rows(slice(None))
        return rows.astype(np.float32) if rows.dtype == np.float16 else rows

    def rows(self, part: slice | np.ndarray) -> np.ndarray:
        """Some rows in the stored dtype. Tables larger than memory are read this way."""
        blocks = [block[part] for block in self.blocks]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)

    def select(self, numbers: np.ndarray) -> TableSplit:
        """The split of the rows with these numbers; nothing is read or copied."""
        blocks = [SelectedRows(block, numbers) for block in self.blocks]
        groups = None if self.groups is None else self.groups[numbers]
        return TableSplit(blocks, self.labels[numbers], self.keys, groups)

    @classmethod
    def concatenate(cls, splits: Sequence[TableSplit]) -> TableSplit:
        """Splits of the same blocks, one below another; nothing is read or copied."""
        blocks = [ConcatenatedRows(blocks) for blocks in zip(*(split.blocks for split in splits), strict=True)]
        labels = np.concatenate([split.labels for split in splits])
        groups = [split.groups for split in splits if split.groups is not None]
        return cls(blocks, labels, splits[0].keys, np.concatenate(groups) if len(groups) == len(splits) else None)


class SelectedRows(Rows):
    """Some rows of a block."""

    def __init__(self, block: Rows | np.ndarray, numbers: np.ndarray):
        super().__init__((len(numbers), block.shape[1]), block.dtype)
        self._block, self._numbers = block, numbers

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        return self._block[self._numbers[part]]


class ConcatenatedRows(Rows):
    """Blocks with the same columns, one below another."""

    def __init__(self, blocks: Sequence[Rows | np.ndarray]):
        self._blocks, self._starts = blocks, np.cumsum([0, *map(len, blocks)])
        shape = int(self._starts[-1]), blocks[0].shape[1]
        super().__init__(shape, np.result_type(*(block.dtype for block in blocks)))

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
    """Features of the splits of a dataset, one block of columns per member, memory-mapped.

    `table["train"]` is a `TableSplit`; `table.members([0, 2])` is the table of these two members.
    """

    blocks: Mapping[str, Sequence[Rows | np.ndarray]]  # split -> one (N, D_k) block per member
    labels: dict[str, np.ndarray]  # split -> (N,) int64
    class_names: list[str]
    keys: tuple[str, ...] | None = None  # the name of each block in the store
    extracted: int = 0  # images that had to be run; 0 if all features were stored
    images_per_second: float | None = None  # for those images
    groups: dict[str, np.ndarray] | None = None  # split -> (N,), as in `TableSplit`

    def __getitem__(self, split: str) -> TableSplit:
        if split not in self.blocks:
            raise KeyError(f"no split {split!r} in the table; it has {', '.join(self.blocks)}.")
        groups = None if self.groups is None else self.groups[split]
        return TableSplit(self.blocks[split], self.labels[split], self.keys, groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    @property
    def feature_dims(self) -> list[int]:
        """D_k of each member."""
        return [block.shape[1] for block in next(iter(self.blocks.values()))]

    def members(self, numbers: Sequence[int]) -> FeatureTable:
        """The table of the members with these numbers, in this order."""
        blocks = {split: [blocks[k] for k in numbers] for split, blocks in self.blocks.items()}
        keys = None if self.keys is None else tuple(self.keys[k] for k in numbers)
        return FeatureTable(blocks, self.labels, self.class_names, keys, groups=self.groups)
