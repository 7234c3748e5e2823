"""Ridge probes of all single members, all prefixes and all 15 subsets of four members, against the probe of all four alone.

    .venv/bin/python tests/benchmarks/subsets.py

Both sides start from the table in memory: moments, Gram matrix, five l2_strengths, top-1 on the validation rows. Printed are the median
seconds and ratios, beside the same solver on all four alone and beside `RidgeProbe`, which is fitted a second time on all rows.
"""

import argparse
import time
from statistics import median

import numpy as np

from concat_ensemble import RidgeProbe
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import L2_STRENGTHS, make_scorer, select_members


def table(rows: int, held: int, width: int, classes: int) -> FeatureTable:
    """Four members of `width` noisy columns that share what they know in part."""
    rng = np.random.default_rng(0)
    mixes = rng.normal(size=(4, 64, width)).astype(np.float32)
    centres = 0.3 * rng.normal(size=(classes, 64)).astype(np.float32)
    blocks, labels = {}, {}
    for split, number in (("train", rows), ("validation", held)):
        labels[split] = rng.integers(0, classes, number)
        hidden = centres[labels[split]] + rng.normal(size=(number, 64)).astype(np.float32)
        blocks[split] = [hidden @ mix + 4 * rng.normal(size=(number, width)).astype(np.float32) for mix in mixes]
    return FeatureTable(blocks, labels, [str(k) for k in range(classes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 50_000), ("held", 5_000), ("width", 512), ("classes", 100), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    features = table(options.rows, options.held, options.width, options.classes)
    alone, estimator, together = [], [], []
    for _ in range(options.repeats):
        started = time.perf_counter()
        right = make_scorer(features["train"], features["validation"], L2_STRENGTHS).correct(range(4))
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        probe = RidgeProbe(L2_STRENGTHS)
        probe.fit(features["train"], validation=features["validation"])
        estimator.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = select_members(features, [Cost(1.0, 1.0)] * 4, list("abcd"))
        together.append(time.perf_counter() - started)
    print(f"all four alone: {median(alone):.2f} s, validation top-1 {100 * right.mean(1).max():.1f}")
    print(f"RidgeProbe:     {median(estimator):.2f} s, validation top-1 {100 * max(probe.path_.values()):.1f}")
    print(f"{len(found.subsets)} subsets:     {median(together):.2f} s, all four {100 * found[range(4)].top1:.1f}")
    print(
        f"ratio to all four alone {median(together) / median(alone):.2f}, to RidgeProbe "
        f"{median(together) / median(estimator):.2f} (medians of {options.repeats})"
    )


if __name__ == "__main__":
    main()
