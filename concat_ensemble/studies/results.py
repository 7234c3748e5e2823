"""Results of a probe as a file: what was measured, on what, how often, and how sure it is."""

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

import msgspec
import numpy as np
from scipy import stats

from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import paired_difference, t_interval, wilson_interval

RESULTS = "results"  # the folder of results files in an ensemble's folder
SCHEMA_VERSION = 2
# "first_members": the first 2, 3, ... members; "projected": the ensemble projected to the features of one member
KINDS = ("ensemble", "first_members", "member", "projected", "baseline", "control")
# Version 1 (0.1.0) had other names. Protocols are hashes over its names, so that they stay what they were.
VERSION_1_KINDS = {"prefix": "first_members", "narrowed": "projected"}
VERSION_1_ROW = {"width": "num_features"}
VERSION_1_RUN = {"strength": "l2_strength", "draws": "resamples", "right": "correct"}
VERSION_1_PROBE = {"strengths": "l2_strengths", "draws": "num_resamples"}


@dataclass
class DatasetSettings:
    """The settings of a dataset that cards show, with their types."""

    name: str | None = None
    config: str | None = None
    revision: str | None = None
    classes: list[int | str] | None = None
    shots: int | None = None
    test_images: int | None = None


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
    """One probe of one set of features in one repeat. Accuracies are shares of the `n_test` test images."""

    seed: int
    metrics: dict[str, float]
    l2_strength: float  # chosen on validation data
    n_train: int
    n_test: int
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95%, bootstrap over the test images
    resamples: list[float] = field(default_factory=list)  # top-1 with bootstrap resamples of the training images
    correct: str = ""  # which test images are predicted correctly: packed bits in base64, for paired tests

    @property
    def correct_images(self) -> np.ndarray | None:
        """(N,) bool, in the order of the test split; None where the run does not say."""
        if not self.correct:
            return None
        bits = np.frombuffer(base64.b64decode(self.correct), dtype=np.uint8)
        return np.unpackbits(bits, count=self.n_test).astype(bool)


def pack_bits(correct: np.ndarray) -> str:
    """(N,) bool as a results file stores it."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


@dataclass
class Row:
    """One line of the table: the same features, probed in one or several repeats."""

    name: str
    kind: str
    num_features: int
    num_members: int = 0
    steps: int | None = None  # spent on training the members, in all
    gflops: float | None = None  # the same in floating-point operations, where every member says
    runs: list[Run] = field(default_factory=list)
    cost: Cost | None = None  # of one image, where it runs through a network

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
    def resample_deviation(self) -> float | None:
        """Standard deviation of top-1 over resamples of the training images, averaged over runs; None without any."""
        variances = [np.var(run.resamples, ddof=1) for run in self.runs if len(run.resamples) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else None


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
        """Eight characters that are the same only where data, splits, solver, grid and selection are (seeds aside)."""
        version_1 = {new: old for old, new in VERSION_1_PROBE.items()}
        settings = {
            "dataset": {key: value for key, value in self.dataset.items() if key != "seed"},
            "probe": {version_1.get(key, key): value for key, value in self.probe.items()},
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
        mine, its = self[name].runs[0].correct_images, self[other].runs[0].correct_images
        if mine is None or its is None:
            return float(paired[0]), (-float("inf"), float("inf")), 1.0
        return paired_difference(mine, its)

    def save(self, path: Path) -> None:
        write_json(path, {"schema_version": SCHEMA_VERSION, "protocol": self.protocol, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that this version or an earlier one wrote.

        Raises:
            ValueError: when the file is not one that `save` wrote.
        """
        try:
            content = msgspec.json.decode(Path(path).read_bytes())
            version = content.get("schema_version", 1)
            if version not in (1, SCHEMA_VERSION):
                raise ValueError(f"schema_version={version!r} is not one that this version of concat-ensemble reads")
            results = msgspec.convert(_from_version_1(content) if version == 1 else content, cls)
            msgspec.convert(results.dataset, DatasetSettings)
            for row in results.rows:
                _check_row(row)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a results file ({error}); probe again with --overwrite.") from error
        if not results.rows or len({len(row.runs) for row in results.rows}) > 1 or not results.repeats:
            raise ValueError(
                f"{path} is not a results file (its rows must all have the same number of runs); probe again with --overwrite."
            )
        return results

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


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file that 0.1.0 wrote under today's names."""
    return content | {
        "probe": _rename(content["probe"], VERSION_1_PROBE),
        "rows": [_row_from_version_1(row) for row in content["rows"]],
    }


def _row_from_version_1(row: dict[str, Any]) -> dict[str, Any]:
    kind = VERSION_1_KINDS.get(row["kind"], row["kind"])
    name = f"{row['name']} members" if kind == "first_members" else row["name"]
    runs = [_rename(run, VERSION_1_RUN) for run in row["runs"]]
    return _rename(row, VERSION_1_ROW) | {"name": name, "kind": kind, "runs": runs}


def _rename(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in content.items()}


def _check_row(row: Row) -> None:
    """Raise ValueError for values that no probe gives: results of strangers are shown on cards and pages."""
    if row.kind not in KINDS or min(row.num_features, row.num_members) < 0:
        raise ValueError(f"its row {row.name!r} is of kind {row.kind!r}, not one of {', '.join(KINDS)}")
    for run in row.runs:
        num_bytes = len(base64.b64decode(run.correct, validate=True))
        if not (run.n_test > 0 and 0 <= run.metrics["top1"] <= 1 and num_bytes in (0, -(-run.n_test // 8))):
            raise ValueError(f"its row {row.name!r} does not fit {run.n_test} test images")


def short_name(results: Results, row: Row) -> str:
    """A row's name where the ensemble's own stands beside it."""
    return row.name.removeprefix(f"{results.ensemble}, ")


def points(difference: float, interval: Sequence[float]) -> str:
    """A difference of shares in points, with its interval unless a repeat does not say which images it got right."""
    low, high = interval
    return f"{100 * difference:+.1f}" + (f" [{100 * low:+.1f}, {100 * high:+.1f}]" if math.isfinite(low) else "")
