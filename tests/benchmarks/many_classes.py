"""Memory and time of the logistic solver where the logits of all rows are far larger than memory allows.

    .venv/bin/python tests/benchmarks/many_classes.py                # 40,000 rows x 512 features, 2,000 classes
    .venv/bin/python tests/benchmarks/many_classes.py --full         # iNaturalist 2018's size: 400,000 x 2,048, 8,000

Writes a float16 table to a temporary folder and maps it. Then times what a Newton step consists of: the gradient, a
few products with the Hessian and a line search, all of one point. Prints the seconds of each, the peak of the
process's own memory (RssAnon, which does not count the mapped table), what the logits alone would take, and the time
of a path of six strengths at --products products and --steps Newton steps in all. With --chunks, each pass stops
after so many chunks of 8,192 rows, and its time is scaled up; the memory is the same, since each chunk takes the place
of the one before.
"""

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from larger_than_memory import PeakMemory, write_table

from concat_ensemble.features.standardized import CHUNK, StandardizedFeatures, moments
from concat_ensemble.features.table import TableSplit
from concat_ensemble.probes import logistic
from concat_ensemble.probes.logistic import Coefficients, Problem


class FirstChunks(StandardizedFeatures):
    """Rows of which a pass reads `limit` chunks only."""

    limit: int | None = None

    def chunks(self, *, fast: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        return itertools.islice(super().chunks(fast=fast), self.limit)


def timed(name: str, share: float, call):
    """The result, and the seconds of whole passes."""
    started = time.perf_counter()
    result = call()
    seconds = (time.perf_counter() - started) / share
    print(f"  {name}: {seconds:.1f} s", flush=True)
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 40_000), ("num-features", 512), ("classes", 2_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--full", action="store_true", help="400,000 x 2,048 with 8,000 classes")
    parser.add_argument("--chunks", type=int, help="of 8,192 rows, that a pass reads; default: all")
    parser.add_argument("--repeats", type=int, default=1, help="products that are timed")
    parser.add_argument("--products", type=int, default=90, help="of a path, to extrapolate its time")
    parser.add_argument("--steps", type=int, default=18, help="Newton steps of a path")
    options = parser.parse_args()
    n, d, c = (400_000, 2_048, 8_000) if options.full else (options.rows, options.num_features, options.classes)
    print(f"{n:,} x {d:,}, {c:,} classes; one array of logits is {4 * n * c / 1e9:.1f} GB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        features, labels = write_table(Path(folder) / "features.npy", n, d, c)
        split, y = TableSplit([features], labels), torch.from_numpy(labels)
        with PeakMemory() as memory:
            chunks = options.chunks or -(-n // CHUNK)
            share = min(chunks * CHUNK / n, 1.0)
            part = split.select(np.arange(int(share * n)))
            (mean, scale), _ = timed("moments", share, lambda: moments(part))
            X = FirstChunks(split, mean, scale, in_memory=False)
            X.limit = chunks
            problem = Problem(X, y, torch.full((n,), 1 / n), 1e-3, n * c <= logistic.STORED_LOGITS)
            point = problem.point(Coefficients(torch.zeros(c, d).T, torch.zeros(c)))
            (gradient, curvature), gradient_seconds = timed("gradient", share, lambda: problem.gradient(point))
            direction = Coefficients(-gradient.weight / curvature, -gradient.bias / curvature)
            product_seconds = min(
                timed("product with the Hessian", share, lambda: problem.hessian_product(point, direction))[1]
                for _ in range(options.repeats)
            )
            step, value = problem.point(direction), problem.value(point)
            slope = float(gradient.dot(direction))
            (length, value), search_seconds = timed(
                "line search", share, lambda: logistic.line_search(problem, point, value, step, slope)
            )
    hours = options.products * product_seconds / 3600
    hours += options.steps * (gradient_seconds + search_seconds) / 3600
    if share == 1:
        print(f"  objective {math.log(c):.4f} to {value:.4f} at length {length:.2f}")
    print(f"  {memory.peak:.2f} GB of its own memory")
    print(f"  a path with {options.products} products and {options.steps} Newton steps: {hours:.1f} hours")


if __name__ == "__main__":
    main()
