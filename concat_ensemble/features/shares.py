"""Which images each of several processes reads, and what all of them know of the images in the end.

Each process reads a share of the rows and writes what it knows of them to a file in a folder that all processes see;
then each reads the files of all. So every image is read by one process only.
"""

from __future__ import annotations

import itertools
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list, gather_object
from datasets import ClassLabel, Dataset, DatasetInfo, IterableDataset
from datasets.exceptions import DatasetsError

from concat_ensemble.data.bad_images import BadImages, describe_bad_images
from concat_ensemble.data.columns import read_features, select_columns
from concat_ensemble.data.images import stored_hashes
from concat_ensemble.data.local_files import confine_files
from concat_ensemble.data.splits import pick_splits
from concat_ensemble.data.streams import resolve_features
from concat_ensemble.errors import first_line
from concat_ensemble.features.index import HASH, DiskArray
from concat_ensemble.features.reading import Batch, Image
from concat_ensemble.files import replace_file
from concat_ensemble.processes import process_state

FOLDER = ".rows-"  # begins the name of the folder through which processes tell each other of their rows
KEPT = 30 * 86_400  # seconds after which such a folder was left by a kill


class LoadedShare:
    """This process's share of the rows of loaded splits: of pieces of the sizes `sizes`, every N-th."""

    def __init__(self, splits: Mapping[str, Dataset], sizes: list[int]):
        state, stops = process_state(), itertools.accumulate(sizes)
        self.splits = splits
        self._pieces = [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self._own = self._pieces[state.process_index :: state.num_processes]
        self._hashes = DiskArray(HASH)
        self.total: int | None = sum(map(len, self._own))

    def shard_ends(self) -> Iterator[int]:
        """Numbers of images after which a file ends."""
        return itertools.accumulate(map(len, self._own))

    def images(self) -> Iterator[Image]:
        """The images of this share in order, from the first one that is not recorded yet."""
        known = {name: stored_hashes(split) for name, split in self.splits.items()}
        starts = dict(zip(self.splits, itertools.accumulate(map(len, self.splits.values()), initial=0), strict=False))
        for number in itertools.islice(itertools.chain(*self._own), len(self._hashes), None):
            name = next(name for name in reversed(starts) if starts[name] <= number and len(self.splits[name]))
            row, hashes = number - starts[name], known[name]
            yield Image(name, row, None if hashes is None else hashes[row])

    def record(self, batch: Batch) -> None:
        self._hashes.append(batch.hashes)

    def gather(self, folder: Path) -> tuple[Mapping[str, Dataset], dict[str, np.ndarray]]:
        """The splits and the hashes of their images, those of all processes."""
        shares = exchange(folder, "hashes", self._hashes.read())
        merged, ends = DiskArray(HASH), [0] * len(shares)
        for piece, process in zip(self._pieces, itertools.cycle(range(len(shares))), strict=False):
            merged.append(shares[process][ends[process] : ends[process] + len(piece)])
            ends[process] += len(piece)
        return self.splits, _split_up(merged.read(), {name: len(split) for name, split in self.splits.items()})

    def describe(self, bad: BadImages) -> str:
        return describe_bad_images(self.splits, bad)


class StreamedShare:
    """This process's share of streams: the files that `IterableDataset.shard` gives it. A stream is read once; its
    rows, which are only counted as they are read, keep their order. `make_sizes` gives the sizes of files, without
    end."""

    def __init__(self, streams: Mapping[str, IterableDataset], make_sizes: Callable[[], Iterator[int]]):
        self.streams, self._make_sizes, self.splits = streams, make_sizes, {}
        self._hashes = DiskArray(HASH)
        self._labels = {name: DiskArray(np.int64) for name in streams}
        self.total: int | None = None

    def shard_ends(self) -> Iterator[int]:
        return itertools.accumulate(self._make_sizes())

    def images(self) -> Iterator[Image]:
        state = process_state()
        for name, stream in self.streams.items():
            shares = min(state.num_processes, stream.num_shards)
            if state.process_index >= shares:
                continue
            try:
                for row, example in enumerate(stream.shard(shares, state.process_index)):
                    if example["label"] is None or example["label"] < 0:
                        raise ValueError(f"row {row} has no label")
                    self._labels[name].append([example["label"]])
                    yield Image(name, row, None, example["image"] or {"bytes": None, "path": None})
            except (OSError, ValueError, TypeError, KeyError, DatasetsError, pa.ArrowException, tarfile.TarError) as e:
                raise ValueError(f"cannot read the {name} stream: {first_line(e)}") from e

    def record(self, batch: Batch) -> None:
        self._hashes.append(batch.hashes)

    def gather(self, folder: Path) -> tuple[Mapping[str, Dataset], dict[str, np.ndarray]]:
        """The labels of the splits, as datasets without images, and the hashes of the images."""
        labels = {name: exchange(folder, f"labels-{name}", own.read()) for name, own in self._labels.items()}
        parts = [
            _split_up(hashes, {name: len(own[process]) for name, own in labels.items()})
            for process, hashes in enumerate(exchange(folder, "hashes", self._hashes.read()))
        ]
        splits = {name: _only_labels(stream, np.concatenate(labels[name])) for name, stream in self.streams.items()}
        return splits, {name: _join([part[name] for part in parts], HASH) for name in splits}

    def describe(self, bad: BadImages) -> str:
        split, rows = next((split, rows) for split, rows in bad.items() if rows)
        row, why = next(iter(rows.items()))
        return f"{sum(map(len, bad.values())):,} images, such as image {row} of the {split} stream: {why}"


Share = LoadedShare | StreamedShare


def prepare_streams(source: Any) -> dict[str, IterableDataset]:
    """Streams with the columns and the names of splits of `load_data`. Raises ValueError for labels that are no
    `ClassLabel`, as a stream does not tell beforehand which classes there are."""
    streams = source if isinstance(source, Mapping) else {"train": source}
    picked: dict[str, Any] = pick_splits(streams, dict.fromkeys(("train", "validation", "test")))
    prepared = {}
    for kind, stream in picked.items():
        stream = select_columns(resolve_features(stream), kind, image_column=None, label_column=None)
        feature = read_features(stream)["label"]
        if not isinstance(feature, ClassLabel):
            problem = f"the labels of the {kind} stream are {feature.dtype} and do not list the classes"
            raise ValueError(f"{problem}; cast them: stream.cast_column('label', ClassLabel(names=...)).")
        prepared[kind] = confine_files(stream, kind, None)
    names = {tuple(read_features(stream)["label"].names) for stream in prepared.values()}
    if len(names) > 1:
        raise ValueError("the streams of the splits have different classes; cast their labels to one ClassLabel.")
    return prepared


@contextmanager
def shared_folder(store: Path) -> Iterator[Path]:
    """A folder in the store that all processes see, for the time of an extraction; a single process needs none.

    Raises:
        ValueError: if the store is not the same folder for all processes.
    """
    state = process_state()
    if state.num_processes == 1:
        yield store
        return
    folder = store / f"{FOLDER}{broadcast_object_list([secrets.token_hex(8)])[0]}"
    if state.is_main_process:
        for old in store.glob(f"{FOLDER}*"):
            if time.time() - old.stat().st_mtime > KEPT:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        state.wait_for_everyone()
        blind = gather_object([not folder.is_dir()]).count(True)
        if blind:
            problem = f"{blind} of {state.num_processes} processes do not see the folder {store} of the first one"
            raise ValueError(f"{problem}; set HF_ASSETS_CACHE (or store=...) to a folder that all nodes share.")
        yield folder
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def exchange(folder: Path, name: str, values: np.ndarray) -> list[np.ndarray]:
    """The values that each process has, in the order of the processes."""
    state = process_state()
    if state.num_processes == 1:
        return [values]
    paths = [folder / f"{name}-{process}" for process in range(state.num_processes)]
    with replace_file(paths[state.process_index]) as aside:
        values.tofile(aside)
    state.wait_for_everyone()
    return [
        np.fromfile(path, values.dtype, 0) if not path.stat().st_size else _map(path, values.dtype) for path in paths
    ]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r"))


def _join(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    joined = DiskArray(dtype)
    for part in parts:
        joined.append(part)
    return joined.read()


def _split_up(values: np.ndarray, lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Values in the order of the splits, by split."""
    ends = itertools.accumulate(lengths.values())
    return {name: values[end - length : end] for (name, length), end in zip(lengths.items(), ends, strict=True)}


def _only_labels(stream: IterableDataset, labels: np.ndarray) -> Dataset:
    features = read_features(stream)
    features = features.__class__({name: features[name] for name in ("image", "label")})
    schema = features.arrow_schema
    columns = [pa.nulls(len(labels), schema.field("image").type), pa.array(labels, schema.field("label").type)]
    return Dataset(pa.Table.from_arrays(columns, schema=schema), info=DatasetInfo(features=features))
