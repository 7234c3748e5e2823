"""Whether what `select` keeps loses at most the margin on the test images, against the rule of version 0.1.0.

    .venv/bin/python tests/benchmarks/select_margin.py ENSEMBLE ... --dataset DATASET ... --images 500 2000 --draws 5

Features of all images are extracted once for each ensemble and dataset. Each draw takes some training and validation
images (and with --members some members), selects with them as `select` does, and fits linear probes of all members and
of the chosen ones on them. What the chosen ones lose is measured on all test images. --redundant adds members that can
be left out, made of features of the first: a copy with noise, half of its features, and noise alone.

The last lines are, of all draws and of those that leave a member out, how many lose at most the margin, and how many
95% intervals hold the loss on the test images of ridge probes of every subset, fitted on all drawn images: each
interval alone, and all of a draw at once. (A test loss has an error of its own, which is added to the interval's.)
"""

import argparse
import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.preprocessing import StandardScaler

from concat_ensemble import LinearProbe, extract_features, load_data
from concat_ensemble.data.options import DatasetOptions
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.probes.intervals import wilson_interval
from concat_ensemble.studies.cost import member_costs
from concat_ensemble.studies.ensembles import load_ensemble
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import L2_STRENGTHS, select_members
from concat_ensemble.studies.selection_results import Selection, format_members

MARGIN_BEFORE = 0.005  # of version 0.1.0: a loss below it that may be chance did not count


class Draw(NamedTuple):
    """Some images and members to select with."""

    name: str
    seed: int
    table: FeatureTable
    costs: list[Cost]


class Outcome(NamedTuple):
    """What was chosen, by the rule of 0.1.0 and by today's, and what it loses on the test images, as shares."""

    members_before: tuple[int, ...]
    loss_before: float
    members: tuple[int, ...]
    loss: float
    saved: float  # share of all members' FLOPs
    inside: np.ndarray  # (subsets,) whether the intervals of ridge probes hold the loss on the test images


def take(table: FeatureTable, number: int, seed: int) -> FeatureTable:
    """`number` training and validation images, a fifth of them for validation."""
    known = TableSplit.concatenate([table["train"], table["validation"]])
    drawn = np.random.default_rng(seed).permutation(len(known))[:number]
    parts = {"validation": np.sort(drawn[: number // 5]), "train": np.sort(drawn[number // 5 :])}
    blocks = {name: [block[numbers] for block in known.blocks] for name, numbers in parts.items()}
    labels = {name: known.labels[numbers] for name, numbers in parts.items()}
    blocks["test"], labels["test"] = [block[:] for block in table.blocks["test"]], table.labels["test"]
    return FeatureTable(blocks, labels, table.class_names)


def add_redundant(draw: Draw) -> Draw:
    """Three more members as large as the first: it with noise, half of its features, and noise alone."""
    rng, blocks = np.random.default_rng(draw.seed), {}
    size = draw.table.feature_dims[0]
    deviation, half = draw.table.blocks["train"][0][:].std(axis=0), rng.permutation(size)[: size // 2]
    for split in draw.table:
        own = [block[:] for block in draw.table.blocks[split]]
        noise = deviation * rng.standard_normal((2, len(own[0]), size), dtype=np.float32)
        blocks[split] = [*own, own[0] + 0.3 * noise[0], own[0][:, half], noise[1]]
    table = dataclasses.replace(draw.table, blocks=blocks, keys=None)
    return draw._replace(table=table, costs=[*draw.costs, *[draw.costs[0]] * 3])


def score_on(train: TableSplit, test: TableSplit):
    """A function of members: (l2_strengths, N) which rows of `test` the ridge probes of `train` predict correctly."""
    scaler = StandardScaler().fit(train.features)
    X, Z = (scaler.transform(split.features.astype(np.float64)) for split in (train, test))
    ends = np.cumsum([0, *(block.shape[1] for block in train.blocks)])
    classes, y = np.unique(train.labels, return_inverse=True)
    shares, number = np.bincount(y) / len(y), len(y)
    targets = np.eye(len(classes))[y] - shares

    def correct(members: tuple[int, ...]) -> np.ndarray:
        columns = np.concatenate([np.arange(ends[k], ends[k + 1]) for k in members])
        A, B = X[:, columns], Z[:, columns]
        wide = number < len(columns)
        product, right, left = (A @ A.T, targets, B @ A.T) if wide else (A.T @ A, A.T @ targets, B)
        found = []
        for l2_strength in L2_STRENGTHS:
            shifted = product + number * l2_strength * np.eye(len(product))
            scores = left @ cho_solve(cho_factor(shifted, lower=True), right) + shares
            found.append(classes[scores.argmax(axis=1)] == test.labels)
        return np.stack(found)

    return correct


def choose_before(draw: Draw) -> tuple[int, ...]:
    """The rule of 0.1.0: on the validation images alone, the cheapest subset within a standard error of the best one,
    or less than half a point below it and not beyond chance."""
    subsets = _subsets(len(draw.costs))
    score = score_on(draw.table["train"], draw.table["validation"])
    by_strength = {members: score(members) for members in subsets}
    correct = {members: found[found.mean(axis=1).argmax()].astype(float) for members, found in by_strength.items()}
    best = max(correct.values(), key=np.mean)

    def is_as_good(members: tuple[int, ...]) -> bool:
        loss = best - correct[members]
        error = loss.std() / len(loss) ** 0.5
        return loss.mean() <= error or (loss.mean() < MARGIN_BEFORE and loss.mean() <= 1.96 * error)

    as_good = [members for members in subsets if is_as_good(members)]
    return min(as_good, key=lambda members: (_gflops(draw, members), -correct[members].mean()))


def run(draw: Draw, margin: float) -> Outcome:
    count = len(draw.costs)
    selection = select_members(draw.table, draw.costs, [str(k) for k in range(count)], margin=margin, seed=draw.seed)
    before, everyone, correct = choose_before(draw), tuple(range(count)), {}
    for members in {before, selection.best, everyone}:
        table = draw.table.members(members)
        probe = LinearProbe(seed=draw.seed).fit(table["train"], validation=table["validation"])
        correct[members] = probe.predict(table["test"]) == draw.table.labels["test"]
    losses = [float(correct[everyone].mean() - correct[members].mean()) for members in (before, selection.best)]
    saved = 1 - _gflops(draw, selection.best) / _gflops(draw, everyone)
    return Outcome(before, losses[0], selection.best, losses[1], saved, are_inside(draw, selection))


def are_inside(draw: Draw, selection: Selection) -> np.ndarray:
    """Whether the intervals of all subsets but the whole hold the losses of ridge probes on the test images."""
    known = TableSplit.concatenate([draw.table["train"], draw.table["validation"]])
    score, correct = score_on(known, draw.table["test"]), {}
    for subset in selection.subsets:
        strength = L2_STRENGTHS.index(subset.l2_strength)
        correct[subset.members] = score(subset.members)[strength].astype(float)
    inside, everyone = [], correct[tuple(range(len(draw.costs)))]
    for subset in selection.subsets:
        if subset.loss_interval and len(subset.members) < len(draw.costs):
            loss = everyone - correct[subset.members]
            low, high = subset.loss_interval
            half = (high - low) / 2 * (1 + len(known) / len(loss)) ** 0.5  # with the error of the test images
            inside.append(abs(loss.mean() - (low + high) / 2) <= half)
    return np.array(inside)


def _subsets(count: int) -> list[tuple[int, ...]]:
    return [tuple(k for k in range(count) if number >> k & 1) for number in range(1, 2**count)]


def _gflops(draw: Draw, members: tuple[int, ...]) -> float:
    return sum(draw.costs[k].gflops for k in members)


def make_draws(options: argparse.Namespace):
    """All draws, one ensemble and dataset after the other."""
    for ensemble in options.ensembles:
        model = load_ensemble(ensemble, seed=0)
        costs = member_costs(model)
        for dataset in options.dataset:
            classes = DatasetOptions(classes=options.classes).record["classes"]
            data = load_data(dataset, classes=classes, limit=options.limit)
            table = extract_features(model, data)
            n_known = len(table["train"]) + len(table["validation"])
            for number in options.images or [n_known]:
                for seed in range(options.draws):
                    chosen = np.random.default_rng([number, seed]).permutation(len(costs))[: options.members]
                    chosen = sorted(chosen.tolist())
                    few = take(table.members(chosen), min(number, n_known), seed)
                    name = f"{ensemble.rpartition('/')[2]}, {dataset.rpartition('/')[2]}"
                    draw = Draw(name, seed, few, [costs[k] for k in chosen])
                    yield add_redundant(draw) if options.redundant else draw


def count_within(name: str, losses: np.ndarray, margin: float) -> str:
    if not len(losses):
        return f"{name}: none"
    within = int((losses <= margin).sum())
    low, high = wilson_interval(within / len(losses), len(losses))
    return f"{name}: {within} of {len(losses)} lose at most the margin [{low:.0%}, {high:.0%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensembles", nargs="*", default=["random:resnet10t"], help="folders, Hub ids or members")
    parser.add_argument("--dataset", nargs="+", default=["digits"])
    parser.add_argument("--classes", help="as in `select`")
    parser.add_argument("--limit", type=int, help="images of each split to extract")
    parser.add_argument("--images", type=int, nargs="+", help="training and validation images of a draw; all of them")
    parser.add_argument("--members", type=int, help="members of a draw; all of them")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--redundant", action="store_true")
    parser.add_argument("--margin", type=float, default=1.0, help="in points")
    options = parser.parse_args()
    margin, outcomes = options.margin / 100, []
    print("| draw | images | members | 0.1.0 chose | lost | now chosen | lost | FLOPs saved |\n" + "|---" * 8 + "|")
    for draw in make_draws(options):
        outcome = run(draw, margin)
        outcomes.append(outcome)
        images = len(draw.table["train"]) + len(draw.table["validation"])
        before, now = (format_members(members) for members in (outcome.members_before, outcome.members))
        losses = f"{100 * outcome.loss_before:.1f} | {now} | {100 * outcome.loss:.1f} | {outcome.saved:.0%}"
        print(f"| {draw.name}, {draw.seed} | {images:,} | {len(draw.costs)} | {before} | {losses} |", flush=True)
    before, now = (np.array([getattr(o, name) for o in outcomes]) for name in ("loss_before", "loss"))
    saved = np.array([o.saved for o in outcomes])
    print("\n" + count_within("rule of 0.1.0", before, margin))
    print(count_within("now", now, margin) + f"; FLOPs saved: {saved.mean():.0%}")
    print(count_within("now, draws that leave a member out", now[saved > 0], margin))
    inside = [o.inside for o in outcomes]
    alone, at_once = np.concatenate(inside).mean(), np.mean([part.all() for part in inside])
    print(f"95% intervals that hold the loss on the test images: {alone:.1%}, all of a draw at once {at_once:.1%}")


if __name__ == "__main__":
    main()
