"""Features lost to a spurious mark, to the styles that were trained on, and to a long tail of classes.

    concat-ensemble reproduce spurious

Networks are pretrained on pictures of scikit-learn's digits, which training places anew on a noisy canvas in every
step, and probed on others of them, each placed once:

- spurious: each class has a mark, a bar at the side of the digit. 95% of the pictures to pretrain on carry that of
  their own class. Heads are fitted with this correlation, and without, and tested where all pictures carry their own
  class's mark, where all carry another's, and where none carries one.
- domains: three of four styles are pretrained on. Heads are fitted and tested in the fourth, or fitted in the three
  and tested in the fourth.
- long tail: six classes with 100, 40, 16, 6, 3 and 1 pictures. Heads are fitted and tested on balanced data of all
  ten classes.

All systems cost as much to train as CAT1. Pictures to pretrain on, to fit heads on and to test on are of different
digits. Every repeat is measured once and stored in a file.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from concat_ensemble.experiments import desk
from concat_ensemble.experiments.pictures import (
    CANVAS,
    NO_MARK,
    NUM_CLASSES,
    STYLES,
    add_marks,
    draw_in_style,
    draw_marks,
    draw_parts,
    read_digits,
    scatter_pictures,
    to_dataset,
)
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.members.assemble import assemble
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import pixel_table, untrained_like

COUNTS = (1, 2, 4, 8)
SINGLE, WIDE, LARGEST = "cat1", "w2", "cat8"
PROJECTED = f"{LARGEST} by PCA"
TRAINED = (SINGLE, "cat2", "cat4", LARGEST, WIDE)
SYSTEMS = (*TRAINED, PROJECTED, *desk.CONTROLS)
NAMES = [str(digit) for digit in range(NUM_CLASSES)]
PRETRAINING, PROBE, TEST = 72, 54, 48  # pictures of each class; the rarest has 174
AGREEMENT = 0.95
TAIL = (100, 40, 16, 6, 3, 1)  # pictures of each class to pretrain on
TAIL_GROUPS = {"head": (0, 1), "middle": (2, 3), "tail": (4, 5), "unseen": (6, 7, 8, 9)}  # places in the order
HEADS = ("head fitted without the correlation", "head fitted with it")
DOMAIN_HEADS = (
    "held-out style, head fitted in it",
    "held-out style, head fitted in the others",
    "seen styles, head fitted in them",
)
BALANCED = "classes by their frequency in pretraining"
Top1 = dict[str, dict[str, float]]  # shares of one, by "table: column" and system
Shares = dict[str, dict[str, np.ndarray]]  # (repeats,) by the same


@dataclass(frozen=True)
class Probing:
    """Images to fit a head on, images to test it on, and the columns of the table that this gives."""

    data: DatasetDict  # train and test
    columns: dict[str, list[np.ndarray]]  # rows of the test images; of several sets, the lowest accuracy is taken


@dataclass(frozen=True)
class Setting:
    """Pictures to pretrain on, which training places on canvases, and what is probed, by the title of its table."""

    pretraining: DatasetDict
    probings: dict[str, Probing]
    channels: int = 1


@dataclass(frozen=True)
class Experiment:
    """What is pretrained on in how many steps; with several parts, each has networks of its own."""

    make: Callable[[str, int, float], Setting]  # from the part, the seed, and the share of the pictures to use
    steps: int
    parts: tuple[str, ...] = ("",)


def make_spurious(part: str, seed: int, size: float = 1.0) -> Setting:
    """Marks that agree with the class in 95% of the pictures to pretrain on."""
    digits, labels = read_digits()
    rng = np.random.default_rng(seed)
    pretraining, probe, test = draw_parts(labels, _balanced_counts(size), rng)

    def mark(rows: np.ndarray, agreement: float) -> np.ndarray:
        return add_marks(digits[rows], draw_marks(labels[rows], agreement, rng))

    unmarked = add_marks(digits[test], np.full(len(test), NO_MARK))
    # The same places and noise in all three, which differ in the mark alone.
    tests = [_scatter_split(each, labels[test], 2 * seed + 1) for each in (mark(test, 1), mark(test, 0), unmarked)]
    agrees, reversed_, absent = np.arange(3 * len(test)).reshape(3, -1)
    groups = [rows[labels[test] == c] for rows in (agrees, reversed_) for c in range(NUM_CLASSES)]
    columns = {"worst group": groups, "mark agrees": [agrees], "mark reversed": [reversed_], "no mark": [absent]}
    probings = {}
    for title, agreement in zip(HEADS, (1 / NUM_CLASSES, AGREEMENT), strict=True):
        train = _scatter_split(mark(probe, agreement), labels[probe], 2 * seed)
        probings[title] = Probing(_join_splits(train, concatenate_datasets(tests)), columns)
    splits = [to_dataset(mark(rows, AGREEMENT), labels[rows], NAMES) for rows in (pretraining, test)]
    return Setting(_join_splits(*splits), probings)


def make_domains(part: str, seed: int, size: float = 1.0) -> Setting:
    """Pictures in all styles but the one named by `part` to pretrain on, and this one to probe."""
    digits, labels = read_digits()
    rng = np.random.default_rng(seed)
    pretraining, probe, test = draw_parts(labels, _balanced_counts(size), rng)
    seen = [style for style in STYLES if style != part]

    def draw_seen(rows: np.ndarray) -> np.ndarray:
        """(3, N, 16, 16, 3): each row in each of the seen styles."""
        return np.stack([draw_in_style(digits[rows], style, rng) for style in seen])

    def draw_mixed(rows: np.ndarray) -> np.ndarray:
        """(N, 16, 16, 3): each row in one of the seen styles."""
        return draw_seen(rows)[rng.integers(len(seen), size=len(rows)), np.arange(len(rows))]

    own_test = _scatter_split(draw_in_style(digits[test], part, rng), labels[test], 2 * seed + 1)
    seen_test = _scatter_split(draw_mixed(test), labels[test], 2 * seed + 1)
    seen_probe = _scatter_split(draw_mixed(probe), labels[probe], 2 * seed)
    own_probe = _scatter_split(draw_in_style(digits[probe], part, rng), labels[probe], 2 * seed)
    data = ((own_probe, own_test), (seen_probe, own_test), (seen_probe, seen_test))
    columns = {part: [np.arange(len(test))]}
    probings = {
        title: Probing(_join_splits(train, test), columns)
        for title, (train, test) in zip(DOMAIN_HEADS, data, strict=True)
    }
    pictures = np.concatenate(draw_seen(pretraining))
    train = to_dataset(pictures, np.tile(labels[pretraining], len(seen)), NAMES)
    return Setting(_join_splits(train, to_dataset(draw_mixed(test), labels[test], NAMES)), probings, channels=3)


def make_long_tail(part: str, seed: int, size: float = 1.0) -> Setting:
    """Six random classes with 100 to 1 pictures to pretrain on, and balanced data of all ten classes to probe."""
    digits, labels = read_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(NUM_CLASSES)  # which class is frequent is chance
    frequent_first = order[: len(TAIL)]
    counts = np.zeros(NUM_CLASSES, int)
    counts[frequent_first] = [max(1, round(size * count)) for count in TAIL]
    test, probe, pretraining = draw_parts(labels, [[44] * NUM_CLASSES, [30] * NUM_CLASSES, counts.tolist()], rng)
    columns = {
        name: [np.flatnonzero(np.isin(labels[test], order[list(places)]))] for name, places in TAIL_GROUPS.items()
    }
    train, own_test = (
        _scatter_split(digits[rows], labels[rows], 2 * seed + offset) for offset, rows in enumerate((probe, test))
    )
    numbers = np.argsort(order)  # the number of a class in pretraining

    def pretraining_split(rows: np.ndarray) -> Dataset:
        return to_dataset(digits[rows], numbers[labels[rows]], [NAMES[c] for c in frequent_first])

    seen_test = test[np.isin(labels[test], frequent_first)]
    return Setting(
        _join_splits(pretraining_split(pretraining), pretraining_split(seen_test)),
        {BALANCED: Probing(_join_splits(train, own_test), columns)},
    )


def _join_splits(train: Dataset, test: Dataset) -> DatasetDict:
    return DatasetDict({"train": train, "test": test})


def _scatter_split(pictures: np.ndarray, labels: np.ndarray, seed: int) -> Dataset:
    return to_dataset(scatter_pictures(pictures, seed), labels, NAMES)


def _balanced_counts(size: float) -> list[list[int]]:
    return [[max(2, round(size * count))] * NUM_CLASSES for count in (PRETRAINING, PROBE, TEST)]


EXPERIMENTS = {
    "spurious": Experiment(make_spurious, 1_600),
    "domains": Experiment(make_domains, 600, tuple(STYLES)),
    "long-tail": Experiment(make_long_tail, 1_600),
}


def measure_point(name: str, setup: desk.Setup, point: tuple[int, str]) -> Top1:
    """Top-1 of all systems in one repeat (the seed) of a part, from its file if it has been measured before."""
    (seed, part), experiment = point, EXPERIMENTS[name]
    stem = "-".join(filter(None, [f"seed-{seed}", part]))
    folder = setup.output / "members" / stem

    def measure() -> Top1:
        setting = experiment.make(part, seed, 0.1 if setup.smoke else 1.0)
        train(setting, setup, folder, f"{name} {part}".strip(), experiment.steps, seed)
        return probe(setting, folder, seed)

    settings = {"asked": [name, part, experiment.steps, seed]}
    top1 = desk.measure_once(setup.output / f"{stem}.json", settings, measure)
    shutil.rmtree(folder, ignore_errors=True)  # not earlier: a kill before this loses no training
    return top1


def train(setting: Setting, setup: desk.Setup, folder: Path, label: str, steps: int, seed: int) -> None:
    """CAT1, CAT2, CAT4 and CAT8 in as many steps each, and W2 in a quarter, at four times the FLOPs."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, split in setting.pretraining.items():
        split.to_parquet(folder / "data" / f"{name}.parquet")
    options = {
        "dataset": f"parquet:{folder / 'data'}",
        "classes": None,
        "input_size": [setting.channels, CANVAS, CANVAS],
        "model_args": {"in_chans": setting.channels, "channels": [8, 16, 32, 64], "stem_width": 8},
        "members": list(COUNTS),
        "total_steps": steps,
        "baseline_extra": 0,
        "wide_steps": steps // 4,
        "snapshots": 0,
    }
    setup.train(desk.Training("pretraining", "timecat", folder, f"train on {label}", options), seed)


def probe(setting: Setting, folder: Path, seed: int) -> Top1:
    """Top-1 of all systems by "table: column"."""
    models = {system: assemble(folder / system) for system in TRAINED}
    models["untrained members"] = untrained_like(models[LARGEST], seed)
    top1: Top1 = {}
    for title, probing in setting.probings.items():
        store = folder / "features"
        tables = {
            name: extract_features(model, probing.data, store=store, quiet=True) for name, model in models.items()
        }
        largest = tables[LARGEST]
        tables[PROJECTED] = principal_projection(largest, max(largest.feature_dims))(largest)
        tables["raw pixels"] = pixel_table(probing.data, "L" if setting.channels == 1 else "RGB", quiet=True)
        for system in SYSTEMS:
            correct = predict_correctly(tables[system], seed, standardize=system != PROJECTED)
            for column, sets in probing.columns.items():
                share = min(float(correct[rows].mean()) for rows in sets)
                top1.setdefault(f"{title}: {column}", {})[system] = share
    return top1


def predict_correctly(table: FeatureTable, seed: int, *, standardize: bool) -> np.ndarray:
    """(N,) whether each test image is classified correctly; the L2 strength is chosen in five folds."""
    head = LinearProbe(cv=5, standardize=standardize, seed=seed).fit(table["train"])
    return head.predict(table["test"]) == table["test"].labels


def measure_shift(name: str, setup: desk.Setup, repeats: int) -> Shares:
    """Measure all repeats of one of `EXPERIMENTS`, two at a time, and write the tables to the output folder."""
    setup.output.mkdir(parents=True, exist_ok=True)
    parts = EXPERIMENTS[name].parts
    points = list(product(setup.seeds(repeats), parts))
    measured = desk.map_two_at_a_time(partial(measure_point, name, setup), points)
    by_seed: dict[int, Top1] = {seed: {} for seed in setup.seeds(repeats)}
    for (seed, _), top1 in zip(points, measured, strict=True):
        by_seed[seed] |= top1
    by_repeat = list(by_seed.values())
    shares = {
        column: {system: np.array([top1[column][system] for top1 in by_repeat]) for system in SYSTEMS}
        for column in by_repeat[0]
    }
    if len(parts) > 1:
        shares |= average_parts(shares)
    (setup.output / "table.md").write_text(format_tables(shares))
    return shares


def average_parts(shares: Shares) -> Shares:
    """A column "mean" for each table."""
    means = {}
    for title in list_tables(shares):
        columns = [content for column, content in shares.items() if column.startswith(f"{title}: ")]
        means[f"{title}: mean"] = {s: np.mean([content[s] for content in columns], axis=0) for s in SYSTEMS}
    return means


def list_tables(shares: Shares) -> list[str]:
    return list(dict.fromkeys(column.rpartition(": ")[0] for column in shares))


def format_tables(shares: Shares) -> str:
    """A Markdown table for each title, with the accuracy of each system and its paired difference to CAT1."""
    tables = []
    for title in list_tables(shares):
        columns = {key.rpartition(": ")[2]: each for key, each in shares.items() if key.startswith(f"{title}: ")}
        rows = [[system, *(desk.format_mean(each[system]) for each in columns.values())] for system in SYSTEMS]
        for system in SYSTEMS[1 : -len(desk.CONTROLS)]:
            gains = [desk.format_difference(each[system] - each[SINGLE]) for each in columns.values()]
            rows.append([f"{system} minus {SINGLE}, paired", *gains])
        tables.append(desk.format_markdown([title, *columns], rows))
    return "\n".join(tables)
