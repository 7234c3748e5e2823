"""What it saves to train several members in one pass over the images: each JPEG is decode_image once for all of them.

    .venv/bin/python tests/benchmarks/shared_decoding.py

Images are 256 x 256 crops of scikit-learn's photographs, as JPEG, with timm's training augmentation at 224. Printed
for each M: image views per second of M passes over the images and of one pass for all M, with --workers reading
processes, and their ratio; alone, and with the training steps of M networks (a ResNet-10 of an eighth of the usual
widths, where reading is the bottleneck as it is on a fast GPU). Medians of --repeats, both sides in turn.
"""

import argparse
import io
import itertools
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_sample_images

from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.images import Images
from concat_ensemble.training.recipe import Settings

PIXELS = Pixels((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photographs(number: int) -> Dataset:
    rng, photos, encoded = np.random.default_rng(0), load_sample_images().images, []
    for n in range(number):
        photo = photos[n % 2]
        top, left = rng.integers(0, photo.shape[0] - 256), rng.integers(0, photo.shape[1] - 256)
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + 256, left : left + 256]).save(buffer, format="JPEG", quality=90)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(num_classes=2))
    return Dataset.from_dict({"image": encoded, "label": [n % 2 for n in range(number)]}, features=features)


def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = timm.create_model("resnet10t", num_classes=2, channels=(8, 16, 32, 64), stem_width=8)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def seconds(images: Images, seeds: list[int], batches: int, networks: list) -> float:
    """Of one pass of so many batches, with a training step for each view where there are networks."""
    started = time.perf_counter()
    for batch in itertools.islice(images.batches(seeds), batches):
        for (model, optimizer), (view, labels) in zip(networks, batch.views, strict=False):
            torch.nn.functional.cross_entropy(model(view), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 320), ("batch-size", 32), ("workers", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photographs(options.images).to_parquet(Path(folder) / "train.parquet")
        settings = {"batch_size": options.batch_size, "num_workers": options.workers, "test_size": 0.05}
        images = Images(Settings(dataset=f"parquet:{folder}", **settings), PIXELS)
        batches = images.size // options.batch_size
        views = batches * options.batch_size
        print(
            f"{views} JPEGs, {options.workers} workers, {torch.get_num_threads()} cores; views per second, "
            f"medians of {options.repeats}"
        )
        for training in (False, True):
            for count in (1, 2, 4):
                apart, together = [], []
                for _ in range(options.repeats):
                    networks = [network() for _ in range(count)] if training else [None] * count
                    models = networks if training else []
                    apart.append(sum(seconds(images, [k], batches, models[k : k + 1]) for k in range(count)))
                    together.append(seconds(images, list(range(count)), batches, models))
                one, all_ = (count * views / median(times) for times in (apart, together))
                what = "with training" if training else "reading alone"
                print(
                    f"{what}, M = {count}: apart {one:.0f}, in one pass {all_:.0f}, ratio {all_ / one:.2f}", flush=True
                )


if __name__ == "__main__":
    main()
