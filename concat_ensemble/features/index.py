"""Arrays with an entry for each image of a dataset, kept in temporary files: image hashes, and numbers by image hash.

A million entries of Python's sets and dicts take hundreds of megabytes in each process; here they take none that the
system cannot write back to the file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from concat_ensemble.data.images import HASH_BYTES

HASH = np.dtype(f"S{HASH_BYTES}")  # compares all bytes; but a single element, taken out, loses the zeros at its end
SMALL = 1 << 12  # entries up to which an array stays in memory
LONGEST = 1 << 17  # entries that are sorted at a time


def to_hashes(images: Iterable[bytes] | np.ndarray) -> np.ndarray:
    """(n,) hashes."""
    return images if isinstance(images, np.ndarray) else np.frombuffer(b"".join(images), HASH)


def to_bytes(hashes: np.ndarray) -> list[bytes]:
    """The hashes one by one."""
    content = hashes.tobytes()
    return [content[start : start + HASH_BYTES] for start in range(0, len(content), HASH_BYTES)]


class DiskArray:
    """An array in a temporary file, which grows at its end. `read` gives what it has so far, memory-mapped."""

    def __init__(self, dtype: DTypeLike):
        self._dtype, self._file, self._length = np.dtype(dtype), tempfile.TemporaryFile(), 0  # noqa: SIM115

    def __len__(self) -> int:
        return self._length

    def append(self, values: Any) -> None:
        values = np.asarray(values, self._dtype)
        self._file.write(values.tobytes())
        self._length += len(values)

    def read(self) -> np.ndarray:
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, "r", shape=self._length)) if len(self) else self._empty()

    def _empty(self) -> np.ndarray:
        return np.empty(0, self._dtype)


class HashIndex:
    """Numbers from 0 by image hash. A hash that is added again gets the new number.

    They are in sorted arrays. Two neighbors are merged once the later one is as long as the earlier one, up to
    `LONGEST`, so that there are few of them and little is sorted at a time.
    """

    def __init__(self):
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # sorted hashes and their numbers, the oldest first

    def add(self, hashes: np.ndarray, numbers: np.ndarray) -> None:
        if not len(hashes):
            return
        self._runs.append(_sort(hashes, numbers))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= len(self._runs[-1][0]) <= LONGEST // 2:
            older, newer = self._runs[-2:]
            self._runs[-2:] = [_sort(*(np.concatenate(pair) for pair in zip(older, newer, strict=True)))]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of each hash, -1 where it is not there."""
        if len(hashes) <= SMALL:
            return self._find(hashes)
        numbers = DiskArray(np.int64)
        for start in range(0, len(hashes), SMALL):
            numbers.append(self._find(hashes[start : start + SMALL]))
        return numbers.read()

    def _find(self, hashes: np.ndarray) -> np.ndarray:
        found = np.full(len(hashes), -1, np.int64)
        for keys, numbers in self._runs:
            places = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            there = keys[places] == hashes
            found[there] = numbers[places[there]]
        return found


def _sort(hashes: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by hash; of equal hashes the last one."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    last = np.append(hashes[1:] != hashes[:-1], True)[: len(hashes)]
    return _store(hashes[last]), _store(numbers[order][last])


def _store(values: np.ndarray) -> np.ndarray:
    if len(values) <= SMALL:
        return values
    array = DiskArray(values.dtype)
    array.append(values)
    return array.read()
