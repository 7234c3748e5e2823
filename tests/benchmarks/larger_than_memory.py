"""Time and memory of ridge and logistic probes on a million float16 rows that are streamed from disk.

    .venv/bin/python tests/benchmarks/larger_than_memory.py

Writes a table of --rows x --num-features float16 to a temporary folder (4 GB), probes it with --classes classes, and
prints seconds, passes over the rows, validation top-1, and the peak of the process's own memory (RssAnon, which does
not count mapped files).
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from concat_ensemble import LinearProbe, RidgeProbe
from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures
from concat_ensemble.features.table import TableSplit

PROBES = {"ridge": RidgeProbe, "linear": LinearProbe}


def write_table(path: Path, rows: int, num_features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy rows around the centers of their classes, and labels; the rows are written as they are generated."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    centers = 0.1 * rng.standard_normal((classes, num_features), dtype=np.float32)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, num_features))
    for start in range(0, rows, CHUNK):
        part = labels[start : start + CHUNK]
        noise = rng.standard_normal((len(part), num_features), dtype=np.float32)
        features[start : start + CHUNK] = centers[part] + noise
    features.flush()
    return np.load(path, mmap_mode="r"), labels


class PeakMemory:
    """Context that records the peak of this process's own memory, in GB, as `peak`."""

    def __enter__(self):
        self.peak, self._stop = 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._watcher.join()

    def _watch(self):
        while not self._stop.wait(0.05):
            status = Path("/proc/self/status").read_text()
            kilobytes = int(status.partition("RssAnon:")[2].split()[0])
            self.peak = max(self.peak, kilobytes / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("num-features", 2_048), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    options = parser.parse_args()
    read_chunks = StandardizedFeatures._read_chunks
    passes = 0.0

    def count_chunks(self, dtype):
        nonlocal passes
        for rows, chunk in read_chunks(self, dtype):
            passes += len(chunk) / options.rows
            yield rows, chunk

    StandardizedFeatures._read_chunks = count_chunks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        features, labels = write_table(path, options.rows, options.num_features, options.classes)
        cut = options.rows // 20
        train = TableSplit([features[cut:]], labels[cut:])
        validation = TableSplit([features[:cut]], labels[:cut])
        for probe in (PROBES[name](in_memory=False) for name in options.probes):
            passes, started = 0.0, time.perf_counter()
            with PeakMemory() as memory:
                probe.fit(train, validation=validation)
            print(
                f"{type(probe).__name__}: {time.perf_counter() - started:.0f} s, {passes:.0f} passes, "
                f"validation top-1 {100 * max(probe.path_.values()):.2f}, {memory.peak:.2f} GB of its own memory",
                flush=True,
            )


if __name__ == "__main__":
    main()
