"""Results of a probe, as a file: what was measured, on what, how often, and how sure it is."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from concat_ensemble.probes.intervals import paired_difference, wilson_interval
from concat_ensemble.records import fits, misfit

RESULTS = "results"  # the folder of results files in an ensemble's folder
# "narrowed": the ensemble itself at one member's width
KINDS = ("ensemble", "prefix", "member", "narrowed", "baseline", "control")
# What is shown of how a dataset was asked for.
DATASET = {
    "name": str | None,
    "config": str | None,
    "revision": str | None,
    "classes": list[int | str] | None,
    "shots": int | None,
    "test_images": int | None,
}


@dataclass
class Cost:
    """Of one image through a member: multiplications and additions count one each."""

    gflops: float
    million_parameters: float
    seconds: float = 0.0  # in a batch, where it was measured

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gflops + other.gflops,
            self.million_parameters + other.million_parameters,
            self.seconds + other.seconds,
        )


@dataclass
class Run:
    """One probe of one set of features, on one draw of the data. Accuracies are shares of the `n_test` test images."""

    seed: int
    metrics: dict[str, float]
    strength: float  # L2, chosen on validation data
    n_train: int
    n_test: int
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95%, over redrawn test images
    draws: list[float] = field(default_factory=list)  # top-1 with the training images drawn anew, with replacement
    right: str = ""  # which test images are predicted right: packed bits in base64, for paired tests

    @property
    def right_images(self) -> np.ndarray | None:
        """(N,) bool, in the order of the test split."""
        if not self.right:
            return None
        packed = np.frombuffer(base64.b64decode(self.right), dtype=np.uint8)
        return np.unpackbits(packed, count=self.n_test).astype(bool)


def packed(right: np.ndarray) -> str:
    """(N,) bool as a file keeps it."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


@dataclass
class Row:
    """One line of the table: the same features, probed in one or several repeats."""

    name: str
    kind: str
    width: int
    num_members: int = 0
    steps: int | None = None  # spent on training the members, in all
    gflops: float | None = None  # the same in floating-point operations, where every member says
    runs: list[Run] = field(default_factory=list)
    cost: Cost | None = None  # of one image, where it runs through a network

    def __post_init__(self):
        if isinstance(self.cost, dict):  # from a file
            self.cost = Cost(**self.cost)

    @property
    def top1(self) -> np.ndarray:
        return np.array([run.metrics["top1"] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.top1.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95%: Student's over repeats where there are several, else Wilson's over the test images."""
        return t_interval(self.top1) if len(self.runs) > 1 else wilson_interval(self.mean, self.runs[0].n_test)

    @property
    def draw_deviation(self) -> float | None:
        """Standard deviation of top-1 over draws of the training images, averaged over runs; None without draws."""
        drawn = [np.var(run.draws, ddof=1) for run in self.runs if len(run.draws) > 1]
        return float(np.sqrt(np.mean(drawn))) if drawn else None


@dataclass
class Results:
    """All rows of one (ensemble, dataset, probe)."""

    ensemble: str
    dataset: dict[str, Any]
    probe: dict[str, Any]
    rows: list[Row]
    members_sha256: list[str] = field(default_factory=list)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    hardware: str = ""  # on which the rows' seconds were measured

    def __getitem__(self, name: str) -> Row:
        if name not in self:
            raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")
        return next(row for row in self.rows if row.name == name)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    @property
    def protocol(self) -> str:
        """Names the protocol: the same eight characters only where data, cuts, solver, grid and selection are the same
        (seeds aside).
        """
        settings = {
            "dataset": {key: value for key, value in self.dataset.items() if key != "seed"},
            "probe": self.probe,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def repeats(self) -> int:
        return len(self.rows[0].runs)

    def difference(self, name: str, other: str) -> tuple[float, tuple[float, float], float]:
        """Mean top-1 of `name` minus `other`, paired, its 95% interval, and the p-value of there being none.

        Over several repeats Student's; for one repeat over its test images, by the bootstrap and McNemar's test
        (infinite, and 1, where a run does not say which images it got right).
        """
        paired = self[name].top1 - self[other].top1
        if self.repeats > 1:
            error = paired.std(ddof=1) / np.sqrt(self.repeats)
            p = float(2 * stats.t.sf(abs(paired.mean()) / error, self.repeats - 1)) if error else float(paired[0] == 0)
            return float(paired.mean()), t_interval(paired), p
        mine, its = self[name].runs[0].right_images, self[other].runs[0].right_images
        if mine is None or its is None:
            return float(paired[0]), (-float("inf"), float("inf")), 1.0
        return paired_difference(mine, its)

    def save(self, path: Path) -> None:
        write_json(path, {"protocol": self.protocol, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Results:
        """
        Raises:
            ValueError: when the file is not one that `save` wrote.
        """
        try:
            content = json.loads(Path(path).read_text())
            content.pop("protocol")
            rows = [Row(**{**row, "runs": [Run(**run) for run in row["runs"]]}) for row in content.pop("rows")]
            found = cls(**content, rows=rows)
            found._check()
            return found
        except (
            AttributeError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:  # ValueError: not JSON, or not text
            raise ValueError(f"{path} is not a results file ({error}); probe again with --overwrite.") from error

    def _check(self) -> None:
        """Raise ValueError for what no probe measures: a stranger's file is shown on cards and pages."""
        if name := misfit(self) or next(
            (k for k, hint in DATASET.items() if not fits(self.dataset.get(k), hint)), None
        ):
            raise ValueError(f"its {name} is of another type")
        if not self.rows or len({len(row.runs) for row in self.rows}) > 1 or not self.repeats:
            raise ValueError("its rows have not one number of runs each")
        for row in self.rows:
            if row.kind not in KINDS or min(row.width, row.num_members) < 0:
                raise ValueError(f"its row {row.name!r} is none of {', '.join(KINDS)}")
            for run in row.runs:
                length = len(base64.b64decode(run.right, validate=True))
                if not (run.n_test > 0 and 0 <= run.metrics["top1"] <= 1 and length in (0, -(-run.n_test // 8))):
                    raise ValueError(f"its row {row.name!r} is not of {run.n_test} test images")

    @classmethod
    def merged(cls, repeats: list[Results]) -> Results:
        """Repeats with different seeds as one.

        Raises:
            ValueError: when they were not measured alike.
        """
        if (
            len({result.protocol for result in repeats}) > 1
            or len({tuple(row.name for row in result.rows) for result in repeats}) > 1
        ):
            raise ValueError("repeats differ in protocol or rows; probe them again alike.")
        rows = [
            dataclasses.replace(row, runs=[run for result in repeats for run in result[row.name].runs])
            for row in repeats[0].rows
        ]
        return dataclasses.replace(repeats[0], rows=rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written aside and renamed: a kill leaves what was there, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.unlink(missing_ok=True)  # were it a link, what it points to would be written
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def short_name(results: Results, row: Row) -> str:
    """A row's name where the ensemble's own stands beside it."""
    return row.name.removeprefix(f"{results.ensemble}, ")


def points(difference: float, interval: Sequence[float]) -> str:
    """A difference of shares in points, with its interval unless a repeat does not say which images it got right."""
    low, high = interval
    return f"{100 * difference:+.1f}" + (f" [{100 * low:+.1f}, {100 * high:+.1f}]" if math.isfinite(low) else "")


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's, 95%, of the mean of at least two values."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
