"""Features lost to a spurious mark, to the styles that were trained on, and to a long tail of classes.

    concat-ensemble reproduce spurious

Networks are pretrained on pictures of scikit-learn's digits, which training places anew on a noisy canvas in every
step, and probed on others of them, each placed once:

- spurious: each class has a mark, a bar at the side of the digit. 95% of the pictures to pretrain on carry that of
  their own class. Heads are fitted with this correlation, and without, and tested where all pictures carry their own
  class's mark, where all carry another's, and where none carries one.
- domains: three of four styles are pretrained on, and another one is held out in each repeat. Heads are fitted and
  tested in it, or fitted in the three and tested in it.
- long tail: six classes with 100, 40, 16, 6, 3 and 1 pictures. Heads are fitted and tested on balanced data of all
  ten classes.

In `domains` each member is trained in full, as in the experiment of the predecessor of the paper, and W2 costs as
much as the four. In the others all systems cost as much to train as CAT1. Pictures to pretrain on, to fit heads on and
to test on are of different digits. Every repeat is measured once and stored in a file.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.studies.controls import pixel_table, untrained_like

SINGLE, WIDE = "cat1", "w2"
NAMES = [str(digit) for digit in range(NUM_CLASSES)]
BATCH = 32
PRETRAINING, PROBE, TEST = 72, 54, 48  # pictures of each class; the rarest has 174
AGREEMENT = 0.95
TAIL = (100, 40, 16, 6, 3, 1)  # pictures of each class to pretrain on
TAIL_GROUPS = {"head": (0, 1), "middle": (2, 3), "tail": (4, 5), "unseen": (6, 7, 8, 9)}  # places in the order
HEADS = ("head fitted without the correlation", "head fitted with it")
DOMAINS = "trained on three styles"
DOMAIN_COLUMNS = (
    "held-out style, head fitted in it",
    "held-out style, head fitted in the others",
    "seen styles, head fitted in them",
)
BALANCED = "classes by their frequency in pretraining"
Top1 = dict[str, dict[str, float]]  # shares of one, by "table: column" and system
Shares = dict[str, dict[str, np.ndarray]]  # (repeats,) by the same


@dataclass(frozen=True)
class Probing:
    """Images to fit a head on, images to test it on, and the columns that this gives in the table `title`."""

    title: str
    data: DatasetDict  # train and test
    columns: dict[str, list[np.ndarray]]  # rows of the test images; of several sets, the lowest accuracy is taken


@dataclass(frozen=True)
class Setting:
    """Pictures to pretrain on, which training places on canvases, and what is probed."""

    pretraining: DatasetDict
    probings: list[Probing]
    channels: int = 1


@dataclass(frozen=True)
class Shift:
    """What is pretrained on, and the networks: for each K of `counts`, K of `steps` / K steps each, and W2."""

    make: Callable[[int, float], Setting]  # from the seed, and the share of the pictures to use
    counts: tuple[int, ...]
    steps: int
    wide_steps: int

    @property
    def largest(self) -> str:
        return f"cat{max(self.counts)}"

    @property
    def projected(self) -> str:
        return f"{self.largest} by PCA"

    @property
    def trained(self) -> tuple[str, ...]:
        return (*(f"cat{count}" for count in self.counts), WIDE)

    @property
    def in_full(self) -> bool:
        """Whether CAT1 and CAT2 are the members of the one ensemble, each of which is trained in full."""
        return len(self.counts) == 1

    @property
    def systems(self) -> tuple[str, ...]:
        """All rows of a table, in order."""
        parts = (SINGLE, "cat2") if self.in_full else ()
        return (*parts, *self.trained, self.projected, *desk.CONTROLS)


def make_spurious(seed: int, size: float = 1.0) -> Setting:
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
    probings = []
    for title, agreement in zip(HEADS, (1 / NUM_CLASSES, AGREEMENT), strict=True):
        train = _scatter_split(mark(probe, agreement), labels[probe], 2 * seed)
        probings.append(Probing(title, _join_splits(train, concatenate_datasets(tests)), columns))
    splits = [to_dataset(mark(rows, AGREEMENT), labels[rows], NAMES) for rows in (pretraining, test)]
    return Setting(_join_splits(*splits), probings)


def make_domains(seed: int, size: float = 1.0) -> Setting:
    """Pictures in all styles but one to pretrain on, and this one to probe: another one for each of four seeds."""
    digits, labels = read_digits()
    rng = np.random.default_rng(seed)
    pretraining, probe, test = draw_parts(labels, _balanced_counts(size), rng)
    held_out = list(STYLES)[seed % len(STYLES)]
    seen = [style for style in STYLES if style != held_out]

    def draw_seen(rows: np.ndarray) -> np.ndarray:
        """(3, N, 16, 16, 3): each row in each of the seen styles."""
        return np.stack([draw_in_style(digits[rows], style, rng) for style in seen])

    def draw_mixed(rows: np.ndarray) -> np.ndarray:
        """(N, 16, 16, 3): each row in one of the seen styles."""
        return draw_seen(rows)[rng.integers(len(seen), size=len(rows)), np.arange(len(rows))]

    own_test = _scatter_split(draw_in_style(digits[test], held_out, rng), labels[test], 2 * seed + 1)
    seen_test = _scatter_split(draw_mixed(test), labels[test], 2 * seed + 1)
    seen_probe = _scatter_split(draw_mixed(probe), labels[probe], 2 * seed)
    own_probe = _scatter_split(draw_in_style(digits[probe], held_out, rng), labels[probe], 2 * seed)
    data = ((own_probe, own_test), (seen_probe, own_test), (seen_probe, seen_test))
    probings = [
        Probing(DOMAINS, _join_splits(*splits), {column: [np.arange(len(test))]})
        for column, splits in zip(DOMAIN_COLUMNS, data, strict=True)
    ]
    pictures = np.concatenate(draw_seen(pretraining))
    train = to_dataset(pictures, np.tile(labels[pretraining], len(seen)), NAMES)
    return Setting(_join_splits(train, to_dataset(draw_mixed(test), labels[test], NAMES)), probings, channels=3)


def make_long_tail(seed: int, size: float = 1.0) -> Setting:
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
        [Probing(BALANCED, _join_splits(train, own_test), columns)],
    )


def _join_splits(train: Dataset, test: Dataset) -> DatasetDict:
    return DatasetDict({"train": train, "test": test})


def _scatter_split(pictures: np.ndarray, labels: np.ndarray, seed: int) -> Dataset:
    return to_dataset(scatter_pictures(pictures, seed), labels, NAMES)


def _balanced_counts(size: float) -> list[list[int]]:
    return [[max(2, round(size * count))] * NUM_CLASSES for count in (PRETRAINING, PROBE, TEST)]


EXPERIMENTS = {
    "spurious": Shift(make_spurious, (1, 2, 4, 8), 2_400, wide_steps=600),
    "domains": Shift(make_domains, (4,), 4 * 1_200, wide_steps=1_200),
    "long-tail": Shift(make_long_tail, (1, 4, 8), 2_400, wide_steps=600),
}


def measure_repeat(name: str, setup: desk.Setup, seed: int) -> Top1:
    """Top-1 of all systems in one repeat, from its file if it has been measured before."""
    shift = EXPERIMENTS[name]
    folder = setup.output / "members" / f"seed-{seed}"

    def measure() -> Top1:
        setting = shift.make(seed, 0.1 if setup.smoke else 1.0)
        train(shift, setting, setup, folder, name, seed)
        return probe(shift, setting, folder, seed)

    settings = {"asked": [name, list(shift.counts), shift.steps, shift.wide_steps, seed]}
    top1 = desk.measure_once(setup.output / f"seed-{seed}.json", settings, measure)
    shutil.rmtree(folder, ignore_errors=True)  # not earlier: a kill before this loses no training
    return top1


def train(shift: Shift, setting: Setting, setup: desk.Setup, folder: Path, name: str, seed: int) -> None:
    """Train the networks of a shift; W2 has four times the FLOPs in a step."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split_name, split in setting.pretraining.items():
        split.to_parquet(folder / "data" / f"{split_name}.parquet")
    options = {
        "dataset": f"parquet:{folder / 'data'}",
        "classes": None,
        "input_size": [setting.channels, CANVAS, CANVAS],
        "model_args": {"in_chans": setting.channels, "channels": [8, 16, 32, 64], "stem_width": 8},
        "batch_size": BATCH,
        "wide_steps": shift.wide_steps,
    }
    setup.train(desk.plan_members(folder, f"train on {name}", shift.counts, shift.steps, **options), seed)


def probe(shift: Shift, setting: Setting, folder: Path, seed: int) -> Top1:
    """Top-1 of all systems by "table: column"."""
    models = {system: assemble(folder / system) for system in shift.trained}
    models["untrained members"] = untrained_like(models[shift.largest], seed)
    top1: Top1 = {}
    for probing in setting.probings:
        tables = collect_tables(shift, models, probing.data, folder / "features")
        tables["raw pixels"] = [pixel_table(probing.data, "L" if setting.channels == 1 else "RGB", quiet=True)]
        for system in shift.systems:
            standardize = system != shift.projected
            correct = [predict_correctly(table, seed, standardize=standardize) for table in tables[system]]
            for column, sets in probing.columns.items():
                shares = [min(each[rows].mean() for rows in sets) for each in correct]
                top1.setdefault(f"{probing.title}: {column}", {})[system] = float(np.mean(shares))
    return top1


def collect_tables(
    shift: Shift, models: dict[str, ConcatEnsembleModel], data: DatasetDict, store: Path
) -> dict[str, list[FeatureTable]]:
    """The features of each system; of several tables, the mean of their accuracies is taken."""
    tables = {name: [extract_features(model, data, store=store, quiet=True)] for name, model in models.items()}
    (largest,) = tables[shift.largest]
    if shift.in_full:
        tables[SINGLE] = [largest.members([number]) for number in range(len(largest.feature_dims))]
        tables["cat2"] = [largest.members([0, 1])]
    tables[shift.projected] = [principal_projection(largest, max(largest.feature_dims))(largest)]
    return tables


def predict_correctly(table: FeatureTable, seed: int, *, standardize: bool) -> np.ndarray:
    """(N,) whether each test image is classified correctly; the L2 strength is chosen in five folds."""
    head = LinearProbe(cv=5, standardize=standardize, seed=seed).fit(table["train"])
    return head.predict(table["test"]) == table["test"].labels


def measure_shift(name: str, setup: desk.Setup, repeats: int) -> Shares:
    """Measure all repeats of one of `EXPERIMENTS`, two at a time, and write the tables to the output folder."""
    setup.output.mkdir(parents=True, exist_ok=True)
    measured = desk.map_two_at_a_time(partial(measure_repeat, name, setup), setup.seeds(repeats))
    shares = {
        column: {system: np.array([top1[column][system] for top1 in measured]) for system in systems}
        for column, systems in measured[0].items()
    }
    (setup.output / "table.md").write_text(format_tables(shares))
    return shares


def format_tables(shares: Shares) -> str:
    """A Markdown table for each title, with the accuracy of each system and its paired difference to CAT1."""
    tables = []
    for title in dict.fromkeys(column.rpartition(": ")[0] for column in shares):
        columns = {key.rpartition(": ")[2]: each for key, each in shares.items() if key.startswith(f"{title}: ")}
        systems = list(next(iter(columns.values())))
        rows = [[system, *(desk.format_mean(each[system]) for each in columns.values())] for system in systems]
        for system in systems[1 : -len(desk.CONTROLS)]:
            gains = [desk.format_difference(each[system] - each[SINGLE]) for each in columns.values()]
            rows.append([f"{system} minus {SINGLE}, paired", *gains])
        tables.append(desk.format_markdown([title, *columns], rows))
    return "\n".join(tables)
