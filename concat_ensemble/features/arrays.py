"""Features and labels of one's own: arrays, data frames and parquet columns as checked blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from concat_ensemble.errors import first_line, suggest

if TYPE_CHECKING:
    import pyarrow

KINDS = ("train", "validation", "test")
MAX_LABEL = 2**53  # up to which floats hold every whole number
CHUNK = 4096  # rows that are checked at a time
INDEX_COLUMN = "__index_level_"  # how pandas names its index in a parquet file
Members = Sequence[str] | Mapping[str, str | Sequence[str]] | None


class OwnSplit(NamedTuple):
    """The content of one split, checked."""

    blocks: dict[str, np.ndarray]  # (N, D_k) float16, float32 or float64 by the member's name
    labels: np.ndarray  # (N,) int64 or texts
    groups: np.ndarray | None  # (N,)
    class_names: list[str] | None = None  # what int64 labels stand for; None if they are names themselves


def read_splits(
    splits: Any,
    members: Members,
    groups: Mapping[str, Any] | None,
    class_names: Sequence[str] | None,
    *,
    label_column: str,
    group_column: str | None,
) -> dict[str, OwnSplit]:
    """Check every split and number their classes alike. The arguments are those of `FeatureTable.from_arrays`."""
    if not isinstance(splits, Mapping) or "train" not in splits:
        raise ValueError('splits must be a dict with "train", such as {"train": (X, y), "test": (X, y)}.')
    for kind in [*splits, *(groups or ())]:
        if kind not in KINDS:
            raise ValueError(f"split {kind!r} must be one of {', '.join(KINDS)}{suggest(kind, KINDS)}")
    own = {}
    for kind in (kind for kind in KINDS if kind in splits):
        named = None if groups is None else groups.get(kind)
        try:
            own[kind] = _read_split(splits[kind], members, named, label_column, group_column)
        except ValueError as error:
            raise ValueError(f"the {kind} split: {error}") from error
    _check_alike(own)
    return _number_classes(own, class_names)


def _read_split(content: Any, members: Members, groups: Any, label_column: str, group_column: str | None) -> OwnSplit:
    """One split: a pair (X, y), a triple (X, y, groups), or columns with the labels among them."""
    names = None
    if isinstance(content, tuple | list):
        if len(content) not in (2, 3):
            raise ValueError(f"it has {len(content)} parts; give (X, y) or (X, y, groups).")
        X, y = content[:2]
        groups = content[2] if len(content) == 3 else groups
        blocks = _read_features(X, members)
    else:
        table, names = _open_columns(content, label_column)
        others = [label_column] if group_column is None else [label_column, group_column]
        for column in others:
            if column not in table.column_names:
                raise ValueError(f"there is no column {column!r} among {_list(table.column_names)}; name it.")
        y = table.column(label_column).to_pylist()
        groups = groups if group_column is None else table.column(group_column).to_pylist()
        blocks = _read_columns(table.drop_columns(others), members)
    labels = read_labels(y)
    blocks = {name: _check_block(name, block) for name, block in blocks.items()}
    for name, block in blocks.items():
        if len(block) != len(labels):
            raise ValueError(f"{name} has {len(block):,} rows for {len(labels):,} labels; give as many of each.")
    return OwnSplit(blocks, labels, None if groups is None else _read_groups(groups, len(labels)), names)


def _read_features(X: Any, members: Members) -> dict[str, Any]:
    """The blocks in X: one array, a list of arrays, a dict of arrays by name, or the columns of a data frame."""
    if isinstance(X, Mapping):
        order = list(X) if members is None else list(members)
        if set(order) != set(X):
            raise ValueError(f"X has the members {_list(list(X))} where members={order} names others.")
        return {str(name): X[name] for name in order}
    if _is_frame(X) or _is_dataset(X):
        return _read_columns(_open_columns(X, None)[0], members)
    if isinstance(members, Mapping):
        raise ValueError(f"members={members!r} names columns, and X is a {type(X).__name__}; give a data frame.")
    several = isinstance(X, list | tuple) and any(getattr(block, "ndim", 0) == 2 for block in X)
    return _name_blocks(list(X) if several else [X], members)


def _name_blocks(blocks: list, members: Sequence[str] | None) -> dict[str, Any]:
    names = [f"member {k}" for k in range(len(blocks))] if members is None else list(map(str, members))
    if isinstance(members, str) or len(names) != len(blocks) or len(set(names)) != len(names):
        raise ValueError(f"members={members!r} must be {len(blocks)} different names, one for each array of features.")
    return dict(zip(names, blocks, strict=True))


def _open_columns(content: Any, label_column: str | None) -> tuple[pyarrow.Table, list[str] | None]:
    """The columns of a data frame, a `datasets.Dataset` or a parquet file, and the names of a ClassLabel."""
    import pyarrow.parquet
    from datasets import ClassLabel, Features

    features = None
    try:
        if isinstance(content, str | Path):
            table = pyarrow.parquet.read_table(content)
            features = Features.from_arrow_schema(table.schema)
        elif _is_dataset(content):
            table, features = content.with_format("arrow")[:], content.features
        elif _is_frame(content):
            table = pyarrow.Table.from_pandas(content, preserve_index=False)
        else:
            given = f"it is a {type(content).__name__}"
            raise ValueError(f"{given}; give (X, y), or a data frame, Dataset or parquet file with labels.")
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"its columns cannot be read: {first_line(error)}") from error
    feature = None if features is None else features.get(label_column)
    return table, list(feature.names) if isinstance(feature, ClassLabel) else None


def _read_columns(table: pyarrow.Table, members: Members) -> dict[str, np.ndarray]:
    """Blocks of columns: each column of lists is a member; without any, all the columns are one."""
    from pyarrow import types

    names = [name for name in table.column_names if not name.startswith(INDEX_COLUMN)]
    lists = [name for name in names if _is_list(table.schema.field(name).type)]
    if isinstance(members, Mapping):
        columns = {name: [own] if isinstance(own, str) else list(own) for name, own in members.items()}
    elif members is not None and set(members) <= set(names):
        columns = {name: [name] for name in members}
    else:
        chosen = _name_blocks([[name] for name in lists] or [names], members)
        columns = chosen if members is not None or not lists else {name: [name] for name in lists}
    blocks = {}
    for member, own in columns.items():
        for name in own:
            if name not in names:
                raise ValueError(f"member {member!r}: there is no column {name!r}{suggest(name, names)}")
            kind = table.schema.field(name).type
            kind = kind.value_type if _is_list(kind) else kind
            if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
                remedy = "leave it out, or name the columns of each member with members={'name': [columns]}"
                raise ValueError(f"column {name!r} holds {kind}, not numbers; {remedy}.")
        if not own:
            raise ValueError(f"member {member!r} has no columns; name them with members={{'name': [columns]}}.")
        blocks[str(member)] = np.concatenate([_read_column(table.column(name), name) for name in own], axis=1)
    return blocks


def _read_column(column: pyarrow.ChunkedArray, name: str) -> np.ndarray:
    """(N, D) for lists of one length D, (N, 1) for numbers; a missing number is NaN."""
    import pyarrow.compute

    if not len(column):
        raise ValueError("it is empty; give at least one row.")
    chunks: Any = column.chunks
    if _is_list(column.type):
        compute: Any = pyarrow.compute  # whose functions are made when it is imported
        lengths = compute.list_value_length(column).unique().to_pylist()
        if len(lengths) > 1 or not lengths[0]:
            found = ", ".join(map(str, lengths[:5]))
            raise ValueError(f"column {name!r} has lists of lengths {found}; give each row as many features.")
        chunks = [chunk.flatten() for chunk in chunks]
    values = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])
    values = values.astype(np.float32) if values.dtype == object else values  # booleans with missing ones
    return _to_floats(values.reshape(len(column), -1))


def _is_list(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_frame(content: Any) -> bool:
    return hasattr(content, "columns") and hasattr(content, "iloc")


def _is_dataset(content: Any) -> bool:
    return hasattr(content, "with_format") and hasattr(content, "column_names")


def _check_block(name: str, block: Any) -> np.ndarray:
    """One member's features as (N, D) floats, all of them finite."""
    if hasattr(block, "toarray"):  # scipy's; made dense here, it could fill the memory
        raise ValueError(f"{name} is a sparse matrix of shape {block.shape}; pass X.toarray().")
    try:
        array = _to_numpy(block)
    except ValueError as error:
        raise ValueError(f"{name} is not an array ({first_line(error)}); give numbers of shape (N, D).") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; give numbers, as X.astype(np.float32) does.")
    if array.ndim != 2:
        remedy = "reshape(-1, 1) for one feature" if array.ndim == 1 else "pool or flatten it to one row per image"
        raise ValueError(f"{name} has shape {array.shape}; it must be (N, D): {remedy}.")
    if not array.size:
        raise ValueError(f"{name} has shape {array.shape}; give at least one row and one feature.")
    array = _to_floats(array)
    for start in range(0, len(array), CHUNK):
        bad = np.flatnonzero(~np.isfinite(array[start : start + CHUNK]).all(axis=1))
        if len(bad):
            raise ValueError(f"row {start + bad[0]} of {name} holds NaN or infinity; drop or repair it.")
    return array


def _to_numpy(values: Any) -> np.ndarray:
    """An array as it is; a tensor from wherever it is."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def _to_floats(array: np.ndarray) -> np.ndarray:
    """float16, float32 and float64 as they are, in this machine's byte order; whole numbers as float32."""
    if array.dtype.kind != "f":
        return array.astype(np.float32)
    return array.astype(f"=f{min(array.dtype.itemsize, 8)}", copy=False)


def read_labels(y: Any) -> np.ndarray:
    """(N,) int64 or texts. Whole numbers may be stored as floats, and truth values become the texts False and True.

    Raises:
        ValueError: for a missing label (None, NaN, an empty text), naming the first row; fractions; one-hot rows;
            several labels in a row; texts beside numbers.
    """
    y = y.to_pylist() if hasattr(y, "to_pylist") else y
    array = _to_numpy(y) if hasattr(y, "dtype") or _is_frame(y) else _as_objects(y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        remedy = "for one-hot rows y.argmax(axis=1), for several labels in a row one table for each label"
        raise ValueError(f"y has shape {array.shape}; it must be (N,): {remedy}.")
    if array.dtype.kind in "mM" and len(array):  # whose nanoseconds would pass for class numbers
        raise ValueError(f"y holds {array[0]}; give class names or whole numbers.")
    if array.dtype.kind not in "iubfU":
        array = _unify_objects(array)
    bad = ~np.isfinite(array) if array.dtype.kind == "f" else array == "" if array.dtype.kind == "U" else np.zeros(1)
    if bad.any():
        raise ValueError(f"row {int(np.argmax(bad))} has no label; remove the {int(bad.sum()):,} rows without one.")
    if array.dtype.kind == "f" and (array != np.round(array)).any():
        raise ValueError(f"y holds {array[array != np.round(array)][0]}; give class names or whole numbers.")
    if array.dtype.kind in "uf" and (np.abs(array) > MAX_LABEL).any():
        raise ValueError(f"y holds {array[np.abs(array) > MAX_LABEL][0]}; class numbers must be at most 2^53.")
    if array.dtype.kind == "b":
        return array.astype(str)
    return array if array.dtype.kind == "U" else array.astype(np.int64)


def _as_objects(y: Any) -> np.ndarray:
    """A list as an array of its elements, which numpy would turn into texts if one of them is a text."""
    y = list(y)
    array = np.empty(len(y), dtype=object)
    array[:] = y
    return array


def _unify_objects(array: np.ndarray) -> np.ndarray:
    """Python objects as an array of texts, truth values or numbers."""
    values = array.tolist()
    for row, value in enumerate(values):
        if value is None or str(value) in ("<NA>", "NaT") or value != value:  # as pandas and NaN mark what is missing
            raise ValueError(f"row {row} has no label; remove the rows without one.")
        if isinstance(value, list | tuple | set | dict | np.ndarray):
            remedy = "give one class a row, or make one table for each label: y = ['cat' in labels for labels in y]"
            raise ValueError(f"row {row} has several labels, {value!r}; {remedy}.")
    kinds = {"text" if isinstance(value, str) else "number" for value in values}
    if len(kinds) > 1:
        raise ValueError("y holds texts and numbers; give class names alone or numbers alone.")
    unified = np.array(values) if values else np.zeros(0, np.int64)
    if unified.dtype.kind not in "iubfU":
        raise ValueError(f"y holds {values[0]!r}; give class names or whole numbers.")
    return unified


def _read_groups(groups: Any, count: int) -> np.ndarray:
    """(N,) numbers or texts."""
    try:
        array = read_labels(groups)
    except ValueError as error:
        raise ValueError(f"groups: {error}") from error
    if len(array) != count:
        raise ValueError(f"groups has {len(array):,} entries for {count:,} rows; give as many of each.")
    return array


def _check_alike(own: dict[str, OwnSplit]) -> None:
    """Raise ValueError for splits that differ in their members, their groups or the type of their labels."""
    train = own["train"]
    shapes = {name: block.shape[1] for name, block in train.blocks.items()}
    for kind, split in own.items():
        others = {name: block.shape[1] for name, block in split.blocks.items()}
        if others != shapes:
            raise ValueError(f"the {kind} split has the members {others}, and train {shapes}; give the same.")
        if (split.groups is None) != (train.groups is None):
            raise ValueError(f"groups are given for some splits only; give them for {' and '.join(own)}, or for none.")
        if split.labels.dtype.kind != train.labels.dtype.kind or split.class_names != train.class_names:
            raise ValueError(f"the {kind} split has other labels than train: {_sample(split)}, and {_sample(train)}.")


def _sample(split: OwnSplit) -> str:
    names = split.class_names or split.labels.tolist()
    return _list(list(dict.fromkeys(map(repr, names))), 3)


def _number_classes(own: dict[str, OwnSplit], class_names: Sequence[str] | None) -> dict[str, OwnSplit]:
    """Replace labels by class numbers, alike in all splits, and keep the names of all classes."""
    names = own["train"].class_names if class_names is None else list(map(str, class_names))
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"class_names={_list(names)} has a name twice; give each class its own.")
    values = np.unique(np.concatenate([split.labels for split in own.values()]))
    if values.dtype.kind == "U" and names is not None:
        if unknown := [value for value in values.tolist() if value not in names]:
            raise ValueError(f"labels {_list(unknown)} are not among class_names={_list(names)}.")
        values = np.array(names)
    elif names is not None:
        if values[0] < 0 or values[-1] >= len(names):
            found = values[0] if values[0] < 0 else values[-1]
            raise ValueError(f"label {found} is hidden or has no name: {len(names)} class names go from 0.")
        values = np.arange(len(names))
    elif values.dtype.kind == "i" and values[0] == -1 and values.tolist() != [-1, 1]:
        raise ValueError("label -1 marks rows whose label is hidden; remove them, or name the class otherwise.")
    order = np.argsort(values)
    names = values.astype(str).tolist() if names is None else names
    numbers = {kind: order[np.searchsorted(values, split.labels, sorter=order)] for kind, split in own.items()}
    return {
        kind: split._replace(labels=numbers[kind].astype(np.int64), class_names=names) for kind, split in own.items()
    }


def cut_off(
    labels: np.ndarray, hashes: Sequence[bytes], groups: np.ndarray | None, *, name: str, size: float, seed: int
) -> np.ndarray:
    """(N,) bool: which rows to cut off as another split, a fraction `size`, as `load_data` cuts images.

    Rows with one hash, and rows of one group, stay together. Raises ValueError, with the `name` of the fraction, where
    a side would be empty.
    """
    from concat_ensemble.data.cuts import assign_units, cut_rows
    from concat_ensemble.data.groups import join_units, number_values

    if not 0 < size < 1:
        raise ValueError(f"{name}={size} must be a fraction between 0 and 1.")
    values = [hashes] if groups is None else [hashes, groups.tolist()]
    units = join_units([number_values({"": each})[""] for each in values])
    if units is None:
        return cut_rows(labels, name, size, seed)
    side = assign_units(units, labels, size, seed)
    if side.all() or not side.any():
        raise ValueError(f"{name}={size} cannot be cut off {len(labels)} rows that are copies or have one group.")
    return side


def _list(names: Sequence, limit: int = 12) -> str:
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")
