"""The linear probe's path of l2_strengths against scikit-learn's LogisticRegression(lbfgs), both to 1e-4 of the optimum.

    .venv/bin/python tests/benchmarks/linear_probe.py --rows 50000 --width 2048 --classes 100
    .venv/bin/python tests/benchmarks/linear_probe.py --ensemble FOLDER --dataset DATASET --limit 1500

The second form takes an ensemble's features of a dataset's training and validation images in place of made-up ones.
Prints, per side: seconds (median of the repeats), objectives above the best known, and the ratio. scikit-learn works in float32
too, starts each l2_strength where the one before ended, and is ended as soon as its objective is within 1e-4 of the best known, so that
what its own stopping rule would add does not count. Strengths that it has not reached within --budget seconds are left out on both
sides.
"""

import argparse
import time
import warnings
from statistics import median
from unittest.mock import patch

import scipy.optimize
import torch
from sklearn.linear_model import LogisticRegression

from concat_ensemble import extract_features, load_data
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.logistic import logistic_path, objective
from concat_ensemble.studies.ensembles import load_ensemble

L2_STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
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
    table = extract_features(load_ensemble(ensemble, seed=0), load_data(dataset, limit=limit))
    X, y = map(torch.from_numpy, TableSplit.concatenate([table["train"], table["validation"]]))
    return (X - X.mean(0)) / X.std(0).clamp_min(1e-6), y


def ours(X, y, classes, tol=WITHIN / 3):
    """The solutions, and the seconds that each took; the first bears what is done once for all."""
    seconds, path, started = [], [], time.perf_counter()
    for solution in logistic_path(X, y, L2_STRENGTHS, classes=classes, tol=tol):
        path.append(solution)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds, path


def theirs(X, y, best, budget):
    """Seconds and relative excess per l2_strength, of the l2_strengths that the budget allowed."""
    rows, labels, found, start, real = X.numpy(), y.numpy(), [], None, scipy.optimize.minimize
    deadline = time.perf_counter() + budget
    for l2_strength, lowest in zip(L2_STRENGTHS, best, strict=True):

        def until_there(fun, *arguments, lowest=lowest, **settings):
            def there(intermediate_result):
                if intermediate_result.fun <= lowest * (1 + WITHIN) or time.perf_counter() > deadline:
                    raise StopIteration

            return real(fun, *arguments, **settings | {"callback": there})

        model = LogisticRegression(C=1 / (len(rows) * l2_strength), warm_start=True, max_iter=100_000, tol=1e-12)
        if start is not None:
            model.coef_, model.intercept_, model.classes_ = start.coef_, start.intercept_, start.classes_
        started = time.perf_counter()
        with warnings.catch_warnings(), patch("scipy.optimize.minimize", until_there):
            warnings.simplefilter("ignore")
            start = model.fit(rows, labels)
        took = time.perf_counter() - started
        weight = torch.from_numpy(model.coef_.T).float()
        value = float(objective(X @ weight + torch.from_numpy(model.intercept_).float(), y, weight, l2_strength))
        if value > lowest * (1 + 1.1 * WITHIN):
            return found
        found.append((took, value / lowest - 1))
        print(f"  scikit-learn, l2_strength {l2_strength:g}: {took:.1f} s, {model.n_iter_[0]} iterations", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 50_000), ("width", 2_048), ("classes", 100), ("repeats", 3), ("budget", 1_800)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ensemble")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.ensemble:
        X, y = real_features(options.ensemble, options.dataset, options.limit)
        options.classes = len(y.unique())
    else:
        X, y = features(options.rows, options.width, options.classes)
    print(f"{X.shape[0]:,} x {X.shape[1]:,}, {options.classes} classes")
    reference = list(logistic_path(X, y, L2_STRENGTHS, classes=options.classes, tol=1e-8))
    runs = [ours(X, y, options.classes) for _ in range(options.repeats)]
    best = [min(a.objective, b.objective) for a, b in zip(reference, runs[0][1], strict=True)]
    for solution, lowest, took in zip(runs[0][1], best, runs[0][0], strict=True):
        print(f"  l2_strength {solution.l2_strength:g}: {took:.1f} s, {solution.newton_steps} Newton steps, {solution.products} "
              f"products, objective {solution.objective:.5f}, {solution.objective / lowest - 1:.1e} above the best")  # fmt: skip
    print(f"logistic_path: {median(sum(s) for s, _ in runs):.1f} s (median of {options.repeats})", flush=True)
    others = [theirs(X, y, best, options.budget) for _ in range(options.repeats)]
    done = min(map(len, others))
    mine, other = (
        median(sum(s[:done]) for s in side) for side in ([s for s, _ in runs], [[t for t, _ in o] for o in others])
    )
    print(
        f"{done} of {len(L2_STRENGTHS)} l2_strengths: scikit-learn {other:.1f} s, logistic_path {mine:.1f} s, ratio {other / mine:.1f}"
    )


if __name__ == "__main__":
    main()
