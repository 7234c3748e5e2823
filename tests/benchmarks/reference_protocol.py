"""The papers' probe as they run it, with all networks in each epoch of each decay, against extraction and
`LinearProbe`.

    .venv/bin/python tests/benchmarks/reference_protocol.py random:resnet10t random:resnet10t --limit 500

Prints the seconds of both, their ratio, and top-1 on the test split with 95% intervals.

- The protocol's time is extrapolated: one real epoch over the training images (read, transform, forward, SGD step of
  BatchNorm and linear layer), times 28 epochs and 6 decays. Choosing a decay on the validation images, fitting the
  chosen one again, and running the test images are not counted.
- Our time is measured: training, validation and test images into an empty store, six L2 strengths, the final fit.
- The protocol's accuracy is that of `ReferenceProbe` on the stored features. This is the same computation: without
  augmentation, frozen networks give the same features in each epoch. Below some thousand images 28 epochs are too few
  steps to fit anything, and that accuracy means nothing.
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

    model = model.to(device, memory_format=torch.channels_last)  # as in extract_features
    num_features = model.config.num_features
    head = nn.Sequential(nn.BatchNorm1d(num_features), nn.Linear(num_features, len(class_names(split)))).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    drop_last = len(split) % BATCH == 1  # one row has no variance
    settings = {"drop_last": drop_last, "num_workers": workers, "collate_fn": batch}
    loader = DataLoader(range(len(split)), BATCH, shuffle=True, **settings)
    started = time.perf_counter()
    for pixels, y in loader:
        with torch.no_grad():
            rows = model(pixels.to(device)).pooler_output
        loss = nn.functional.cross_entropy(head(rows), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the GPU
    return time.perf_counter() - started


def run_ours(model, data, workers: int):
    """The table, the fitted probe, and the seconds of each."""
    with tempfile.TemporaryDirectory() as store:
        started = time.perf_counter()
        table = extract_features(model, data, store=Path(store), num_workers=workers, quiet=True)
        extracted = time.perf_counter()
        probe = LinearProbe().fit(table["train"], validation=table["validation"])
        return table, probe, extracted - started, time.perf_counter() - extracted


def format_accuracy(correct: np.ndarray) -> str:
    low, high = wilson_interval(correct.mean(), len(correct))
    return f"{100 * correct.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="+", help="as for `concat-ensemble build`")
    parser.add_argument("--dataset", default="scattered:digits", help="as for load_data, such as a parquet file")
    parser.add_argument("--limit", type=int, help="largest number of images of each split")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = assemble(options.members), load_data(options.dataset, limit=options.limit)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.items())
    print(f"{model.config.num_features:,} features; {sizes} images; {device}", flush=True)

    epochs, runs = [], []
    for _ in range(options.repeats):  # alternate, so that a busy moment of the machine is in both
        epochs.append(one_epoch(model, data["train"], options.workers, device))
        runs.append(run_ours(model, data, options.workers))
    epoch, extraction = median(epochs), median(seconds for _, _, seconds, _ in runs)
    fit = median(seconds for *_, seconds in runs)
    theirs, ours = epoch * EPOCHS * DECAYS, extraction + fit
    table, linear, *_ = runs[0]
    started = time.perf_counter()
    reference = ReferenceProbe().fit(table["train"], validation=table["validation"])
    seconds = time.perf_counter() - started

    note = f"medians of {options.repeats}"
    print(f"protocol: {EPOCHS} epochs x {DECAYS} decays x {epoch:.2f} s ({note}) = {theirs:,.0f} s, extrapolated")
    print(f"here:     {extraction:.2f} s extraction + {fit:.2f} s linear probe ({note}) = {ours:,.2f} s")
    print(f"ratio:    {theirs / ours:,.0f}   (ReferenceProbe instead: {seconds:.2f} s, once)")
    test = table["test"]
    here, protocol = (probe.predict(test) == test.labels for probe in (linear, reference))
    difference, (low, high), p = paired_difference(here, protocol)
    print(f"top-1 in %, 95%: protocol {format_accuracy(protocol)}, decay {reference.l2_strength_:.1e}")
    print(f"                 here     {format_accuracy(here)}, L2 strength {linear.l2_strength_:.1e}")
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    print(f"                 here minus protocol {100 * difference:+.1f} {interval}, p = {p:.2g}")


if __name__ == "__main__":
    main()
