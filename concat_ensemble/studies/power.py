"""How many repeats and test images it takes to find a difference between two systems, from a study that exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from concat_ensemble.probes.repeats import mean_squares
from concat_ensemble.studies.results import Results

LEVEL, WANTED_POWER = 0.05, 0.8  # of a two-sided test, and the customary power
MOST_REPEATS = 1_000


@dataclass(frozen=True)
class Spread:
    """Variances of the difference of two systems' correctness, for one image in one repeat."""

    repeats: float | None  # between repeats; None where there is a single one, which cannot tell
    images: float  # between images, over all repeats; 0 where each repeat has test images of its own
    rest: float

    @classmethod
    def of(cls, results: Results, name: str, other: str) -> Spread:
        """From the paired outcomes of two rows.

        Raises:
            ValueError: where the runs do not record which images are correct, or have another number of them each.
        """
        differences = []
        for run, other_run in zip(results[name].runs, results[other].runs, strict=True):
            correct, other_correct = run.correct_images, other_run.correct_images
            if correct is None or other_correct is None or len({each.n_test for each in results[name].runs}) > 1:
                raise ValueError(f"the runs of {name} and {other} do not tell which images are correct; probe again.")
            differences.append(correct.astype(float) - other_correct)
        values = np.array(differences)
        if len(values) == 1:
            return cls(None, 0.0, float(values.var(ddof=1)))
        if results[name].shares_images:
            of_repeats, of_images, of_rest = mean_squares(values)
            repeats = max(of_repeats - of_rest, 0.0) / values.shape[1]
            return cls(repeats, max(of_images - of_rest, 0.0) / len(values), of_rest)
        rest = float(values.var(axis=1, ddof=1).mean())
        return cls(max(float(values.mean(1).var(ddof=1)) - rest / values.shape[1], 0.0), 0.0, rest)

    def power(self, difference: float, repeats: int, images: int) -> float:
        """Probability that a study finds a true difference of shares, by the two-sided test at 5% of
        `Results.difference`."""
        parts = np.array([(self.repeats or 0.0) / repeats + self.rest / (repeats * images), self.images / images])
        if not parts.any():
            return float(difference != 0)
        freedom = images - 1 if self.repeats is None else (repeats - 1) * (parts.sum() / parts[0]) ** 2
        center, bound = difference / np.sqrt(parts.sum()), stats.t.ppf(1 - LEVEL / 2, freedom)
        return float(stats.nct.sf(bound, freedom, center) + stats.nct.cdf(-bound, freedom, center))


@dataclass(frozen=True)
class Design:
    """What a study with a number of test images needs and can do."""

    images: int
    repeats_needed: int | None  # for the power of 80%; None: more than 1,000, or one repeat cannot tell
    power: float  # with as many repeats as there are
    smallest: float  # the difference that these repeats find with a power of 80%


@dataclass(frozen=True)
class PowerStudy:
    """The answer for two rows of a results file. Differences are shares."""

    name: str
    other: str
    difference: float
    repeats: int
    shares_images: bool
    spread: Spread
    designs: list[Design]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_repeats(
    results: Results, difference: float, other: str, *, factors: Sequence[int] = (1, 2, 4, 10)
) -> PowerStudy:
    """What it takes to find a true difference between the ensemble and another row, with the test images of the study
    or several times as many.

    Raises:
        ValueError: for a difference that is not in (0, 1), another metric than top-1, a row that is not there, and as
            `Spread.of`.
    """
    if not 0 < difference < 1:
        raise ValueError(f"difference={difference} must be above 0 and below 1, a difference of shares.")
    if results.metric != "top1" or results.num_groups:
        raise ValueError(
            "the results must be top-1 of independent images: for others no outcome by image is recorded."
        )
    name = results.rows[0].name
    if other not in results or other == name:
        names = ", ".join(row.name for row in results.rows[1:])
        raise ValueError(f"other={other!r} must be one of {names}.")
    spread, images = Spread.of(results, name, other), results.rows[0].runs[0].n_test
    designs = []
    for factor in factors:
        needed = None if spread.repeats is None else _find_repeats(spread, difference, factor * images)
        power = spread.power(difference, results.repeats, factor * images)
        smallest = _find_difference(spread, results.repeats, factor * images)
        designs.append(Design(factor * images, needed, power, smallest))
    shares_images = results.rows[0].shares_images
    return PowerStudy(name, other, difference, results.repeats, shares_images, spread, designs)


def _find_repeats(spread: Spread, difference: float, images: int) -> int | None:
    """The smallest number of repeats with the power of 80%, None beyond `MOST_REPEATS`."""
    numbers = range(2, MOST_REPEATS + 1)
    if spread.power(difference, MOST_REPEATS, images) < WANTED_POWER:
        return None
    low, high = 0, len(numbers) - 1
    while low < high:
        middle = (low + high) // 2
        if spread.power(difference, numbers[middle], images) < WANTED_POWER:
            low = middle + 1
        else:
            high = middle
    return numbers[low]


def _find_difference(spread: Spread, repeats: int, images: int) -> float:
    """The difference with the power of 80%, to a hundredth of a point; 1 where none has it."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if spread.power(middle, repeats, images) < WANTED_POWER:
            low = middle
        else:
            high = middle
    return high
