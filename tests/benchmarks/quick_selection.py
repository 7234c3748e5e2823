"""How far a quick look at a few images can be believed: its intervals against what all images say.

    .venv/bin/python tests/benchmarks/quick_selection.py ENSEMBLE --dataset DATASET --limit 1500 --looks 250 500 1000

Features of all images are extracted once. Each look draws some training images and does what `select --quick` does
with them. The truth for each member is the gain of the chosen members with it over those without it, fitted on all
training and validation images and measured on the test images. Printed per size of the look: how often the 95%
interval holds the truth (itself known to about the deviation printed), how often a member that is advised to be
dropped truly adds less than half a point, and one that is advised to be kept adds something.
"""

import argparse

import numpy as np

from concat_ensemble import extract_features, load_data
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.studies.ensembles import load_ensemble
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import L2_STRENGTHS, QUICK_FOLDS, make_scorer, select_members
from concat_ensemble.studies.selection_results import NEGLIGIBLE


def few(table: FeatureTable, number: int, seed: int) -> FeatureTable:
    """A table of `number` training images, as `quick_part` draws them."""
    drawn = np.random.default_rng(seed).permutation(len(table["train"]))[:number]
    parts = {"train": np.sort(drawn[::2]), "validation": np.sort(drawn[1::2])}
    blocks = {name: [block[numbers] for block in table.blocks["train"]] for name, numbers in parts.items()}
    labels = {name: table.labels["train"][numbers] for name, numbers in parts.items()}
    return FeatureTable(blocks, labels, table.class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--looks", type=int, nargs="+", default=[250, 500, 1_000])
    parser.add_argument("--resamples", type=int, default=20)
    options = parser.parse_args()
    model = load_ensemble(options.ensemble, seed=0)
    table = extract_features(model, load_data(options.dataset, limit=options.limit))
    known, test = TableSplit.concatenate([table["train"], table["validation"]]), table["test"]
    scorer = make_scorer(known, test, L2_STRENGTHS)
    rights = {}

    def right(members) -> np.ndarray:
        """(N,) on the test images, at the l2_strength that is best there: the same favour for all."""
        members = tuple(sorted(members))
        if members not in rights:
            found = scorer.correct(members)
            rights[members] = found[found.mean(axis=1).argmax()].astype(float)
        return rights[members]

    costs, names = [Cost(1.0, 1.0)] * len(table.feature_dims), [str(k) for k in range(len(table.feature_dims))]
    for number in options.looks:
        inside, dropped, kept, deviations = [], [], [], []
        for seed in range(options.resamples):
            found = select_members(few(table, number, seed), costs, names, folds=QUICK_FOLDS, seed=seed)
            for part in found.contributions:
                without = [k for k in found.best if k != part.member]
                if not without:
                    continue
                gain = right([*without, part.member]) - right(without)
                deviations.append(gain.std() / len(gain) ** 0.5)
                low, high = part.gain_interval
                inside.append(low <= gain.mean() <= high)
                if part.advice == "drop":
                    dropped.append(gain.mean() < NEGLIGIBLE)
                if part.advice == "keep":
                    kept.append(gain.mean() > 0)
        print(
            f"{number} images, {options.resamples} looks: {np.mean(inside):.0%} of {len(inside)} intervals "
            "hold the truth "
            f"(known to {100 * np.mean(deviations):.2f} points); 'drop' right {sum(dropped)} of {len(dropped)}; "
            f"'keep' right {sum(kept)} of {len(kept)}"
        )


if __name__ == "__main__":
    main()
