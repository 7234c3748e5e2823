"""Speed of `extract_features` beside a bare loop over the same images, and of a second run beside the first.

    .venv/bin/python tests/benchmarks/extraction.py

The images are enlarged digits with noise (JPEG, 256 x 256), the model is a ResNet-50 with random weights, which costs
as much as a trained one. Both sides decode, transform and run the model with --workers loading processes; ours also
hashes, stores and checks. Prints images per second of both (medians of alternating runs), their ratio, the ratio of
the second run to the first, and the shares of decoding and transforming, of the forward pass, and of hashing.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from concat_ensemble import ConcatEnsembleImageProcessor, assemble, extract_features, load_data
from concat_ensemble.data.images import image_hashes, read_image


def photographs(number: int) -> DatasetDict:
    """JPEG files of 256 x 256: a digit enlarged, with noise."""
    rng, digits = np.random.default_rng(0), load_digits()
    noise, encoded = rng.integers(0, 16, (512, 512, 3)), []
    for n in range(number):
        pixels = PILImage.fromarray((digits.images[n % 1797] * 15).astype(np.uint8)).resize((256, 256))
        top, left = rng.integers(0, 256, 2)
        noisy = np.asarray(pixels)[:, :, None] + noise[top : top + 256, left : left + 256]
        buffer = io.BytesIO()
        PILImage.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    labels = [int(digits.target[n % 1797]) for n in range(number)]
    features = Features(image=Image(decode=False), label=ClassLabel(num_classes=10))
    return load_data(Dataset.from_dict({"image": encoded, "label": labels}, features=features))


class ImageBatches(TorchDataset):
    """Pixels of one batch after the other, over all splits."""

    def __init__(self, dataset: DatasetDict, processor: ConcatEnsembleImageProcessor, batch_size: int):
        places = [(split, row) for split, rows in dataset.items() for row in range(len(rows))]
        self.batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
        self.dataset, self.processor = dataset, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> torch.Tensor:
        images = [read_image(self.dataset[split], row) for split, row in self.batches[number]]
        return self.processor(images, return_tensors="pt")["pixel_values"]


def bare_loop(model, processor, dataset: DatasetDict, batch_size: int, workers: int) -> float:
    """Seconds of a loop as one writes it by hand."""
    backbone = model.members["0"].eval().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    loader = DataLoader(ImageBatches(dataset, processor, batch_size), batch_size=None, num_workers=workers)
    with torch.inference_mode():
        torch.cat([backbone(pixels) for pixels in loader])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 512), ("batch-size", 64), ("workers", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    model, dataset = assemble("random:resnet50"), photographs(options.images)
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    settings = {"batch_size": options.batch_size, "num_workers": options.workers, "quiet": True}
    bare, first, second = [], [], []
    for _ in range(options.repeats):
        bare.append(bare_loop(model, processor, dataset, options.batch_size, options.workers))
        with tempfile.TemporaryDirectory() as store:
            for seconds in (first, second):
                started = time.perf_counter()
                extract_features(model, dataset, store=Path(store), **settings)
                seconds.append(time.perf_counter() - started)
    speeds = {name: options.images / median(s) for name, s in (("bare loop", bare), ("first run", first))}
    print("; ".join(f"{name} {speed:.1f} images/s" for name, speed in speeds.items()))
    share = 100 * speeds["first run"] / speeds["bare loop"]
    print(f"first run at {share:.0f}% of the bare loop (medians of {options.repeats})")
    print(f"second run {median(first) / median(second):.0f} times as fast as the first ({median(second):.2f} s)")

    split = dataset["train"]
    number = min(64, len(split))
    started = time.perf_counter()
    pixels = [processor([read_image(split, n)], return_tensors="pt")["pixel_values"] for n in range(number)]
    reading = (time.perf_counter() - started) / number
    started = time.perf_counter()
    image_hashes(split)
    hashing = (time.perf_counter() - started) / len(split)
    with torch.inference_mode():
        started = time.perf_counter()
        model(torch.cat(pixels).contiguous(memory_format=torch.channels_last))
        forward = (time.perf_counter() - started) / number
    total = reading + forward + hashing
    parts = {"decode and transform": reading, "forward": forward, "hash": hashing}
    shares = [f"{name} {1e3 * s:.2f} ms ({100 * s / total:.1f}%)" for name, s in parts.items()]
    print(f"one after the other, per image: {', '.join(shares)}")
    print(f"upper limit if {torch.get_num_threads()} cores do all of it: {1 / total:.1f} images/s")


if __name__ == "__main__":
    main()
