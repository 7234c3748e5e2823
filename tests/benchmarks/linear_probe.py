"""The linear probe's path of strengths against scikit-learn's LogisticRegression(lbfgs), both to 1e-4 of the optimum.

    .venv/bin/python tests/benchmarks/linear_probe.py --rows 50000 --width 2048 --classes 100
    .venv/bin/python tests/benchmarks/linear_probe.py --ensemble FOLDER --dataset DATASET --limit 1500

The second form takes an ensemble's features of a dataset's training and validation images in place of made-up ones.
Prints, per side: seconds (median of the repeats), objectives above the best known, and the ratio. scikit-learn works in float32
too and starts each strength where the one before ended. It is run again and again with 1.4 times as many iterations until its
objective is within 1e-4 of the best known, and only the last of these runs is counted: neither the trials nor what its own
stopping rule would add.
"""

import argparse
import time
import warnings
from statistics import median

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from concat_ensemble import extract_features, load_data
from concat_ensemble.command_line import _load
from concat_ensemble.feature_table import TableSplit
from concat_ensemble.probes.logistic import logistic_path, objective

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
WITHIN = 1e-4


def features(rows: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features whose covariance decays as 1/k, as those of trained networks about do, and noisy labels."""
    torch.manual_seed(0)
    scales = torch.arange(1, width + 1) ** -0.5
    X = (torch.randn(rows, width) * scales) @ torch.linalg.qr(torch.randn(width, width))[0]
    X = (X - X.mean(0)) / X.std(0)
    logits = X @ torch.randn(width, classes) * 3 / width**0.5
    y = (logits - torch.empty(rows, classes).exponential_().log()).argmax(1)
    return X, y


def real_features(ensemble: str, dataset: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    table = extract_features(_load(ensemble, seed=0), load_data(dataset, limit=limit))
    X, y = map(torch.from_numpy, TableSplit.joined([table["train"], table["validation"]]))
    return (X - X.mean(0)) / X.std(0).clamp_min(1e-6), y


def ours(X, y, classes, tol=WITHIN / 3):
    started = time.perf_counter()
    path = list(logistic_path(X, y, STRENGTHS, classes=classes, tol=tol))
    return time.perf_counter() - started, path


def theirs(X, y, best, budget):
    """Seconds and relative excess per strength, of the strengths that the budget allowed."""
    rows, labels, seconds, found, start = X.numpy(), y.numpy(), 0.0, [], None
    for strength, lowest in zip(STRENGTHS, best, strict=True):
        iterations = 10
        while True:
            model = LogisticRegression(C=1 / (len(rows) * strength), warm_start=True, max_iter=iterations, tol=1e-12)
            if start is not None:
                model.coef_, model.intercept_, model.classes_ = (
                    start.coef_.copy(),
                    start.intercept_.copy(),
                    start.classes_,
                )
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(rows, labels)
            took = time.perf_counter() - started
            weight = torch.from_numpy(model.coef_.T).float()
            value = float(objective(X @ weight + torch.from_numpy(model.intercept_).float(), y, weight, strength))
            if value <= lowest * (1 + WITHIN):
                break
            if seconds + took > budget:
                return seconds + took, found
            iterations = round(iterations * 1.4)
        seconds, start = seconds + took, model
        found.append(value / lowest - 1)
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 50_000), ("width", 2_048), ("classes", 100), ("repeats", 3), ("budget", 1_800)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ensemble")
    parser.add_argument("--dataset", default="scattered-digits")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.ensemble:
        X, y = real_features(options.ensemble, options.dataset, options.limit)
        options.classes = len(y.unique())
    else:
        X, y = features(options.rows, options.width, options.classes)
    print(f"{X.shape[0]:,} x {X.shape[1]:,}, {options.classes} classes")
    reference = list(logistic_path(X, y, STRENGTHS, classes=options.classes, tol=1e-8))
    runs = [ours(X, y, options.classes) for _ in range(options.repeats)]
    best = [min(a.objective, b.objective) for a, b in zip(reference, runs[0][1], strict=True)]
    mine = median(seconds for seconds, _ in runs)
    for solution, lowest in zip(runs[0][1], best, strict=True):
        print(f"  strength {solution.strength:g}: {solution.newton_steps} Newton steps, {solution.products} products, "
              f"objective {solution.objective:.5f}, {solution.objective / lowest - 1:.1e} above the best")  # fmt: skip
    print(f"logistic_path: {mine:.1f} s (median of {options.repeats})", flush=True)
    others = [theirs(X, y, best, options.budget) for _ in range(options.repeats)]
    other = median(seconds for seconds, _ in others)
    done = len(others[0][1])
    print(
        f"scikit-learn:  {other:.1f} s for {done} of {len(STRENGTHS)} strengths; above the best: {np.array2string(np.array(others[0][1]), precision=1)}"
    )
    print(f"ratio: {'at least ' if done < len(STRENGTHS) else ''}{other / mine:.1f}")


if __name__ == "__main__":
    main()
