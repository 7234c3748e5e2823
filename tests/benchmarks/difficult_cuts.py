"""Cuts of a labelled dataset on which a careless probe gives confident false answers, to see what `probe` prints.

python tests/benchmarks/difficult_cuts.py PARQUET_FOLDER OUTPUT

PARQUET_FOLDER holds train.parquet and test.parquet with the columns `image` and `label` (MNIST in its usual form).
OUTPUT gets one folder for each cut, which `concat-ensemble probe MODEL --dataset OUTPUT/CUT` reads:

- imbalanced: 4 or 9, of which 3% are 9, so that always answering 4 is right 97% of the time.
- leaking: random labels, and a test split that is a copy of the training split.
- grouped: random labels of 60 images, each in 8 versions that are shifted by a pixel; the column `source` says which
  versions belong together (`--group-column source`).
- forty: 40 images of four digits.
"""

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageChops
from datasets import Dataset, load_dataset

SHIFTS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)]


def imbalanced(split: Dataset, rng: np.random.Generator, number: int = 1_000) -> Dataset:
    """`number` images of two digits, 3% of them of the second."""
    labels = np.asarray(split["label"])
    nines = number * 3 // 100
    rows = [
        rng.choice(np.flatnonzero(labels == digit), size, False) for digit, size in ((4, number - nines), (9, nines))
    ]
    return split.select(rng.permutation(np.concatenate(rows))).cast_column("label", split.features["label"])


def random_labels(split: Dataset, rng: np.random.Generator, number: int = 600) -> Dataset:
    """`number` images with labels that have nothing to do with them."""
    chosen = split.select(rng.choice(len(split), number, False))
    return relabel(chosen, rng.integers(0, 10, number))


def grouped(split: Dataset, rng: np.random.Generator, sources: int = 60) -> Dataset:
    """Eight shifted versions of each of some images, with one random label for each image."""
    rows, labels = rng.choice(len(split), sources, False), rng.integers(0, 3, sources)
    images = [
        (number, PIL.ImageChops.offset(image, *shift))
        for number, image in enumerate(split[rows]["image"])
        for shift in SHIFTS
    ]
    columns = {"image": [image for _, image in images], "label": [int(labels[n]) for n, _ in images]}
    columns["source"] = [f"image {rows[n]}" for n, _ in images]
    return Dataset.from_dict(columns).cast_column("image", split.features["image"])


def forty(split: Dataset, rng: np.random.Generator) -> Dataset:
    """Ten images of each of four digits."""
    labels = np.asarray(split["label"])
    rows = [rng.choice(np.flatnonzero(labels == digit), 10, False) for digit in (3, 5, 8, 9)]
    return split.select(np.concatenate(rows))


def relabel(split: Dataset, labels: np.ndarray) -> Dataset:
    return split.remove_columns("label").add_column("label", labels.tolist())


def main(source: Path, output: Path) -> None:
    files = {kind: str(source / f"{kind}.parquet") for kind in ("train", "test")}
    data, rng = load_dataset("parquet", data_files=files), np.random.default_rng(0)
    leaking = random_labels(data["train"], rng)
    cuts = {
        "imbalanced": {kind: imbalanced(data[kind], rng) for kind in files},
        "leaking": {"train": leaking, "test": leaking.select(rng.permutation(len(leaking)))},
        "grouped": {"train": grouped(data["train"], rng)},
        "forty": {"train": forty(data["train"], rng)},
    }
    for name, splits in cuts.items():
        for kind, split in splits.items():
            (output / name).mkdir(parents=True, exist_ok=True)
            split.to_parquet(output / name / f"{kind}.parquet")
            print(f"{output / name / kind}.parquet: {len(split):,} images")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
