"""The results file of a probe: what was measured, on which data, how often and how precisely.

Loads neither timm nor matplotlib, so that reports and cards can read results without them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from msgspec import Meta

from concat_ensemble.data.naming import METRICS
from concat_ensemble.files import write_json
from concat_ensemble.probes.intervals import (
    paired_difference,
    paired_resampled_difference,
    wilson_interval,
)
from concat_ensemble.probes.repeats import Estimate, estimate_over_repeats, estimate_over_repeats_and_images
from concat_ensemble.schema import Amount, Count, PositiveCount, Seed, Share, Text, check_type, decode_json
from concat_ensemble.studies.options import CONTROLS

RESULTS = "results"  # the folder of results files in an ensemble's folder
SCHEMA_VERSION = 2  # of results, selection and overlap files
# "first_members": the first 2, 3, ... members; "projected": the ensemble projected to the features of one member
KINDS = ("ensemble", "first_members", "member", "projected", "baseline", "control")
UNTRAINED, PIXELS, MAJORITY = "untrained members", "raw pixels", "majority class"  # the names of the controls
MAX_CONFUSION = 100  # classes: a results file holds no larger confusion matrix
MAX_RESAMPLES = 10_000  # that a file may hold of the test images of one run
MAX_ROWS, MAX_REPEATS, MAX_CLASSES = 2_000, 1_000, 65_536
# Version 1 (0.1.0) used other names. Protocols are hashes over those names, so that they stay what they were.
VERSION_1_KINDS = {"prefix": "first_members", "narrowed": "projected"}
VERSION_1_ROW = {"width": "num_features"}
VERSION_1_RUN = {"strength": "l2_strength", "draws": "resamples", "right": "correct"}
VERSION_1_PROBE = {"strengths": "l2_strengths", "draws": "num_resamples"}


@dataclass
class DatasetSettings:
    """What results record of a dataset, with the types: arguments of `load_data`, and what is known of the data. A
    caller of `probe_ensemble` may record more."""

    name: Text | None = None
    config: Text | None = None
    revision: Text | None = None
    image_column: Text | None = None
    label_column: Text | None = None
    group_column: Text | None = None
    train_split: Text | None = None
    validation_split: Text | None = None
    test_split: Text | None = None
    test_size: Share | None = None
    classes: Annotated[list[Count | Text], Meta(max_length=MAX_CLASSES)] | None = None
    limit: Count | None = None
    shots: Count | None = None
    seed: Seed | None = None
    use_folders: bool = False
    recipe: Text | None = None
    metric: Text | None = None
    benchmark: Text | None = None
    test_images: Count | None = None
    on_hub: bool = False


@dataclass
class ProbeRecord:
    """What results record of their probes, with the types."""

    kind: Text = "linear"
    metric: Text = "top1"
    class_weight: Text | None = None
    selection: Text | None = None
    l2_strengths: Annotated[list[Amount], Meta(min_length=1, max_length=1_000)] | None = None
    num_resamples: Annotated[int, Meta(ge=0, le=MAX_RESAMPLES)] = 0


@dataclass
class Cost:
    """Cost of one image through one or several members. Multiplications and additions count one operation each."""

    gflops: Amount
    million_parameters: Amount
    seconds: Amount = 0.0  # in a batch; 0 where it was not measured

    def __add__(self, other: Cost) -> Cost:
        parameters = self.million_parameters + other.million_parameters
        return Cost(self.gflops + other.gflops, parameters, self.seconds + other.seconds)


@dataclass
class Run:
    """One probe of one set of features in one repeat. Accuracies are shares of the `n_test` test images."""

    seed: Seed
    metrics: dict[str, Share]
    l2_strength: Amount  # chosen on validation data
    n_train: Count
    n_test: PositiveCount
    # 95%, bootstrap over the test images.
    intervals: dict[str, Annotated[list[Share], Meta(min_length=2, max_length=2)]] = field(default_factory=dict)
    # The results' metric with bootstrap resamples of the training images.
    resamples: Annotated[list[Share], Meta(max_length=MAX_RESAMPLES)] = field(default_factory=list)
    correct: str = ""  # which test images are predicted correctly: packed bits in base64, for paired tests
    # The results' metric on bootstrap resamples of the test images: float32 in base64, for paired differences. The
    # resamples are the same for all rows. Empty where `correct` says it all: for top-1 without groups.
    resampled: str = ""
    confusion: str = ""  # counts of (class, predicted class), row by row: uint32 in base64; of the ensemble alone
    at_edge: bool | None = None  # whether the chosen L2 strength is at the edge of its grid; None: nothing was chosen
    converged: bool = True  # whether the solver reached its tolerance

    @property
    def correct_images(self) -> np.ndarray | None:
        """(N,) bool, in the order of the test split; None where the run does not record it."""
        return unpack_bits(self.correct, self.n_test) if self.correct else None

    @property
    def resampled_values(self) -> np.ndarray | None:
        """(number of resamples,) the metric on bootstrap resamples of the test images; None where not recorded."""
        return np.frombuffer(base64.b64decode(self.resampled), dtype="<f4").astype(float) if self.resampled else None

    @property
    def confusion_matrix(self) -> np.ndarray | None:
        """(C, C) test images by class and predicted class; None where the run does not record it."""
        if not self.confusion:
            return None
        counts = np.frombuffer(base64.b64decode(self.confusion), dtype="<u4").astype(int)
        return counts.reshape(math.isqrt(len(counts)), -1)


def pack_bits(correct: np.ndarray) -> str:
    """Encode (N,) bool the way a results file stores it."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack_bits(packed: str, count: int) -> np.ndarray:
    """(count,) bool, from what `pack_bits` gave."""
    bits = np.frombuffer(base64.b64decode(packed), dtype=np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def pack_numbers(numbers: np.ndarray, dtype: str) -> str:
    """Encode numbers the way a results file stores them: "<f4" for `Run.resampled`, "<u4" for `Run.confusion`."""
    return base64.b64encode(np.asarray(numbers).astype(dtype).tobytes()).decode()


@dataclass
class Row:
    """One row of the table: the same features, probed in one or several repeats."""

    name: Text
    kind: Text  # one of KINDS
    num_features: Count
    num_members: Count = 0
    steps: Count | None = None  # training steps of all members together; None where a member does not state them
    gflops: Amount | None = None  # training compute of all members together; None where a member does not state it
    runs: Annotated[list[Run], Meta(min_length=1, max_length=MAX_REPEATS)] = field(default_factory=list)
    cost: Cost | None = None  # of one image; None for features that need no network
    # Of the results that the row is in, which set them; no fields of the file.
    metric = "top1"
    shares_images = False  # between repeats

    @property
    def values(self) -> np.ndarray:
        """(number of repeats,) the metric, as shares."""
        return self.values_in(self.metric)

    @property
    def top1(self) -> np.ndarray:
        """(number of repeats,) shares."""
        return self.values_in("top1")

    def values_in(self, metric: str) -> np.ndarray:
        """(number of repeats,) shares in one of the metrics that the runs record."""
        return np.array([run.metrics[metric] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `mean`, within [0, 1].

        Over several repeats by their spread, and by that of their images where they share them. For a single one over
        the test images: Wilson's for a share of independent images, bootstrap percentiles for other metrics and for
        images in groups.
        """
        if len(self.runs) > 1:
            is_share = self.metric == "top1" and not any(run.resampled for run in self.runs)
            num_images = sum(run.n_test for run in self.runs) if is_share else None
            return _estimate(self.values, self.correct_images, num_images).share_interval
        (run,) = self.runs
        if self.metric == "top1" and not run.resampled:
            return wilson_interval(self.mean, run.n_test)
        low, high = run.intervals[self.metric]
        return low, high

    @property
    def correct_images(self) -> np.ndarray | None:
        """(number of repeats, N) bool: which test images are predicted correctly, where the repeats share them and the
        metric is their share; None otherwise."""
        correct = [run.correct_images for run in self.runs]
        if not self.shares_images or self.metric != "top1" or any(run.resampled for run in self.runs):
            return None
        return None if any(each is None for each in correct) else np.array(correct)

    @property
    def resample_deviation(self) -> float | None:
        """Standard deviation of the metric over resamples of the training images, averaged over runs; None without."""
        variances = [np.var(run.resamples, ddof=1) for run in self.runs if len(run.resamples) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else None


def _estimate(values: np.ndarray, by_image: np.ndarray | None, num_images: int | None = None) -> Estimate:
    """The mean over repeats of values (R,), which are the means of (R, N) values by image where repeats share them."""
    return (
        estimate_over_repeats(values, num_images) if by_image is None else estimate_over_repeats_and_images(by_image)
    )


class ResultsFile(ABC):
    """Base of the dataclasses that are files. `load` reads what `save` wrote, in this version or an earlier one."""

    FILE_KIND: ClassVar[str]
    REMEDY: ClassVar[str]  # for a file that cannot be read

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file, or raise ValueError when it is not one that `save` wrote."""
        try:
            content = check_type(decode_json(Path(path)), dict[str, Any])
            version = content.get("schema_version", 1)  # that of 0.1.0 is not stated
            if version not in (1, SCHEMA_VERSION):
                raise ValueError(f"schema_version={version!r} is not one that this version of concat-ensemble reads")
            content = cls.upgrade(content) if version == 1 else content
            results = check_type(content, cls)
            results.check(content)
            return results
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # those but the last: of `upgrade`
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a {cls.FILE_KIND} file ({reason}); {cls.REMEDY}.") from error

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        write_json(path, {"schema_version": SCHEMA_VERSION, **content})

    @classmethod
    @abstractmethod
    def upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Bring the content of a version 1 file to today's names."""

    @abstractmethod
    def check(self, content: dict[str, Any]) -> None:
        """Raise ValueError for values of the right type that no study gives."""


@dataclass
class Results(ResultsFile):
    """All rows of one ensemble, dataset and probe. The first row is the ensemble itself."""

    FILE_KIND, REMEDY = "results", "probe again with --overwrite"

    ensemble: Text
    dataset: dict[str, Any]  # see `DatasetSettings`
    probe: dict[str, Any]  # see `ProbeRecord`
    rows: Annotated[list[Row], Meta(min_length=1, max_length=MAX_ROWS)]
    members_sha256: list[Text] = field(default_factory=list)
    command: Text = ""
    versions: dict[str, Text] = field(default_factory=dict)
    seconds: dict[str, Amount] = field(default_factory=dict)
    hardware: Text = ""  # that the seconds of the rows' costs were measured on
    controls: Text = "all"  # one of CONTROLS
    audit: dict[str, Any] | None = None  # an `Audit` of the dataset, of the first repeat; None: it was not audited
    # Of `Run.confusion`; empty for more than MAX_CONFUSION.
    class_names: Annotated[list[Text], Meta(max_length=MAX_CONFUSION)] = field(default_factory=list)

    def __post_init__(self):
        shares_images = bool(self.audit and self.audit.get("test_sha256"))
        for row in self.rows:
            row.metric, row.shares_images = self.metric, shares_images

    @property
    def metric(self) -> str:
        """The metric that chose the L2 strengths and that rows are compared in; files without one used top-1."""
        return self.probe.get("metric", "top1")

    @property
    def num_groups(self) -> int | None:
        """Number of groups of test images, over which intervals are; None where each image stands for itself."""
        groups = self.audit and self.audit.get("groups")
        return groups["test"] if groups else None

    def __getitem__(self, name: str) -> Row:
        if name not in self:
            raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")
        return next(row for row in self.rows if row.name == name)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    @property
    def protocol(self) -> str:
        """Eight characters that agree only where data, splits, solver, grid and selection do; seeds are left out."""
        dataset = {key: value for key, value in self.dataset.items() if key != "seed"}
        return hash_protocol(dataset=dataset, probe=self.probe)

    @property
    def repeats(self) -> int:
        return len(self.rows[0].runs)

    def difference(self, name: str, other: str) -> tuple[float, tuple[float, float], float]:
        """Paired difference of the mean metric, `name` minus `other`: mean, 95% interval, p-value of no difference.

        Over several repeats `estimate_over_repeats`, and for top-1 `estimate_over_repeats_and_images` where they share
        their test images. For a single repeat, over the test images: the bootstrap and McNemar's test for top-1; the
        bootstrap for other metrics, and over groups of images where there are groups. The interval is infinite and p
        is 1 where a run does not record what that takes; it is -1 to 1 where all repeats differ by the same.
        """
        paired = self[name].values - self[other].values
        if self.repeats > 1:
            if not paired.any():
                return 0.0, (0.0, 0.0), 1.0
            correct, other_correct = self[name].correct_images, self[other].correct_images
            by_image = None if correct is None or other_correct is None else correct.astype(float) - other_correct
            estimate = _estimate(paired, by_image)
            low, high = estimate.interval
            return estimate.mean, (max(low, -1.0), min(high, 1.0)), estimate.p_value()
        run, other_run = self[name].runs[0], self[other].runs[0]
        values, other_values = run.resampled_values, other_run.resampled_values
        if values is not None and other_values is not None:
            points = run.metrics[self.metric], other_run.metrics[self.metric]
            return paired_resampled_difference(values, other_values, *points)
        first, second = run.correct_images, other_run.correct_images
        if first is None or second is None or self.metric != "top1":
            return float(paired[0]), (-float("inf"), float("inf")), 1.0
        return paired_difference(first, second)

    def save(self, path: Path) -> None:
        self._write(path, {"protocol": self.protocol, **dataclasses.asdict(self)})

    @classmethod
    def upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        rows = [_upgrade_row(row) for row in content["rows"]]
        return content | {"probe": rename_keys(content["probe"], VERSION_1_PROBE), "rows": rows}

    def check(self, content: dict[str, Any]) -> None:
        check_type(self.dataset, DatasetSettings, "dataset")
        check_type(self.probe, ProbeRecord, "probe")
        fields = {"schema_version", "protocol", *(field.name for field in dataclasses.fields(self))}
        if unknown := sorted(content.keys() - fields):  # msgspec ignores them
            raise ValueError(f"it has the unknown key {unknown[0]!r}")
        if self.metric not in METRICS or self.controls not in CONTROLS:
            raise ValueError(f"its metric {self.metric!r} or its controls {self.controls!r} are unknown")
        if self.audit is not None:
            check_audit(self.audit)
        for row in self.rows:
            _check_row(row)
            for run in row.runs:
                _check_run(run, row, len(self.class_names))
        if len({len(run.resampled) for row in self.rows for run in row.runs}) > 1:
            raise ValueError("its runs must all have the same number of resamples of the test images")
        if len({len(row.runs) for row in self.rows}) > 1:
            raise ValueError("its rows must all have the same number of runs")
        if len({tuple(run.n_test for run in row.runs) for row in self.rows}) > 1:
            raise ValueError("its rows must all have the same number of test images in each repeat")

    @classmethod
    def merged(cls, repeats: list[Results]) -> Results:
        """Merge single repeats with different seeds. Raises ValueError if their protocols or rows differ."""
        rows = {tuple(row.name for row in result.rows) for result in repeats}
        # The number of test images may differ: an audit, or a cut by groups, leaves other images out for each seed.
        same = [dataclasses.replace(each, dataset=each.dataset | {"test_images": None}) for each in repeats]
        if len({result.protocol for result in same}) > 1 or len(rows) > 1:
            raise ValueError("repeats differ in protocol or rows; probe them again with the same settings.")
        runs = {row.name: [run for result in repeats for run in result[row.name].runs] for row in repeats[0].rows}
        merged = [dataclasses.replace(row, runs=runs[row.name]) for row in repeats[0].rows]
        audit = repeats[0].audit
        if len({(each.audit or {}).get("test_sha256") for each in repeats}) > 1:
            audit = audit and audit | {"test_sha256": ""}  # the repeats have different test images
        return dataclasses.replace(repeats[0], rows=merged, audit=audit)


def hash_protocol(*, probe: dict[str, Any], **settings: Any) -> str:
    """Eight characters that stand for a probe's settings and the others, under the names that 0.1.0 used."""
    version_1 = {new: old for old, new in VERSION_1_PROBE.items()}
    content = json.dumps(settings | {"probe": rename_keys(probe, version_1)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def rename_keys(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same values, where `names` maps old keys to new ones."""
    return {names.get(key, key): value for key, value in content.items()}


def _upgrade_row(row: dict[str, Any]) -> dict[str, Any]:
    kind = VERSION_1_KINDS.get(row["kind"], row["kind"])
    name = f"{row['name']} members" if kind == "first_members" else row["name"]
    runs = [rename_keys(run, VERSION_1_RUN) for run in row["runs"]]
    return rename_keys(row, VERSION_1_ROW) | {"name": name, "kind": kind, "runs": runs}


def check_audit(content: dict[str, Any]) -> None:
    from concat_ensemble.data.audit import Audit  # loads `datasets`

    audit = check_type(content, Audit, "audit")
    if audit.groups is not None and "test" not in audit.groups:
        raise ValueError("its audit counts no groups of test images")


def _check_row(row: Row) -> None:
    """Raise ValueError for values that no probe gives: cards and pages show the results of strangers."""
    if row.kind not in KINDS:
        raise ValueError(f"its row {row.name!r} is of kind {row.kind!r}, not one of {', '.join(KINDS)}")
    if not all({"top1", row.metric} <= run.metrics.keys() for run in row.runs):
        raise ValueError(f"its row {row.name!r} must have top1 and {row.metric} in each run")


def _check_run(run: Run, row: Row, num_classes: int) -> None:
    if len(base64.b64decode(run.correct, validate=True)) not in (0, -(-run.n_test // 8)):
        raise ValueError(f"its row {row.name!r} does not fit {run.n_test} test images")
    resampled = base64.b64decode(run.resampled, validate=True)
    if resampled or row.metric != "top1":
        low, high = run.intervals.get(row.metric, (1, 0))
        if low > high:
            raise ValueError(f"its row {row.name!r} has no interval of {row.metric}, or one that runs backwards")
    values = np.frombuffer(resampled[: len(resampled) // 4 * 4], "<f4")
    if len(resampled) % 4 or len(values) > MAX_RESAMPLES or not np.isfinite(values).all():
        raise ValueError(f"its row {row.name!r} has {len(resampled)} bytes of resamples of the test images")
    if run.confusion:
        counts = base64.b64decode(run.confusion, validate=True)
        if not 0 < num_classes <= MAX_CONFUSION or len(counts) != 4 * num_classes**2:
            raise ValueError(f"its row {row.name!r} has a confusion matrix that does not fit {num_classes} classes")
        if np.frombuffer(counts, "<u4").sum(dtype=np.int64) != run.n_test:
            raise ValueError(f"its row {row.name!r} has a confusion matrix that does not fit {run.n_test} test images")


def short_name(results: Results, row: Row) -> str:
    """A row's name without the ensemble's, for a place that names the ensemble."""
    return row.name.removeprefix(f"{results.ensemble}, ")


def format_points(difference: float | None, interval: tuple[float, float] | None) -> str:
    """A difference of shares in percentage points, and its interval where that is finite; "" where there is none."""
    if difference is None or interval is None:
        return ""
    low, high = interval
    return f"{100 * difference:+.1f}" + (f" [{100 * low:+.1f}, {100 * high:+.1f}]" if math.isfinite(low) else "")
