"""Ridge and logistic probes of a million rows in half precision, streamed from disk, and the memory that they take.

    .venv/bin/python tests/benchmarks/larger_than_memory.py

Makes a table of --rows x --width float16 in a temporary folder (4 GB), probes it with --classes classes and prints seconds, passes over the
rows, held-out top-1, and the most memory of the process's own (RssAnon: mapped files are not counted).
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


def make(path: Path, rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy rows around their class's centre, written as they are made."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    centres = 0.1 * rng.standard_normal((classes, width), dtype=np.float32)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, width))
    for start in range(0, rows, CHUNK):
        part = labels[start : start + CHUNK]
        features[start : start + CHUNK] = centres[part] + rng.standard_normal((len(part), width), dtype=np.float32)
    features.flush()
    return np.load(path, mmap_mode="r"), labels


class Memory:
    """The most memory of this process's own while it is watched, in GB."""

    def __enter__(self):
        self.most, self._stop = 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._watcher.join()

    def _watch(self):
        while not self._stop.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, now / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("width", 2_048), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    options = parser.parse_args()
    made = StandardizedFeatures._made
    passes = 0.0

    def counted(self, dtype):
        nonlocal passes
        for rows, chunk in made(self, dtype):
            passes += len(chunk) / options.rows
            yield rows, chunk

    StandardizedFeatures._made = counted
    with tempfile.TemporaryDirectory() as folder:
        features, labels = make(Path(folder) / "features.npy", options.rows, options.width, options.classes)
        held = options.rows // 20
        train = TableSplit([features[held:]], labels[held:])
        validation = TableSplit([features[:held]], labels[:held])
        for probe in (PROBES[name](in_memory=False) for name in options.probes):
            passes, started = 0.0, time.perf_counter()
            with Memory() as memory:
                probe.fit(train, validation=validation)
            print(
                f"{type(probe).__name__}: {time.perf_counter() - started:.0f} s, {passes:.0f} passes, "
                f"held-out top-1 {100 * max(probe.path_.values()):.2f}, {memory.most:.2f} GB of its own",
                flush=True,
            )


if __name__ == "__main__":
    main()
