"""Feature tables: the features of a dataset's splits, one block per member, read from where they are stored."""

from __future__ import annotations

import dataclasses
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, DTypeLike

from concat_ensemble.features.arrays import CHUNK, KINDS, Members, cut_off, read_splits


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
    """Features (N, sum of D_k) and labels (N,) of one split, to fit a probe on.

    `X, y = table["train"]` gives both as arrays, and `np.asarray(table["train"])` the features.

    Args:
        blocks: (N, D_k) for each member. labels: (N,).
        keys: The name of each block in the store, or of its member. A probe fitted on a split with keys refuses a
            split with other keys. None: any split with the same number of features is accepted.
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

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The features, for numpy and scikit-learn. `copy=False` raises ValueError where they have to be copied."""
        rows, block = self.features, self.blocks[0]
        array = rows if dtype is None else rows.astype(dtype, copy=False)
        is_own = isinstance(block, np.ndarray) and np.shares_memory(array, block)
        if copy is False and not is_own:
            raise ValueError("the features are read or put together from several blocks; leave out copy=False.")
        return array.copy() if copy and is_own else array

    def __repr__(self) -> str:
        parts = [f"{self.blocks[0].shape[0]:,} rows", f"{self.num_features:,} features {self.dtype}"]
        parts.append(_describe_members([block.shape[1] for block in self.blocks], self.keys))
        parts.append(f"{len(np.unique(self.labels)):,} classes")
        if self.groups is not None:
            parts.append(f"{len(np.unique(self.groups)):,} groups")
        return f"TableSplit({', '.join(parts)})"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, `num_features`)"""
        return len(self), self.num_features

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
    """Features of the splits of a dataset, one block of columns per member.

    `table["train"]` is a `TableSplit`; `table.members([0, 2])` is the table of these two members. `extract_features`
    makes a table of stored blocks, `FeatureTable.from_arrays` one of arrays.
    """

    blocks: Mapping[str, Sequence[Rows | np.ndarray]]  # split -> one (N, D_k) block per member
    labels: dict[str, np.ndarray]  # split -> (N,) int64
    class_names: list[str]
    keys: tuple[str, ...] | None = None  # the name of each block in the store, or of its member
    extracted: int = 0  # images that had to be run; 0 if all features were stored
    images_per_second: float | None = None  # for those images
    groups: dict[str, np.ndarray] | None = None  # split -> (N,), as in `TableSplit`
    skipped: dict[str, list[int]] | None = None  # split -> rows of the dataset left out, whose images cannot be used
    names: tuple[str, ...] | None = None  # what the members are called, where `keys` are those of the store

    @classmethod
    def from_arrays(
        cls,
        splits: Mapping[str, Any],
        members: Members = None,
        *,
        groups: Mapping[str, ArrayLike] | None = None,
        class_names: Sequence[str] | None = None,
        label_column: str = "label",
        group_column: str | None = None,
        validation_size: float | None = None,
        test_size: float | None = None,
        seed: int = 0,
    ) -> FeatureTable:
        """A table of features that were computed elsewhere, for every probe, `select_members` and `measure_overlap`.

        float16, float32 and float64 stay as they are, also in files mapped into memory; whole numbers become float32.

        Args:
            splits: `train`, and `validation` and `test` where they are there. Each is a pair (X, y) or a triple
                (X, y, groups). X is an array (N, D) of one member, a list of arrays (N, D_k), a dict of arrays by the
                member's name, or a data frame; arrays are of numpy, torch, or anything that `np.asarray` takes. y (N,)
                are class names or whole numbers. Or each is a data frame, a `datasets.Dataset` or the path of a
                parquet file that has the labels as a column.
            members: Names of the members. Of a data frame, Dataset or parquet file: names of columns of lists, one a
                member; or a dict from each member to its columns. By default each column of lists is a member, and
                without such columns all of them are one member.
            groups: (N,) for each split, such as the patient of each row; or `group_column`, or triples, in its place.
            class_names: What labels 0, 1, 2, ... stand for. By default the sorted labels of all splits.
            label_column, group_column: Columns of labels and groups where a split is made of columns.
            validation_size, test_size: Fraction of the training rows to cut off for a split that is not there: first
                `test`, then `validation`, stratified by class. Groups and copies of a row stay together. By default
                nothing is cut off.
            seed: Random seed of the cuts.

        Raises:
            ValueError: naming the split and the row for NaN and missing labels, and the split for arrays that are not
                (N, D), sparse matrices, several labels a row, and splits that do not go together.

        Warns:
            UserWarning: if rows of the test or validation split are also in another split.
        """
        own = read_splits(splits, members, groups, class_names, label_column=label_column, group_column=group_column)
        train = own["train"]
        table = cls(
            {kind: list(split.blocks.values()) for kind, split in own.items()},
            {kind: split.labels for kind, split in own.items()},
            list(train.class_names or ()),
            None
            if members is None and all(name.startswith("member ") for name in train.blocks)
            else tuple(train.blocks),
            groups={kind: split.groups for kind, split in own.items() if split.groups is not None} or None,
        )
        _warn_of_shared_rows(table)
        for kind, size in (("test", test_size), ("validation", validation_size)):
            table = table if size is None else table._cut(kind, size, seed)
        return table

    def __getitem__(self, split: str) -> TableSplit:
        if split not in self.blocks:
            hint = f" Cut it off the training rows: FeatureTable.from_arrays(..., {split}_size=0.2)."
            problem = f"no split {split!r} in the table; it has {', '.join(self.blocks)}."
            raise KeyError(problem + hint * (split in ("validation", "test")))
        groups = None if self.groups is None else self.groups[split]
        return TableSplit(self.blocks[split], self.labels[split], self.keys, groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        """Number of splits."""
        return len(self.blocks)

    def __repr__(self) -> str:
        lines = [f"  {kind}: {len(labels):,} rows" for kind, labels in self.labels.items()]
        lines.append(f"  members: {_describe_members(self.feature_dims, self.names or self.keys)}")
        names = ", ".join(map(str, self.class_names[:6])) + ", ..." * (len(self.class_names) > 6)
        lines.append(f"  classes: {len(self.class_names):,} ({names})")
        if self.groups is not None:
            count = len(np.unique(np.concatenate(list(self.groups.values()))))
            lines.append(f"  groups: {count:,}")
        return "\n".join(["FeatureTable(", *lines, ")"])

    @property
    def shape(self) -> dict[str, tuple[int, int]]:
        """(N, sum of D_k) of each split, as `datasets.DatasetDict` has it."""
        return {kind: self[kind].shape for kind in self}

    @property
    def member_names(self) -> list[str]:
        """The names given to `from_arrays`, the architectures of an ensemble's members, or "member 0" and so on."""
        return _name_members(len(self.feature_dims), self.names or self.keys)

    @property
    def feature_dims(self) -> list[int]:
        """D_k of each member."""
        return [block.shape[1] for block in next(iter(self.blocks.values()))]

    def members(self, numbers: Sequence[int]) -> FeatureTable:
        """The table of the members with these numbers, in this order."""
        blocks = {split: [blocks[k] for k in numbers] for split, blocks in self.blocks.items()}
        keys, names = (None if of is None else tuple(of[k] for k in numbers) for of in (self.keys, self.names))
        kept = {"groups": self.groups, "skipped": self.skipped}
        return FeatureTable(blocks, self.labels, self.class_names, keys, names=names, **kept)

    def _cut(self, kind: str, size: float, seed: int) -> FeatureTable:
        """The table with a part of its training rows as the split `kind`; no row is copied."""
        name, train = f"{kind}_size", self["train"]
        if kind in self.blocks:
            raise ValueError(f"{name}={size}: there is a {kind} split already; leave out one of the two.")
        side = cut_off(train.labels, row_hashes(train), train.groups, name=name, size=size, seed=seed)
        rest, part = np.flatnonzero(~side), np.flatnonzero(side)
        splits = {"train": train.select(rest), kind: train.select(part)}
        groups = None
        if self.groups is not None and train.groups is not None:
            groups = self.groups | {own: train.groups[rows] for own, rows in (("train", rest), (kind, part))}
        splits = {own: splits[own] if own in splits else self[own] for own in KINDS if own in {*splits, *self.blocks}}
        blocks = {own: split.blocks for own, split in splits.items()}
        labels = {own: split.labels for own, split in splits.items()}
        return dataclasses.replace(self, blocks=blocks, labels=labels, groups=groups)


def labeled_split(table: FeatureTable) -> TableSplit:
    """The training rows, and the validation rows where there are any: all that may be fitted on in the end."""
    return TableSplit.concatenate([table[split] for split in ("train", "validation") if split in table])


def row_hashes(split: TableSplit) -> list[bytes]:
    """One hash for each row of features; rows of equal numbers have the same, whatever the dtype."""
    hashes = []
    for start in range(0, len(split), CHUNK):
        rows = split.rows(slice(start, start + CHUNK)).astype(np.float64) + 0.0  # -0.0 becomes 0.0
        hashes += [xxhash.xxh3_128_digest(row.tobytes()) for row in rows]
    return hashes


def _warn_of_shared_rows(table: FeatureTable) -> None:
    """Warn of test and validation rows, and groups, that are also in a split before them."""
    seen: dict[str, set] = {}
    for kind in KINDS:
        if kind not in table.blocks:
            continue
        hashes = row_hashes(table[kind])
        for other, known in seen.items():
            if shared := sum(row in known for row in hashes):
                problem = f"{shared:,} of the {len(hashes):,} {kind} rows are also in the {other} split"
                warnings.warn(f"{problem}, so scores on them mean little; remove them.", UserWarning, stacklevel=3)
            common = np.intersect1d(table.groups[kind], table.groups[other]) if table.groups else []
            if len(common):
                problem = f"{len(common):,} groups are in the {other} and in the {kind} split"
                warnings.warn(f"{problem}; keep each group in one split.", UserWarning, stacklevel=3)
        seen[kind] = set(hashes)


def _describe_members(feature_dims: Sequence[int], keys: Sequence[str] | None) -> str:
    names = _name_members(len(feature_dims), keys)
    pairs = [f"{name} ({dim:,})" for name, dim in zip(names, feature_dims, strict=True)]
    return ", ".join(pairs[:8]) + ", ..." * (len(pairs) > 8)


def _name_members(count: int, keys: Sequence[str] | None) -> list[str]:
    return [f"member {k}" for k in range(count)] if keys is None else [shorten_key(key) for key in keys]


def shorten_key(key: str) -> str:
    """The beginning of a stored block's key, which is a long hexadecimal number; the whole name of a member."""
    return key[:8] if re.fullmatch("[0-9a-f]{32}", key) else key
