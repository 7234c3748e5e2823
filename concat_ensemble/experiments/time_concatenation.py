"""Time-concatenation at equal training compute (Figure 6): the claims, margin and repeats are written here first.

    concat-ensemble reproduce figure-6

K networks are trained for B / K steps each on the digits 0 to 4, for K = 1, 4 and 8, and one of twice the width
(W2) for B / 4 steps, which cost as much. Linear probes are fitted on the digits 5 to 9, which no network has seen, and
in distribution on 0 to 4. All repeats have the same test images, another seed for networks, placements and folds, and
L2 strengths that are chosen by five folds of the labeled images. Which test images are right is stored for each
repeat, so that intervals are over repeats and images. PRIMARY are the claims that were fixed before the seeds from
`FIRST_SEED` on were run once; their p-values are adjusted for their number. Everything else is exploratory.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from datasets import DatasetDict, concatenate_datasets

from concat_ensemble.data.labels import read_labels
from concat_ensemble.data.loading import load_data
from concat_ensemble.experiments import desk
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.features.table import labeled_split
from concat_ensemble.files import replace_folder, write_json
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.repeats import adjust_p_values
from concat_ensemble.schema import Count, Text, read_json
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.results import pack_bits, unpack_bits

BUDGET, REPEATS = 2_400, 8
FIRST_SEED, TEST_SEED = 100, 1_000  # of the repeats, never used before; of the one cut of the test images
FOLDS = 5
COUNTS = (1, 4, 8)
SINGLE, LARGEST, WIDE = "cat1", "cat8", "w2"
SYSTEMS = (*(f"cat{count}" for count in COUNTS), WIDE)
PROJECTED = f"{LARGEST}, PCA to one member's features"
TASKS = ("unseen", "few labels", "in distribution")
MARGIN = 0.01  # of parity, a share


@dataclass(frozen=True)
class Claim:
    """`system` is better than `other` on a task, or as good within MARGIN."""

    text: str
    task: str
    system: str
    other: str
    kind: Literal["better", "as good"] = "better"


PRIMARY = (
    Claim("CAT8 transfers better than CAT1 at equal steps", "unseen", LARGEST, SINGLE),
    Claim("CAT4 transfers better than CAT1 at equal steps", "unseen", "cat4", SINGLE),
    Claim("CAT4 transfers better than W2, the wide network, at equal FLOPs", "unseen", "cat4", WIDE),
    Claim("CAT8 transfers better than CAT1 at one member's number of features, by PCA", "unseen", PROJECTED, SINGLE),
    Claim("CAT8 is as good as CAT1 in distribution, within a point", "in distribution", LARGEST, SINGLE, "as good"),
)


class Outcomes(msgspec.Struct):
    """What a repeat gave: which test images were right, as packed bits, by task and system."""

    settings: list
    images: dict[str, Count]
    correct: dict[str, dict[str, Text]]

    def select(self, task: str, system: str) -> np.ndarray:
        """(N,) bool."""
        return unpack_bits(self.correct[task][system], self.images[task])


@dataclass(frozen=True)
class Study:
    """The outcomes of all repeats at one budget."""

    repeats: Sequence[Outcomes]

    def correct(self, task: str, system: str) -> np.ndarray:
        """(repeats, N): 1.0 where a test image is right."""
        return np.array([repeat.select(task, system) for repeat in self.repeats], dtype=float)

    def difference(self, task: str, system: str, other: str) -> np.ndarray:
        """(repeats, N): -1.0, 0.0 or 1.0."""
        return self.correct(task, system) - self.correct(task, other)

    @property
    def systems(self) -> list[str]:
        return list(self.repeats[0].correct["unseen"])


def images_folder(setup: desk.Setup) -> Path:
    """Where the images are, by the seed of their cut."""
    return setup.output / f"images-{TEST_SEED + setup.first_seed}"


def write_images(folder: Path, setup: desk.Setup) -> None:
    """Write the digits 0 to 4 and 5 to 9 with test splits that all repeats share."""
    for name in ("unseen", "in distribution"):
        path, task = folder / name.replace(" ", "-"), desk.TASKS[name]
        if path.is_dir():
            continue
        options = {"test_size": task.test_size, "limit": setup.limit, "seed": TEST_SEED + setup.first_seed}
        data = load_data(setup.dataset, classes=task.classes, **options)
        with replace_folder(path) as new:
            concatenate_datasets([data["train"], data["validation"]]).to_parquet(new / "train.parquet")
            data["test"].to_parquet(new / "test.parquet")


def load_task(folder: Path, task: str, seed: int) -> DatasetDict:
    """The scattered images of a task."""
    name = "in-distribution" if task == "in distribution" else "unseen"
    return load_data(f"scattered:parquet:{folder / name}", shots=desk.TASKS[task].shots, seed=seed)


def measure_repeat(setup: desk.Setup, point: tuple[int, int]) -> Outcomes:
    """Train and probe the networks of a budget and a seed, unless their file is there."""
    budget, seed = point
    path, settings = setup.output / f"seed-{seed}-steps-{budget}.json", [setup.study, setup.dataset, seed, budget]
    if not path.is_file():
        networks = train_networks(setup, budget, seed)
        write_json(path, msgspec.to_builtins(Outcomes(settings, *probe_networks(setup, networks, seed))))
        shutil.rmtree(networks / "features")
    outcomes = read_json(path, Outcomes, "delete it")
    if outcomes.settings != settings:
        raise ValueError(f"{path} is of {outcomes.settings}, not {settings}; name another --output, or delete it.")
    return outcomes


def train_networks(setup: desk.Setup, budget: int, seed: int) -> Path:
    """The folder of the networks of a budget and a seed, trained if they are not there; `write_images` comes first."""
    networks = setup.output / "networks" / f"seed-{seed}-steps-{budget}"
    data = f"parquet:{images_folder(setup) / 'in-distribution'}"
    options = {"wide_steps": budget // 4, "dataset": data, "classes": None}
    setup.train(desk.plan_members(networks, f"{budget:,} steps", COUNTS, budget, **options), seed)
    return networks


def probe_networks(setup: desk.Setup, networks: Path, seed: int) -> tuple[dict[str, int], dict[str, dict[str, str]]]:
    """The number of test images by task, and which are right, by task and system."""
    models = {system: assemble(networks / system) for system in SYSTEMS}
    models["untrained members"] = untrained_like(models[LARGEST], seed)
    images, correct = {}, {}
    for task in TASKS:
        data = load_task(images_folder(setup), task, seed)
        store = networks / "features"
        tables = {name: extract_features(model, data, store=store, quiet=True) for name, model in models.items()}
        largest = tables[LARGEST]
        tables[PROJECTED] = principal_projection(largest, max(largest.feature_dims))(largest)
        tables["raw pixels"] = pixel_table(data, "L", quiet=True)
        labels = read_labels(data["test"])
        images[task], correct[task] = len(labels), {}
        for name, table in tables.items():
            probe = LinearProbe(standardize=name != PROJECTED, cv=FOLDS, seed=seed).fit(labeled_split(table))
            correct[task][name] = pack_bits(probe.predict(table["test"]) == labels)
    return images, correct


def measure_budgets(setup: desk.Setup, budgets: Sequence[int], repeats: int) -> dict[int, Study]:
    """All repeats of all budgets, two at a time."""
    setup.output.mkdir(parents=True, exist_ok=True)
    write_images(images_folder(setup), setup)
    seeds = [FIRST_SEED + seed for seed in setup.seeds(repeats)]
    points = list(product(sorted(budgets, reverse=True), seeds))  # the longest first
    outcomes = desk.map_two_at_a_time(partial(measure_repeat, setup), points)
    measured = dict(zip(points, outcomes, strict=True))
    return {budget: Study([measured[budget, seed] for seed in seeds]) for budget in budgets}


@dataclass(frozen=True)
class Judgement:
    """A primary claim, judged."""

    claim: Claim
    difference: np.ndarray  # (repeats, N)
    p_value: float  # adjusted for the number of claims

    @property
    def holds(self) -> bool | None:
        """None: not beyond chance."""
        mean, (low, high) = self.difference.mean(), desk.estimate(self.difference).interval
        if self.p_value < 0.05 and (mean > 0 or self.claim.kind == "as good"):
            return True
        contradicts = high < 0 if self.claim.kind == "better" else low > MARGIN or high < -MARGIN
        return False if contradicts else None


def judge_claims(study: Study, claims: Sequence[Claim] = PRIMARY) -> list[Judgement]:
    """Judge claims by two-sided tests of no difference, or two one-sided tests of parity, with Holm's adjustment."""
    differences = [study.difference(claim.task, claim.system, claim.other) for claim in claims]
    p_values = [
        each.p_value() if claim.kind == "better" else each.equivalence_p_value(MARGIN)
        for claim, each in zip(claims, map(desk.estimate, differences), strict=True)
    ]
    adjusted = adjust_p_values(p_values)
    return [Judgement(*each) for each in zip(claims, differences, adjusted, strict=True)]


def format_table(study: Study) -> str:
    """A Markdown table from the worst system to the best on the unseen digits."""
    rows = []
    for system in sorted(study.systems, key=lambda system: study.correct("unseen", system).mean()):
        paired = "" if system == SINGLE else desk.format_difference(study.difference("unseen", system, SINGLE))
        tasks = [desk.format_mean(study.correct(task, system)) for task in TASKS]
        rows.append([system, tasks[0], paired, *tasks[1:]])
    return desk.format_markdown(
        ["", "unseen 5 to 9", f"minus {SINGLE}, paired", "10 labels a class", "seen 0 to 4"], rows
    )
