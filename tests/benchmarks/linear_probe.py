"""The linear probe's path of L2 strengths against scikit-learn's LogisticRegression(lbfgs), both to 1e-4 of the
minimum.

    .venv/bin/python tests/benchmarks/linear_probe.py --rows 50000 --num-features 2048 --classes 100 .venv/bin/python
    tests/benchmarks/linear_probe.py --ensemble FOLDER --dataset DATASET --limit 1500

The second form uses an ensemble's features of the training and validation images of a dataset instead of synthetic
ones. Prints seconds (median of the repeats), objectives above the best one, and the ratio. scikit-learn runs in
float32 too, starts each strength where the previous one ended, and is stopped as soon as its objective is within 1e-4
of the best one, so that the cost of its own stopping rule does not count. Strengths that it does not reach within
--budget seconds are left out on both sides.
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
TOLERANCE = 1e-4


def make_features(rows: int, num_features: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardized features whose covariance decays about as that of trained networks, as 1/k, and noisy labels."""
    torch.manual_seed(0)
    scales = torch.arange(1, num_features + 1) ** -0.5
    X = (torch.randn(rows, num_features) * scales) @ torch.linalg.qr(torch.randn(num_features, num_features))[0]
    X = (X - X.mean(0)) / X.std(0)
    logits = X @ torch.randn(num_features, num_classes) * 3 / num_features**0.5
    y = (logits - torch.empty(rows, num_classes).exponential_().log()).argmax(1)
    return X, y


def real_features(ensemble: str, dataset: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    table = extract_features(load_ensemble(ensemble, seed=0), load_data(dataset, limit=limit))
    X, y = map(torch.from_numpy, TableSplit.concatenate([table["train"], table["validation"]]))
    return (X - X.mean(0)) / X.std(0).clamp_min(1e-6), y


def run_ours(X, y, num_classes):
    """The solutions, and the seconds of each; the first includes what is done once for all."""
    seconds, path, started = [], [], time.perf_counter()
    for solution in logistic_path(X, y, L2_STRENGTHS, num_classes=num_classes, tol=TOLERANCE / 3):
        path.append(solution)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return path, seconds


def stop_at(goal: float, deadline: float):
    """scipy's `minimize`, stopped once the objective is near the goal or the time is up."""
    minimize = scipy.optimize.minimize

    def callback(intermediate_result):
        if intermediate_result.fun <= goal or time.perf_counter() > deadline:
            raise StopIteration

    return lambda *arguments, **settings: minimize(*arguments, **settings | {"callback": callback})


def run_scikit_learn(X, y, best, budget) -> list[float]:
    """Seconds of each strength that is reached within the budget."""
    rows, labels, seconds, previous = X.numpy(), y.numpy(), [], None
    deadline = time.perf_counter() + budget
    for l2_strength, lowest in zip(L2_STRENGTHS, best, strict=True):
        model = LogisticRegression(C=1 / (len(rows) * l2_strength), warm_start=True, max_iter=100_000, tol=1e-12)
        if previous is not None:
            model.coef_, model.intercept_, model.classes_ = previous.coef_, previous.intercept_, previous.classes_
        started = time.perf_counter()
        minimize = stop_at(lowest * (1 + TOLERANCE), deadline)
        with warnings.catch_warnings(), patch("scipy.optimize.minimize", minimize):
            warnings.simplefilter("ignore")
            previous = model.fit(rows, labels)
        duration = time.perf_counter() - started
        weight = torch.from_numpy(model.coef_.T).float()
        value = float(objective(X @ weight + torch.from_numpy(model.intercept_).float(), y, weight, l2_strength))
        if value > lowest * (1 + 1.1 * TOLERANCE):
            return seconds
        seconds.append(duration)
        print(f"  scikit-learn, {l2_strength:g}: {duration:.1f} s, {model.n_iter_[0]} iterations", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--num-features", type=int, default=2_048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=1_800, help="seconds for scikit-learn")
    parser.add_argument("--ensemble")
    parser.add_argument("--dataset", default="scattered:digits")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.ensemble:
        X, y = real_features(options.ensemble, options.dataset, options.limit)
    else:
        X, y = make_features(options.rows, options.num_features, options.classes)
    num_classes = len(y.unique()) if options.ensemble else options.classes
    print(f"{X.shape[0]:,} x {X.shape[1]:,}, {num_classes} classes")

    exact = list(logistic_path(X, y, L2_STRENGTHS, num_classes=num_classes, tol=1e-8))
    runs = [run_ours(X, y, num_classes) for _ in range(options.repeats)]
    path, seconds = runs[0]
    best = [min(a.objective, b.objective) for a, b in zip(exact, path, strict=True)]
    for solution, lowest, duration in zip(path, best, seconds, strict=True):
        print(
            f"  {solution.l2_strength:g}: {duration:.1f} s, {solution.newton_steps} Newton steps, {solution.products} "
            f"products, objective {solution.objective:.5f}, {solution.objective / lowest - 1:.1e} above the best"
        )
    total = median(sum(seconds) for _, seconds in runs)
    print(f"logistic_path: {total:.1f} s (median of {options.repeats})", flush=True)

    others = [run_scikit_learn(X, y, best, options.budget) for _ in range(options.repeats)]
    reached = min(map(len, others))
    ours = median(sum(seconds[:reached]) for _, seconds in runs)
    theirs = median(sum(seconds[:reached]) for seconds in others)
    print(
        f"{reached} of {len(L2_STRENGTHS)} strengths: scikit-learn {theirs:.1f} s, logistic_path {ours:.1f} s, "
        f"ratio {theirs / ours:.1f}"
    )


if __name__ == "__main__":
    main()
