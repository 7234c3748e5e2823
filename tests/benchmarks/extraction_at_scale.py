"""What extraction reads and keeps in memory as the rows and the processes grow.

    python tests/benchmarks/extraction_at_scale.py --rows 10000 1000000

Makes --rows images of 8 x 8 in Arrow files and extracts them with a network that only averages, so that a million
rows take minutes. Prints for each number of rows, and each number of processes: the images and bytes that each process
read, the peak of its own memory above what it had before (RssAnon, which does not count mapped files), and seconds.
Then: loading and auditing too, as the commands do, where each image is read once for its hash and once more to decode
it; a run that is killed half-way and started again; two nodes on this machine, with one store and with a store each;
the same rows as a stream. All of them must give the same features, in the same order, or it exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FILES, SIDE, MEAN_FEATURES = 4, 8, 48
BATCH = 64


def write_images(folder: Path, rows: int) -> None:
    """Arrow files of small bitmaps of noise, half of them for training."""
    from datasets import ClassLabel, Features, Image
    from datasets.arrow_writer import ArrowWriter

    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b"]))
    size = 3 * SIDE * SIDE
    head = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54 + size, 0, 0, 54, 40, SIDE, SIDE, 1, 24, 0, size, 0, 0, 0, 0)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for part in range(FILES):
            with ArrowWriter(features=features, path=str(folder / f"{split}-{part}.arrow")) as writer:
                for row in range(rows // 2 // FILES):
                    writer.write({"image": {"bytes": head + rng.bytes(size), "path": None}, "label": row % 2})
                writer.finalize()


def extract(options: argparse.Namespace) -> None:
    """One process of an extraction. Writes what it read and used to a file."""
    import torch
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from concat_ensemble import extract_features, load_data
    from concat_ensemble.data.audit import audit_splits
    from concat_ensemble.processes import process_state

    class Pixels(BaseImageProcessor):
        def preprocess(self, images, **kwargs):
            return {"pixel_values": torch.from_numpy(np.array(images[0], np.float32))[None]}

        __call__ = preprocess

    class Mean(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixel_values):
            pooled = self.scale * pixel_values.reshape(len(pixel_values), MEAN_FEATURES, -1).mean(2)
            return BaseModelOutputWithPooling(pooler_output=pooled)

    torch.set_num_threads(1)
    read = count_reads(options)
    files = {split: sorted(map(str, options.data.glob(f"{split}-*.arrow"))) for split in ("train", "test")}
    if options.stream:
        data: Any = load_dataset("arrow", data_files=files, streaming=True)
    else:
        data = DatasetDict(
            {name: concatenate_datasets(list(map(Dataset.from_file, own))) for name, own in files.items()}
        )
    state = process_state()
    base, started = own_memory(), time.perf_counter()
    with PeakMemory() as memory:
        if options.audit:
            data = audit_splits(load_data(data, hash_images=True)).data
        table = extract_features(
            Mean(PreTrainedConfig()), data, Pixels(), store=options.store, batch_size=BATCH, device="cpu", quiet=True
        )
    seconds, digest = time.perf_counter() - started, hashlib.sha256()
    for split in table:
        for start in range(0, len(table[split]), 10_000):
            digest.update(table[split].rows(slice(start, start + 10_000)).tobytes())
        digest.update(table[split].labels.tobytes())
    result = {"read": read, "extracted": table.extracted, "seconds": seconds, "digest": digest.hexdigest()}
    result["megabytes"] = memory.peak - base
    options.result.with_name(f"{options.result.name}-{state.process_index}").write_text(json.dumps(result))


def count_reads(options: argparse.Namespace) -> dict[str, int]:
    """The images and bytes that this process reads, which are counted from now on."""
    from concat_ensemble.data import images
    from concat_ensemble.features import reading

    read: dict[str, int] = {"images": 0, "bytes": 0}
    read_encoded, open_image = images.read_encoded, reading.open_image

    def count(encoded, row):
        read["images"] += 1
        read["bytes"] += len(encoded["bytes"])
        if read["images"] == options.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_encoded(encoded, row)

    images.read_encoded = reading.read_encoded = count
    if options.audit:  # the hash is known by then, so that an image is read once more to decode it
        reading.open_image = lambda encoded: open_image(count(encoded, 0)[1])
    return read


def own_memory() -> float:
    """Megabytes of this process that belong to no file."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1e3


class PeakMemory:
    """Context that records the peak of this process's own memory, in megabytes, as `peak`."""

    def __enter__(self):
        import threading

        self.peak, self._stop = own_memory(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._watcher.join()

    def _watch(self):
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, own_memory())


class Launcher:
    """Starts extractions of the images in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def start(self, store: str, *words: str, launch: list[str], result: str) -> subprocess.Popen:
        script = [__file__, "--extract", "--data", str(self.folder / "data"), "--store", str(self.folder / store)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *script]
        command += ["--result", str(self.folder / result), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, store: str, *words: str, processes: int = 1) -> list[dict[str, Any]]:
        """What the processes of one extraction write."""
        self.count += 1
        launch = ["--num_processes", str(processes), *(["--multi_gpu", "--main_process_port", "0"] * (processes > 1))]
        process = self.start(store, *words, launch=launch, result=f"result-{self.count}")
        errors = process.communicate()[1]
        results = [self.folder / f"result-{self.count}-{number}" for number in range(processes)]
        if "--kill-after" not in words and process.returncode:
            raise SystemExit(errors)
        return [json.loads(path.read_text()) for path in results if path.exists()]

    def run_nodes(self, stores: tuple[str, str]) -> tuple[list[dict[str, Any]], str]:
        """What two nodes of one process each write, and the error if they fail."""
        self.count += 1
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            number = str(port.getsockname()[1])
        shared = ["--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
        nodes = [
            self.start(
                store,
                launch=[*shared, "--main_process_port", number, "--machine_rank", str(rank)],
                result=f"result-{self.count}",
            )
            for rank, store in enumerate(stores)
        ]
        errors = [node.communicate()[1] for node in nodes]
        paths = [self.folder / f"result-{self.count}-{rank}" for rank in range(2)]
        lines = [line for line in "\n".join(errors).splitlines() if "ValueError: " in line]
        return [json.loads(path.read_text()) for path in paths if path.exists()], lines[0] if lines else ""


def measure(rows: int, processes: list[int], folder: Path) -> dict[str, Any]:
    """Everything that is shown, for one number of rows."""
    (folder / "data").mkdir()
    write_images(folder / "data", rows)
    launcher, result = Launcher(folder), {"rows": rows}
    result["processes"] = {number: launcher.run(f"store-{number}", processes=number) for number in processes}
    result["audited"] = {
        number: launcher.run(f"audited-{number}", "--audit", processes=number) for number in processes
    }
    launcher.run("killed", "--kill-after", str(rows // 2))
    result["restart"] = launcher.run("killed")
    result["again"] = launcher.run("killed")
    result["stream"] = launcher.run("streamed", "--stream", processes=2)
    result["nodes"], _ = launcher.run_nodes(("nodes", "nodes"))
    _, result["two disks"] = launcher.run_nodes(("disk-0", "disk-1"))
    return result


def describe(result: dict[str, Any]) -> str:
    """A Markdown table."""
    runs = {f"{number} processes": own for number, own in result["processes"].items()}
    runs |= {f"load, audit and extract, {number} processes": own for number, own in result["audited"].items()}
    runs |= {"after a kill half-way": result["restart"], "once more": result["again"]}
    runs |= {"stream, 2 processes": result["stream"], "2 nodes": result["nodes"]}
    lines = [f"\n{result['rows']:,} rows\n", "| | images read | MB read | extracted | MB of memory | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for name, own in runs.items():
        cells = [
            ", ".join(f"{each['read']['images']:,}" for each in own),
            ", ".join(f"{each['read']['bytes'] / 1e6:.1f}" for each in own),
            ", ".join(f"{each['extracted']:,}" for each in own),
            ", ".join(f"{each['megabytes']:.0f}" for each in own),
            f"{max(each['seconds'] for each in own):.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"\nNodes with a disk each: {result['two disks']}"])


def is_same(result: dict[str, Any]) -> bool:
    """Whether the features and labels of all runs are the same; those with an audit have a validation split."""
    runs = [*result["processes"].values(), result["restart"], result["again"], result["stream"], result["nodes"]]
    same = [{each["digest"] for run in group for each in run} for group in (runs, result["audited"].values())]
    return all(len(digests) == 1 for digests in same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="Write the numbers to this file too.")
    parser.add_argument("--extract", action="store_true", help=argparse.SUPPRESS)  # one process, as started here
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--audit", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, help=argparse.SUPPRESS)
    for name in ("data", "store", "result"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.extract:
        extract(options)
        return
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(rows, options.processes, Path(folder)))
        print(describe(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if not all(map(is_same, results)):
        raise SystemExit("the runs give different features")


if __name__ == "__main__":
    main()
