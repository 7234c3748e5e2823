"""The papers' probe as they run it, all networks anew in every epoch of every decay, against extraction and `LinearProbe`.

    .venv/bin/python tests/benchmarks/reference_protocol.py random:resnet10t random:resnet10t --limit 500

Prints the seconds of both, their ratio, and top-1 on the test split with 95% intervals.

- The protocol's time is extrapolated: one true epoch over the training images (read, transform, forward, SGD step of BatchNorm
  and linear layer) is run, and its seconds are multiplied by 28 epochs and 6 decays. What it takes to choose a decay on the
  validation images, to fit the chosen one again, and to run the test images is not counted.
- Ours is measured whole: training, validation and test images into an empty store, six l2_strengths, the chosen one again.
- The protocol's accuracy is `ReferenceProbe`'s on the stored features. That is the same computation: without augmentation
  frozen networks give the same features in every epoch. Below some thousand images 28 epochs are too few steps to fit anything,
  and that accuracy is no measure.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from torch import nn
from torch.utils.data import DataLoader

from concat_ensemble import (
    ConcatEnsembleImageProcessor,
    LinearProbe,
    ReferenceProbe,
    assemble,
    extract_features,
    load_data,
)
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names
from concat_ensemble.probes.intervals import paired_difference, wilson_interval

EPOCHS, DECAYS, BATCH = 28, 6, 256


def one_epoch(model, split, workers: int, device: torch.device) -> float:
    """Seconds of one epoch of the protocol over a split."""
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    labels = torch.tensor(split["label"])

    def batch(numbers):
        return processor([read_image(split, n) for n in numbers])["pixel_values"], labels[numbers]

    model = model.to(device, memory_format=torch.channels_last)  # as extract_features has it
    width, classes = model.config.num_features, len(class_names(split))
    head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes)).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    single = len(split) % BATCH == 1  # a row alone has no variance
    loader = DataLoader(
        range(len(split)), BATCH, shuffle=True, drop_last=single, num_workers=workers, collate_fn=batch
    )
    started = time.perf_counter()
    for pixels, y in loader:
        with torch.no_grad():
            rows = model(pixels.to(device)).pooler_output
        loss = nn.functional.cross_entropy(head(rows), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # a GPU is done only then
    return time.perf_counter() - started


def ours(model, data, workers: int):
    """The table, the fitted probe, and the seconds that each of them took."""
    with tempfile.TemporaryDirectory() as store:
        started = time.perf_counter()
        table = extract_features(model, data, store=Path(store), num_workers=workers, quiet=True)
        extracted = time.perf_counter()
        probe = LinearProbe().fit(table["train"], validation=table["validation"])
        return table, probe, extracted - started, time.perf_counter() - extracted


def told(right: np.ndarray) -> str:
    low, high = wilson_interval(right.mean(), len(right))
    return f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="+", help="a folder, or what `concat-ensemble build` takes")
    parser.add_argument("--dataset", default="scattered:digits", help="what load_data takes, such as a parquet file")
    parser.add_argument("--limit", type=int, help="images of each split at most")
    for name, default in (("workers", 0), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = assemble(options.members), load_data(options.dataset, limit=options.limit)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.items())
    print(f"{model.config.num_features:,} features; {sizes} images; {device}", flush=True)

    epochs, runs = [], []
    for _ in range(options.repeats):  # in turn, so that a busy moment of the machine is in both
        epochs.append(one_epoch(model, data["train"], options.workers, device))
        runs.append(ours(model, data, options.workers))
    epoch, extraction, path = (median(times) for times in (epochs, *list(zip(*runs, strict=True))[2:]))
    theirs, mine = epoch * EPOCHS * DECAYS, extraction + path
    table, linear, *_ = runs[0]
    started = time.perf_counter()
    reference = ReferenceProbe().fit(table["train"], validation=table["validation"])
    seconds = time.perf_counter() - started

    of = f"medians of {options.repeats}"
    print(f"protocol: {EPOCHS} epochs x {DECAYS} decays x {epoch:.2f} s ({of}) = {theirs:,.0f} s, extrapolated")
    print(f"here:     {extraction:.2f} s extraction + {path:.2f} s path of l2_strengths ({of}) = {mine:,.2f} s")
    print(f"ratio:    {theirs / mine:,.0f}   (ReferenceProbe in the place of the path: {seconds:.2f} s, once)")
    test = table["test"]
    right = {name: probe.predict(test) == test.labels for name, probe in (("here", linear), ("protocol", reference))}
    difference, (low, high), p = paired_difference(right["here"], right["protocol"])
    print(f"top-1 in %, 95%: protocol {told(right['protocol'])}, decay {reference.l2_strength_:.1e}")
    print(f"                 here     {told(right['here'])}, l2_strength {linear.l2_strength_:.1e}")
    print(
        f"                 here minus protocol {100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], p = {p:.2g}"
    )


if __name__ == "__main__":
    main()
