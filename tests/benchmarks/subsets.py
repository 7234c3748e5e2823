"""Ridge probes of all 15 subsets of four members, against one probe of all four.

    .venv/bin/python tests/benchmarks/subsets.py

Both sides start from the table in memory: moments, Gram matrices, five L2 strengths, top-1 by cross-validation (of
`RidgeProbe`, on the validation rows). Prints the median seconds of the subsets, of the same solver on all four
members, and of `RidgeProbe`, which is also fitted on all rows in the end.
"""

import argparse
import time
from statistics import median

import numpy as np

from concat_ensemble import RidgeProbe
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import FOLDS, L2_STRENGTHS, select_members
from concat_ensemble.studies.subset_scores import make_folds, make_scorer


def make_table(rows: int, validation_rows: int, feature_dim: int, num_classes: int) -> FeatureTable:
    """Four members with noisy features that partly carry the same information."""
    rng = np.random.default_rng(0)
    mixes = rng.normal(size=(4, 64, feature_dim)).astype(np.float32)
    centres = 0.3 * rng.normal(size=(num_classes, 64)).astype(np.float32)
    blocks, labels = {}, {}
    for split, number in (("train", rows), ("validation", validation_rows)):
        labels[split] = rng.integers(0, num_classes, number)
        hidden = centres[labels[split]] + rng.normal(size=(number, 64)).astype(np.float32)
        blocks[split] = [hidden @ mix + 4 * rng.normal(size=(number, feature_dim)).astype(np.float32) for mix in mixes]
    return FeatureTable(blocks, labels, [str(k) for k in range(num_classes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--validation-rows", type=int, default=5_000)
    parser.add_argument("--feature-dim", type=int, default=512, help="features of each member")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = make_table(options.rows, options.validation_rows, options.feature_dim, options.classes)
    scorer_seconds, probe_seconds, subsets_seconds = [], [], []
    for _ in range(options.repeats):
        started = time.perf_counter()
        pooled = TableSplit.concatenate([table["train"], table["validation"]])
        correct = make_scorer(pooled, make_folds(pooled, FOLDS), L2_STRENGTHS).correct(range(4))
        scorer_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        probe = RidgeProbe(L2_STRENGTHS)
        probe.fit(table["train"], validation=table["validation"])
        probe_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        selection = select_members(table, [Cost(1.0, 1.0)] * 4, list("abcd"))
        subsets_seconds.append(time.perf_counter() - started)
    scorer, ridge, subsets = map(median, (scorer_seconds, probe_seconds, subsets_seconds))
    print(f"all four alone: {scorer:.2f} s, top-1 {100 * correct.mean(1).max():.1f}")
    print(f"RidgeProbe:     {ridge:.2f} s, validation top-1 {100 * max(probe.path_.values()):.1f}")
    print(f"{len(selection.subsets)} subsets:     {subsets:.2f} s, all four {100 * selection[range(4)].top1:.1f}")
    ratios = f"ratio to all four alone {subsets / scorer:.2f}, to RidgeProbe {subsets / ridge:.2f}"
    print(f"{ratios} (medians of {options.repeats})")


if __name__ == "__main__":
    main()
