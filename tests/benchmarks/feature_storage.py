"""Arrow (datasets) against safetensors shards for 50,000 x 2,048 float32 features: write, open, read all, read 5,000 rows at random.

.venv/bin/python tests/benchmarks/feature_storage.py
"""

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

ROWS, WIDTH, SHARD = 50_000, 2_048, 4_096
REPEATS = 3


def arrow_write(block: np.ndarray, folder: Path) -> None:
    # Straight from the buffer: row by row, or as nested lists, it takes a hundred times longer.
    column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), WIDTH)
    Dataset(pa.table({"block": column})).save_to_disk(folder)


def arrow_read(folder: Path, rows=None) -> np.ndarray:
    dataset = load_from_disk(folder).with_format("numpy")
    return np.asarray(dataset[:]["block"] if rows is None else dataset[rows]["block"])


def safetensors_write(block: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    for start in range(0, ROWS, SHARD):
        save_file(
            {"block": torch.from_numpy(block[start : start + SHARD])}, folder / f"{start // SHARD:05d}.safetensors"
        )


def safetensors_read(folder: Path, rows=None) -> np.ndarray:
    rows = np.arange(ROWS) if rows is None else rows
    out = np.empty((len(rows), WIDTH), np.float32)
    for number, file in enumerate(sorted(folder.iterdir())):
        shard = safe_open(file, "pt").get_tensor("block").numpy()  # mapped, not read
        here = np.flatnonzero(rows // SHARD == number)
        out[here] = shard[rows[here] - number * SHARD]
    return out


def main() -> None:
    disable_progress_bars()
    rng = np.random.default_rng(0)
    block = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    rows = rng.permutation(ROWS)[:5_000]
    sides = {
        "datasets (Arrow)": (arrow_write, arrow_read),
        "safetensors shards": (safetensors_write, safetensors_read),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        for name, (write, read) in sides.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "table"
                for what, action in (
                    ("write", lambda write=write, folder=folder: write(block, folder)),
                    ("read all", lambda read=read, folder=folder: read(folder)),
                    ("read 5,000 at random", lambda read=read, folder=folder: read(folder, rows)),
                ):
                    started = time.perf_counter()
                    result = action()
                    seconds.setdefault((what, name), []).append(time.perf_counter() - started)
                    if what != "write":
                        np.testing.assert_array_equal(result, block if what == "read all" else block[rows])
    arrow, tensors = sides
    for what in ("write", "read all", "read 5,000 at random"):
        a, b = median(seconds[what, arrow]), median(seconds[what, tensors])
        print(f"{what:22s} {arrow} {a:6.2f} s   {tensors} {b:6.2f} s   ratio {a / b:5.1f}   (medians of {REPEATS})")


if __name__ == "__main__":
    main()
