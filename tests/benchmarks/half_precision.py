"""What each probe loses by features stored in float16, which is why `extract_features` stores float32 by default.

    .venv/bin/python tests/benchmarks/half_precision.py ENSEMBLE --dataset DATASET --limit 1500

Fits each probe on both tables of the same images. Prints the size of each table, and for each probe top-1 on the test
images, how many predictions differ, and the paired difference in points with its 95% interval.
"""

import argparse

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
        splits = [table[split] for split in table]
        size = sum(len(split) * split.num_features * split.dtype.itemsize for split in splits)
        print(f"{storage}: {size / 1e6:.1f} MB")

    labels = tables["float32"]["test"].labels
    for probe in (LinearProbe(), RidgeProbe(), KNNProbe(), PrototypeProbe(), ReferenceProbe()):
        full, half = (
            probe.fit(table["train"], validation=table["validation"]).predict(table["test"])
            for table in tables.values()
        )
        difference, (low, high), _ = paired_difference(half == labels, full == labels)
        print(
            f"{type(probe).__name__:15s} float32 {100 * (full == labels).mean():.2f}, "
            f"float16 {100 * (half == labels).mean():.2f}: {(full != half).sum()} of {len(labels):,} predictions "
            f"differ, {100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
