"""Arrow (datasets) against safetensors shards: seconds to write 50,000 x 2,048 float32 features and to read them.

.venv/bin/python tests/benchmarks/feature_storage.py
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from safetensors import safe_open
from safetensors.torch import save_file

NUM_FEATURES, SHARD = 2_048, 4_096
REPEATS = 3
ACTIONS = ("write", "read all", "read a tenth at random")


def arrow_write(block: np.ndarray, folder: Path) -> None:
    # From the buffer: row by row, or as nested lists, it takes a hundred times as long.
    column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), NUM_FEATURES)
    Dataset(pa.table({"block": column})).save_to_disk(folder)


def arrow_read(folder: Path, rows: np.ndarray) -> np.ndarray:
    dataset = load_from_disk(folder).with_format("numpy")
    return np.asarray(dataset[:]["block"] if len(rows) == len(dataset) else dataset[rows]["block"])


def safetensors_write(block: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    for start in range(0, len(block), SHARD):
        shard = {"block": torch.from_numpy(block[start : start + SHARD])}
        save_file(shard, folder / f"{start // SHARD:05d}.safetensors")


def safetensors_read(folder: Path, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), NUM_FEATURES), np.float32)
    for number, file in enumerate(sorted(folder.iterdir())):
        shard = safe_open(file, "pt").get_tensor("block").numpy()  # memory-mapped
        here = np.flatnonzero(rows // SHARD == number)
        out[here] = shard[rows[here] - number * SHARD]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    disable_progress_bars()
    rng = np.random.default_rng(0)
    block = rng.standard_normal((options.rows, NUM_FEATURES), dtype=np.float32)
    rows = rng.permutation(options.rows)[: options.rows // 10]
    formats = {
        "datasets (Arrow)": (arrow_write, arrow_read),
        "safetensors shards": (safetensors_write, safetensors_read),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        for name, (write, read) in formats.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "table"
                times = [time.perf_counter()]
                write(block, folder)
                times.append(time.perf_counter())
                everything = read(folder, np.arange(options.rows))
                times.append(time.perf_counter())
                some = read(folder, rows)
                times.append(time.perf_counter())
                np.testing.assert_array_equal(everything, block)
                np.testing.assert_array_equal(some, block[rows])
            for action, duration in zip(ACTIONS, np.diff(times), strict=True):
                seconds.setdefault((action, name), []).append(duration)
    arrow, tensors = formats
    for action in ACTIONS:
        a, b = median(seconds[action, arrow]), median(seconds[action, tensors])
        print(f"{action:22s} {arrow} {a:6.2f} s   {tensors} {b:6.2f} s   ratio {a / b:5.1f}   (medians of {REPEATS})")


if __name__ == "__main__":
    main()
