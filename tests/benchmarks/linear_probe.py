"""The linear probe's path of L2 strengths against scikit-learn's LogisticRegression(lbfgs), to the same objective.

    .venv/bin/python tests/benchmarks/linear_probe.py                          # the grid of sizes
    .venv/bin/python tests/benchmarks/linear_probe.py --sizes 50000x2048x100   # rows x features x classes
    .venv/bin/python tests/benchmarks/linear_probe.py --probe 1259x2560x2      # choice, refit and five resamples
    .venv/bin/python tests/benchmarks/linear_probe.py --features features.npz  # arrays X and y of your own

Prints the median seconds of both over interleaved repeats, and their ratio. Both solve for the six default strengths,
each from where the one before ended. scikit-learn runs in float64, since its line search does not reach 1e-6 in
float32, and is stopped as soon as its objective is within --tolerance of ours, so that the cost of its own stopping
rule does not count. "default" is scikit-learn in float32 with its default tolerance, and how far above the minimum it
then stops at the worst strength. Strengths that it does not reach within --budget seconds are left out on both sides,
and sizes that need more than --memory GB are skipped; the output says so. --cpu-time counts the processor's seconds,
which a shared machine disturbs less; use it with --threads 1.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import numpy as np
import scipy.optimize
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes.estimator import L2_STRENGTHS
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.logistic import Solution, logistic_path

GRID = [
    f"{n}x{d}x{c}" for n in (300, 1_000, 3_000, 10_000, 50_000) for d in (64, 512, 2_048, 8_192) for c in (2, 10, 100)
]
Models = list[LogisticRegression]


def make_features(rows: int, num_features: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardized features like those of trained networks: non-negative, with a spectrum that decays as 1/k, and
    means of the classes in the leading directions. The labels of one row in seven are wrong."""
    generator = torch.Generator().manual_seed(0)
    latent = min(num_features, 512)
    y = torch.randint(0, num_classes, (rows,), generator=generator)
    scales = torch.arange(1, latent + 1) ** -0.5
    means = torch.randn(num_classes, latent, generator=generator)
    hidden = (means[y] + torch.randn(rows, latent, generator=generator)) * scales
    X = hidden @ torch.randn(latent, num_features, generator=generator) / latent**0.5
    X = (3 * X + 0.1 * torch.randn(rows, num_features, generator=generator)).relu_()
    noisy = torch.rand(rows, generator=generator) < 1 / 7
    y = torch.where(noisy, torch.randint(0, num_classes, (rows,), generator=generator), y)
    y[:num_classes] = torch.arange(num_classes)
    return standardize(X), y


def standardize(X: torch.Tensor) -> torch.Tensor:
    scale = X.std(0, correction=0)
    return (X - X.mean(0)) / torch.where(scale > 0, scale, 1)


def run_ours(
    X: torch.Tensor, y: torch.Tensor, num_classes: int, clock: Callable
) -> tuple[list[Solution], list[float]]:
    """The solutions, and the seconds of each; the first includes what is done once for all."""
    # With two classes scikit-learn penalizes one difference of columns, which is half as much as the two columns.
    penalties = [s * 2 if num_classes == 2 else s for s in L2_STRENGTHS]
    seconds, path, started = [], [], clock()
    for solution in logistic_path(StandardizedFeatures.from_tensor(X), y, penalties, num_classes=num_classes):
        path.append(solution)
        seconds.append(clock() - started)
        started = clock()
    return path, seconds


def stop_at(goal: float, deadline: float):
    """scipy's `minimize`, stopped once the objective is near the goal or the time is up."""
    minimize = scipy.optimize.minimize

    def callback(intermediate_result):
        if intermediate_result.fun <= goal or time.perf_counter() > deadline:
            raise StopIteration

    return lambda *arguments, **settings: minimize(*arguments, **settings | {"callback": callback})


def fit_scikit_learn(X: np.ndarray, y: np.ndarray, l2_strength: float, previous=None, **settings):
    """A fitted LogisticRegression, from where the previous one ended."""
    model = LogisticRegression(C=1 / (len(X) * l2_strength), warm_start=True, max_iter=10_000, **settings)
    if previous is not None:
        model.coef_, model.intercept_, model.classes_ = previous.coef_, previous.intercept_, previous.classes_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, y)


def run_scikit_learn(X, y, goals: list[float], budget: float, clock: Callable) -> tuple[Models, list[float]]:
    """The models that reach their goals within the budget, and the seconds of each."""
    models: Models = []
    seconds, deadline = [], time.perf_counter() + budget
    for l2_strength, goal in zip(L2_STRENGTHS, goals, strict=True):
        started = clock()
        with patch("scipy.optimize.minimize", stop_at(goal, deadline)):
            model = fit_scikit_learn(X, y, l2_strength, models[-1] if models else None, tol=1e-9)
        if time.perf_counter() > deadline:
            break
        models.append(model)
        seconds.append(clock() - started)
    return models, seconds


def objective(X: np.ndarray, y: np.ndarray, model: LogisticRegression, l2_strength: float) -> float:
    """What scikit-learn minimizes, divided by the number of rows, in float64."""
    logits = torch.from_numpy(model.decision_function(X).astype(np.float64))
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], 1)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
    return float(loss) + l2_strength / 2 * float(np.square(model.coef_, dtype=np.float64).sum())


def compare(X: torch.Tensor, y: torch.Tensor, options: argparse.Namespace) -> None:
    """One line for a problem."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    num_classes = int(y.max()) + 1
    rows, labels, ours, theirs, default, models = X.double().numpy(), y.numpy(), [], [], [], []
    for _ in range(options.repeats):
        path, seconds = run_ours(X, y, num_classes, clock)
        ours.append(seconds)
        goals = [solution.objective * (1 + options.tolerance) for solution in path]
        reached, seconds = run_scikit_learn(rows, labels, goals, options.budget, clock)
        theirs.append(seconds)
        started, models = clock(), []
        for l2_strength in L2_STRENGTHS[: len(reached)]:
            models.append(fit_scikit_learn(X.numpy(), labels, l2_strength, models[-1] if models else None))
        default.append(clock() - started)
    number = min(map(len, theirs))
    if not number:
        print(f"  scikit-learn did not reach the first strength in {options.budget} s")
        return
    excess = max(
        objective(rows, labels, model, s) / solution.objective - 1
        for model, s, solution in zip(models[:number], L2_STRENGTHS, path, strict=False)
    )
    mine, other = (median(sum(seconds[:number]) for seconds in runs) for runs in (ours, theirs))
    print(
        f"  {number} of {len(L2_STRENGTHS)} strengths: logistic_path {mine:.2f} s, scikit-learn {other:.2f} s, ratio "
        f"{other / mine:.1f}; default {median(default):.2f} s, {excess:.0e} above; "
        f"{sum(s.newton_steps for s in path)} Newton steps, {sum(s.products for s in path)} products",
        flush=True,
    )


def compare_probes(X: torch.Tensor, y: torch.Tensor, options: argparse.Namespace) -> None:
    """The fits of one row of `probe`: a choice on validation rows, a refit on all, and bootstrap resamples."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    X_all, y_all = X.numpy(), y.numpy()
    train, held_out = train_test_split(np.arange(len(y_all)), test_size=0.2, random_state=0, stratify=y_all)
    rng = np.random.default_rng(0)
    resamples = [rng.integers(0, len(y_all), len(y_all)) for _ in range(5)]
    ours, theirs, default = [], [], []
    for _ in range(options.repeats):
        started = clock()
        probe = LinearProbe().fit(X_all[train], y_all[train], validation=(X_all[held_out], y_all[held_out]))
        for rows in resamples:
            counts = np.bincount(rows, minlength=len(y_all))
            list(LinearProbe(tol=1e-4)._solve(TableSplit([X_all], y_all), [probe.l2_strength_], sample_weight=counts))
        ours.append(clock() - started)
        goals, started = {}, clock()
        penalty = 2 if len(probe.classes_) == 2 else 1
        for rows in (train, np.arange(len(y_all)), *resamples):
            strengths = L2_STRENGTHS if rows is train else [probe.l2_strength_]
            part, labels = standardize(X[rows]), y[rows]
            paused = clock()  # our solution says where scikit-learn may stop; finding it does not count
            path = logistic_path(part, labels, [s * penalty for s in strengths], num_classes=len(probe.classes_))
            goals = {s: solution.objective for s, solution in zip(strengths, path, strict=True)}
            started += clock() - paused
            tolerance, previous = options.tolerance if rows is train else 1e-4, None
            for s in strengths:
                with patch("scipy.optimize.minimize", stop_at(goals[s] * (1 + tolerance), float("inf"))):
                    previous = fit_scikit_learn(part.double().numpy(), labels.numpy(), s, previous, tol=1e-9)
        theirs.append(clock() - started)
        started = clock()
        for rows in (train, np.arange(len(y_all)), *resamples):
            part, labels, previous = standardize(X[rows]).numpy(), y_all[rows], None
            for s in L2_STRENGTHS if rows is train else [probe.l2_strength_]:
                previous = fit_scikit_learn(part, labels, s, previous)
        default.append(clock() - started)
    mine, other, usual = median(ours), median(theirs), median(default)
    print(
        f"  a whole probe: LinearProbe {mine:.2f} s; scikit-learn to the same objective {other:.2f} s, ratio "
        f"{other / mine:.1f}; with its default tolerance {usual:.2f} s, ratio {usual / mine:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=GRID, metavar="ROWSxFEATURESxCLASSES")
    parser.add_argument("--probe", metavar="ROWSxFEATURESxCLASSES")
    parser.add_argument("--features", help="a .npz file with X and y")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--budget", type=float, default=600, help="seconds for scikit-learn, per size and repeat")
    parser.add_argument("--memory", type=float, default=4, help="GB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = compare_probes if options.probe else compare
    with threadpool_limits(options.threads):
        if options.features:
            arrays = np.load(options.features)
            X, y = standardize(torch.from_numpy(arrays["X"]).float()), arrays["y"]
            y = torch.from_numpy(np.unique(y, return_inverse=True)[1])
            print(f"{X.shape[0]:,} x {X.shape[1]:,}, {int(y.max()) + 1} classes", flush=True)
            run(X, y, options)
            return
        for size in [options.probe] if options.probe else options.sizes:
            n, d, c = map(int, size.split("x"))
            print(f"{n:,} x {d:,}, {c} classes", flush=True)
            gigabytes = n * d * 22 / 1e9  # float32 and float64 copies, and half precision
            if gigabytes > options.memory:
                print(f"  skipped: needs {gigabytes:.0f} GB, more than --memory {options.memory:g}", flush=True)
                continue
            run(*make_features(n, d, c), options)


if __name__ == "__main__":
    main()
