"""Peak memory of `probe` over the number and the size of photographs, of this version and of an earlier one.

    .venv/bin/python tests/benchmarks/probe_memory.py --before b3d18c1

The photographs are JPEG files in class folders, made for the run in a temporary folder; the model is a small network
with random weights. Each `probe` runs in a process of its own, whose largest resident memory is printed in MB, beside
the memory that all photographs would take when decoded. About 3 minutes on 2 cores, and as long again for the other
version. Measured there; most of what remains is torch and one batch of the network:

| photographs | megapixels | decoded | b3d18c1 | now |
|---|---|---|---|---|
| 50 | 1 | 143 | 1,286 | 1,275 |
| 200 | 1 | 572 | 1,768 | 1,178 |
| 400 | 1 | 1,143 | 2,529 | 1,193 |
| 50 | 3 | 429 | 1,581 | 1,327 |
| 50 | 12 | 1,717 | 3,333 | 1,277 |
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[2]
SIZES = {1: (1224, 816), 3: (2122, 1414), 12: (4244, 2828)}  # megapixels -> width, height
POINTS = [(50, 1), (200, 1), (400, 1), (50, 3), (50, 12)]  # photographs, megapixels


def write_photographs(folder: Path, number: int, megapixels: int) -> None:
    """Class folders a and b, b brighter. Bytes after a JPEG's end are not read, but make the files differ."""
    rng = np.random.default_rng(0)
    for label, level in {"a": 60, "b": 120}.items():
        coarse = (rng.integers(0, 100, (34, 51, 3)) + level).astype(np.uint8)
        (folder / label).mkdir(parents=True)
        path = folder / label / "0.jpg"
        PIL.Image.fromarray(coarse).resize(SIZES[megapixels]).save(path, quality=90)
        content = path.read_bytes()
        for n in range(1, number // 2):
            (folder / label / f"{n}.jpg").write_bytes(content + str(n).encode())


def peak_memory(source: Path, photographs: Path) -> float:
    """MB that a probe with the code in `source` takes at most."""
    with tempfile.TemporaryDirectory() as place:
        settings = {"PYTHONPATH": str(source), "HF_HOME": place, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        program = "from concat_ensemble.commands.app import main; main()"
        words = ["probe", "random:test_resnet", "--dataset", f"imagefolder:{photographs}", "--quiet"]
        words += ["--output", f"{place}/results.json"]
        command = [sys.executable, "-c", program, *words]
        process = subprocess.Popen(command, cwd=place, env=os.environ | settings, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"the probe of {photographs.name} failed.")
    return usage.ru_maxrss / 1024


def unpack(commit: str, folder: Path) -> Path:
    """The code of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--small", action="store_true", help="a few photographs only, to try it out")
    options = parser.parse_args()
    before, points = options.before, [(20, 1)] if options.small else POINTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {before: unpack(before, folder / "before")} if before else {}
        sources["now"] = ROOT
        print("| photographs | megapixels | decoded | " + " | ".join(sources) + " |")
        print("|---|---|---|" + "---|" * len(sources))
        for number, megapixels in points:
            photographs = folder / f"{number}-of-{megapixels}"
            write_photographs(photographs, number, megapixels)
            peaks = [f"{peak_memory(source, photographs):,.0f}" for source in sources.values()]
            width, height = SIZES[megapixels]
            decoded = number * width * height * 3 / 2**20
            print(f"| {number} | {megapixels} | {decoded:,.0f} | " + " | ".join(peaks) + " |", flush=True)


if __name__ == "__main__":
    main()
