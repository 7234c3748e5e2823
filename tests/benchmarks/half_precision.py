"""What storing features in float16 costs each probe: why `extract_features` keeps float32 unless told, or need not.

    .venv/bin/python tests/benchmarks/half_precision.py ENSEMBLE --dataset DATASET --limit 1500

Every probe is fitted on both tables of the same images. Prints, for each: top-1 on the test images, how many of its predictions differ, the paired difference
in points with its 95% interval, and how much disk a table takes.
"""

import argparse

import numpy as np

from concat_ensemble import (
    KNNProbe,
    LinearProbe,
    PrototypeProbe,
    ReferenceProbe,
    RidgeProbe,
    extract_features,
    load_data,
)
from concat_ensemble.probes.intervals import paired_difference
from concat_ensemble.studies.ensembles import load_ensemble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    model, data = load_ensemble(options.ensemble, seed=0), load_data(options.dataset, limit=options.limit)
    tables = {storage: extract_features(model, data, storage=storage) for storage in ("float32", "float16")}
    for storage, table in tables.items():
        bytes_ = sum(
            block.shape[0] * block.shape[1] * block.dtype.itemsize
            for blocks in table.blocks.values()
            for block in blocks
        )
        print(f"{storage}: {bytes_ / 1e6:.1f} MB")
    for kind in (LinearProbe, RidgeProbe, KNNProbe, PrototypeProbe, ReferenceProbe):
        predicted = [kind().fit(t["train"], validation=t["validation"]).predict(t["test"]) for t in tables.values()]
        labels = tables["float32"]["test"].labels
        right = [p == labels for p in predicted]
        difference, (low, high), _ = paired_difference(right[1], right[0])
        print(
            f"{kind.__name__:15s} float32 {100 * right[0].mean():.2f}, float16 {100 * right[1].mean():.2f}: {np.sum(predicted[0] != predicted[1])} of "
            f"{len(labels):,} predictions differ, {100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
