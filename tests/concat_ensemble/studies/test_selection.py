"""Subsets of members against scikit-learn's probes of each subset, on members whose relations are known."""

import itertools
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from concat_ensemble import assemble
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.studies.cost import count_flops, member_costs
from concat_ensemble.studies.paired_losses import mean_interval
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import L2_STRENGTHS, select_members
from concat_ensemble.studies.selection_results import Contribution, Selection
from concat_ensemble.studies.subset_scores import GramScorer, KernelScorer, join_copies, make_folds, make_scorer


def make_table(seed=0, classes=9, noise=0.35, **numbers):
    """Four members of eight features: two that each distinguish three groups of classes, a copy of one, and noise."""
    rng = np.random.default_rng(seed)
    blocks, labels = {}, {}
    for split, number in numbers.items():
        y = rng.integers(0, classes, number)
        first, second = np.eye(3)[y // 3], np.eye(3)[y % 3]
        rows = [np.hstack([x, np.zeros((number, 5))]) + noise * rng.normal(size=(number, 8)) for x in (first, second)]
        rows += [rows[0] @ np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0], rng.normal(size=(number, 8))]
        blocks[split], labels[split] = [block.astype(np.float32) for block in rows], y
    return FeatureTable(blocks, labels, [str(k) for k in range(classes)])


def pool(table):
    return TableSplit.concatenate([table["train"], table["validation"]])


@pytest.fixture(scope="module")
def table():
    return make_table(train=600, validation=500, test=10)


COSTS = [Cost(1.0, 10.0), Cost(2.0, 5.0), Cost(0.5, 20.0), Cost(4.0, 1.0)]
NAMES = ["thirds", "rests", "copy", "noise"]


@pytest.fixture(scope="module")
def selection(table):
    return select_members(table, COSTS, NAMES)


def ridge_scores(rows, members, folds, l2_strength):
    """(N, C) out-of-fold scores of scikit-learn's Ridge, on features that are standardized by all rows."""
    X = StandardScaler().fit_transform(np.hstack([rows.blocks[k][:] for k in members]).astype(np.float64))
    targets = np.eye(rows.labels.max() + 1)[rows.labels]
    scores = np.empty_like(targets)
    for train, held_out in folds:
        probe = Ridge(alpha=len(train) * l2_strength).fit(X[train], targets[train])
        scores[held_out] = probe.predict(X[held_out])
    return scores


@pytest.mark.parametrize(("number", "kind"), [(1100, GramScorer), (30, KernelScorer)])
def test_every_subset_has_the_scores_of_scikit_learns_ridge_on_the_same_folds(number, kind, table):
    rows = pool(table).select(np.arange(number))
    folds = make_folds(rows, 5, seed=1)
    scorer = make_scorer(rows, folds, L2_STRENGTHS)
    assert type(scorer) is kind
    for members in [(0,), (3,), (1, 2), (0, 1, 3), (0, 1, 2, 3)]:
        scores, correct = scorer.scores(members), scorer.correct(members)
        for index, l2_strength in enumerate(L2_STRENGTHS):
            expected = ridge_scores(rows, members, folds, l2_strength)
            assert scores[index] == pytest.approx(expected, abs=2e-5)
            apart = np.sort(expected)[:, -1] - np.sort(expected)[:, -2] > 1e-4
            assert (correct[index] == (expected.argmax(1) == rows.labels))[apart].all()


def test_features_far_from_zero_and_constant_ones_are_scored_as_by_scikit_learn():
    """Sums over folds must not cancel; a feature that is constant in all but one fold has a scale of its own."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 4
    X = np.eye(4)[y] @ rng.normal(size=(4, 6)) + rng.normal(size=(200, 6))
    X[:, 0] = 1e3 + 0.5 * X[:, 0]
    X[:, 1] = 7.0
    X[:, 2] = 0.0
    rows = TableSplit([X[:, :3], X[:, 3:]], y)
    folds = make_folds(rows, 5)
    X[folds[0].held_out, 2] = rng.normal(size=len(folds[0].held_out))
    scores = make_scorer(rows, folds, [0.1]).scores((0, 1))[0]
    assert scores == pytest.approx(ridge_scores(rows, (0, 1), folds, 0.1), abs=1e-7)


def test_each_fold_has_the_strength_that_is_best_on_the_others(table):
    few = make_table(train=60, validation=40, noise=1.5)
    selection, rows = select_members(few, COSTS, NAMES, folds=4), pool(few)
    folds = make_folds(rows, 4, seed=0)
    for subset in selection.subsets:
        correct = make_scorer(rows, folds, L2_STRENGTHS).correct(subset.members)
        hits = 0
        for fold in folds:
            best = correct[:, fold.train].mean(axis=1).argmax()
            hits += correct[best, fold.held_out].sum()
        assert subset.top1 == pytest.approx(hits / 100)
        assert subset.cost == sum((COSTS[k] for k in subset.members), Cost(0.0, 0.0))


def test_folds_hold_every_image_once_and_never_read_the_test(selection, table):
    assert selection.n_held_out == 1100 and selection.n_train == 880 and len(selection.subsets) == 15
    other = FeatureTable(table.blocks | {"test": []}, table.labels, table.class_names)
    assert select_members(other, COSTS, NAMES).subsets == selection.subsets


def test_advises_on_each_member(selection):
    thirds, rests, copy, noise = selection.contributions
    advice = [part.advice for part in selection.contributions]
    assert advice == ["drop", "keep", "keep", "drop"], "one of the copies is needed, not both"
    assert rests.gain > 0.3 and copy.gain > 0.3
    assert thirds.gain == noise.gain == selection[selection.best].loss, "what is lost by dropping them together"
    assert thirds.gain_interval[1] < 0.01
    assert thirds.shapley == pytest.approx(copy.shapley, abs=0.02) and thirds.shapley > 10 * abs(noise.shapley)
    assert selection.best == (1, 2), "the cheaper copy, and the member with what it lacks"
    assert [member for member, *_ in selection.greedy_order][:2] in ([0, 1], [2, 1], [1, 0], [1, 2])
    assert selection.verdict.startswith("Choose 1+2, at 2.5 of 7.5 GFLOPs: it loses ")
    assert "below the margin of 1 point with 95% confidence" in selection.verdict
    assert "Drop member 3 (noise): the loss without 0+3 is" in selection.verdict
    assert "Keep member 1 (rests): without it too the loss is" in selection.verdict
    assert selection.outlook == "Stop at K = 2: 1+2."
    assert "Members 0 and 2 are the most alike (CKA 0.9" in selection.verdict


@pytest.mark.parametrize(
    ("chosen", "low", "high", "advice"),
    [
        (False, -0.002, 0.009, "drop"),
        (False, 0.001, 0.009, "drop"),  # a loss below the margin is what was asked for
        (False, -0.002, 0.01, "cannot tell"),
        (True, -0.03, 0.03, "cannot tell"),
        (True, -0.002, 0.009, "cannot tell"),
        (True, 0.001, 0.03, "keep"),
        (False, 0.001, 0.03, "keep"),  # left out by a budget
    ],
)
def test_advice_has_three_values(chosen, low, high, advice):
    assert Contribution(0, chosen, (low + high) / 2, (low, high), None, None, margin=0.01).advice == advice


def test_what_cannot_be_shown_stays_and_the_sentence_says_what_could_settle_it():
    few = make_table(train=90, validation=60)
    selection = select_members(few, COSTS, NAMES)
    assert selection.best == (0, 1, 2, 3) and {p.advice for p in selection.contributions} <= {"keep", "cannot tell"}
    low, high = selection[selection.undecided].loss_interval
    assert (low + high) / 2 < 0.01 < high
    total = selection.images_needed + 150
    assert selection.verdict.startswith("Keep all 4 members: these 150 images do not show")
    assert "more labelled images, of the same kind and classes as the training images, could settle it" in (
        selection.verdict
    )
    assert "150 images cannot tell whether members " in selection.outlook
    # With as many images as that, it is settled.
    many = make_table(seed=1, train=total, validation=total // 2)
    assert len(select_members(many, COSTS, NAMES).best) < 4


def test_a_better_subset_than_the_chosen_one_is_named(selection):
    """Members that do harm give room to drop others: the loss is one against all members."""
    top = replace(selection.subsets[0], members=(0, 1), score=selection[selection.best].score + 0.03)
    others = [subset for subset in selection.subsets if subset.members != (0, 1)]
    text = replace(selection, subsets=[top, *others]).verdict
    assert "The best of all 15 subsets is 0+1 (2.5 GFLOPs), 3.0 points above it, in part by luck." in text
    assert "in part by luck" not in selection.verdict


def test_nothing_more_is_asked_for_where_every_subset_loses():
    few = make_table(train=300, validation=200)
    two = few.members([0, 1])
    selection = select_members(two, COSTS[:2], NAMES[:2])
    assert [part.advice for part in selection.contributions] == ["keep", "keep"]
    assert selection.undecided is None and "every one of them loses more than that here" in selection.verdict
    assert selection.outlook == "Each member is needed; more images would hardly change that."


@pytest.mark.parametrize("number", [20, 60, 150, 199])
def test_fewer_than_200_images_drop_nothing_even_of_perfect_copies(number):
    """A bound from no difference at all is still above a point there."""
    rng = np.random.default_rng(0)
    y = np.arange(number) % 2
    block = (np.eye(2)[y] + 0.01 * rng.normal(size=(number, 2))).astype(np.float32)
    train = np.arange(number) < number // 2
    blocks = {"train": [block[train]] * 3, "validation": [block[~train]] * 3}
    table = FeatureTable(blocks, {"train": y[train], "validation": y[~train]}, ["0", "1"])
    selection = select_members(table, [Cost(1.0, 1.0)] * 3, list("abc"))
    assert selection.best == (0, 1, 2) and {part.advice for part in selection.contributions} == {"cannot tell"}
    assert selection.images_needed > 0
    assert select_members(table, [Cost(1.0, 1.0)] * 3, list("abc"), margin=0.5).best in ((0,), (1,), (2,))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), margins=st.lists(st.floats(0.002, 0.5), min_size=2, max_size=4))
def test_a_larger_margin_never_costs_more(seed, margins):
    table = make_table(seed=seed, train=150, validation=100, noise=0.6)
    chosen = [select_members(table, COSTS, NAMES, margin=margin) for margin in sorted(margins)]
    gflops = [selection[selection.best].cost.gflops for selection in chosen]
    assert gflops == sorted(gflops, reverse=True)
    for selection, margin in zip(chosen, sorted(margins), strict=True):
        whole = selection.best == (0, 1, 2, 3)
        assert whole or selection[selection.best].loss_interval[1] < margin
        assert all(part.chosen or part.advice == "drop" for part in selection.contributions)


def test_shapley_values_share_out_the_whole_gain_and_are_the_mean_over_orders(selection, table):
    rows = pool(table)
    guesses = [rows.labels[h] == np.bincount(rows.labels[t]).argmax() for t, h in make_folds(rows, 5)]
    guess = np.mean(np.concatenate(guesses))
    value = {subset.members: subset.top1 for subset in selection.subsets} | {(): guess}
    assert sum(c.shapley for c in selection.contributions) == pytest.approx(value[0, 1, 2, 3] - guess)
    for k in range(4):
        gains = []
        for order in itertools.permutations(range(4)):
            before = order[: order.index(k)]
            gains.append(value[tuple(sorted((*before, k)))] - value[tuple(sorted(before))])
        assert selection.contributions[k].shapley == pytest.approx(np.mean(gains))
        low, high = selection.contributions[k].shapley_interval
        assert low <= selection.contributions[k].shapley <= high


def test_steps_of_the_greedy_order_have_paired_intervals(selection):
    (first, *_), (second, gain, interval) = selection.greedy_order[:2]
    paired = selection[first, second].sample.astype(float) - selection[(first,)].sample
    assert gain == pytest.approx(paired.mean()) and interval == pytest.approx(mean_interval(paired))


@pytest.mark.parametrize(
    ("budget", "affordable"),
    [
        ({"max_members": 1}, [(0,), (1,), (2,), (3,)]),
        ({"max_gflops": 1.6}, [(0,), (2,), (0, 2)]),
        ({"max_parameters": 7}, [(1,), (3,), (1, 3)]),
    ],
)
def test_a_budget_that_excludes_what_is_needed_takes_the_best_and_says_what_it_loses(budget, affordable, table):
    selection = select_members(table, COSTS, NAMES, **budget)
    assert selection.best in affordable and selection.over_budget
    best = selection[selection.best]
    assert best.top1 == max(selection[members].top1 for members in affordable)
    low, high = best.loss_interval
    assert low < best.loss < high and best.loss == pytest.approx(selection[0, 1, 2, 3].top1 - best.top1)
    text = (
        f"is expected to lose {100 * best.loss:.1f} points [{100 * low:.1f}, {100 * high:.1f}] against all 4 members"
    )
    assert selection.verdict.startswith("No subset within the budget") and text in selection.verdict
    needed = [part for part in selection.contributions if part.member in (1, 2) and not part.chosen]
    assert needed and all(part.advice in ("keep", "drop") for part in needed)
    assert "but the budget leaves it out" in selection.verdict


def test_a_budget_that_all_that_is_needed_fits_into_changes_nothing(selection, table):
    within = select_members(table, COSTS, NAMES, max_gflops=2.5)
    assert within.best == selection.best and not within.over_budget


def test_a_budget_below_every_member_is_refused(table):
    with pytest.raises(ValueError, match=r"no subset is within the budget; the cheapest member has 0\.50 GFLOPs"):
        select_members(table, COSTS, NAMES, max_gflops=0.1)


@pytest.mark.parametrize("margin", [0, -0.01, 1, float("nan")])
def test_a_margin_must_be_a_share(margin, table):
    with pytest.raises(ValueError, match=r"margin=.* must be between 0 and 1"):
        select_members(table, COSTS, NAMES, margin=margin)


@pytest.mark.parametrize("budget", [{}, {"max_members": 1}])
def test_too_many_members_are_searched_greedily_both_ways(budget, table, monkeypatch):
    monkeypatch.setattr("concat_ensemble.studies.selection.MAX_MEMBERS", 3)
    selection = select_members(table, COSTS, NAMES, **budget)
    assert len(selection.subsets) < 15 and selection.contributions[0].shapley is None
    assert budget or selection.best == (1, 2)
    probed = [s.members for s in selection.subsets]
    assert {(0, 1, 2, 3), (0, 1), (0, 1, 2), *itertools.combinations(range(4), 3)} <= set(probed)


def with_groups(table, number):
    """Groups of `number` neighbouring images."""
    sizes = {split: len(labels) for split, labels in table.labels.items()}
    groups = {split: np.array([f"{split}-{i // number}" for i in range(size)]) for split, size in sizes.items()}
    return replace(table, groups=groups)


def test_groups_are_never_in_two_folds_and_widen_the_intervals(selection, table):
    grouped = with_groups(table, 20)
    rows = pool(grouped)
    for train, held_out in make_folds(rows, 5):
        assert not set(rows.groups[train]) & set(rows.groups[held_out])
    assert len(np.concatenate([fold.held_out for fold in make_folds(rows, 5)])) == 1100
    by_group = select_members(grouped, COSTS, NAMES)
    assert by_group.n_groups == 55 and selection.n_groups is None
    # Few groups have fat tails: 55 of them make every interval of the same loss wider.
    low, high = by_group[(1,)].loss_interval
    alone = select_members(with_groups(table, 1), COSTS, NAMES)[(1,)].loss_interval
    assert high - low > alone[1] - alone[0]


def test_images_needed_are_counted_in_groups_too():
    selection = select_members(with_groups(make_table(seed=5, train=200, validation=100, noise=0.2), 5), COSTS, NAMES)
    assert selection.undecided and "these 300 images in 60 groups do not show" in selection.verdict
    assert re.search(r"about [\d,]+ more labelled images in about [\d,]+ new groups, of the", selection.verdict)


def test_one_group_cannot_be_cross_validated(table):
    labels = {split: np.zeros(len(y)) for split, y in table.labels.items()}
    with pytest.raises(ValueError, match="at least 2 groups of images in training and validation; there is 1"):
        select_members(replace(table, groups=labels), COSTS, NAMES)


def test_copies_of_an_image_are_in_one_fold_and_count_once(table):
    blocks = {split: [np.repeat(b[:100], 4, axis=0) for b in blocks] for split, blocks in table.blocks.items()}
    labels = {split: np.repeat(y[:100], 4) for split, y in table.labels.items()}
    rows = join_copies(pool(FeatureTable(blocks, labels, table.class_names)))
    assert rows.groups.tolist() == [4 * (row // 4) for row in range(800)]
    assert join_copies(pool(table)).groups is None
    for train, held_out in make_folds(rows, 5):
        assert not set(train // 4) & set(held_out // 4)
    selection = select_members(FeatureTable(blocks, labels, table.class_names), COSTS, NAMES)
    assert selection.n_groups is None
    once = select_members(make_table(train=100, validation=100), COSTS, NAMES)
    widths = [np.diff(one[(1,)].loss_interval)[0] for one in (selection, once)]
    assert widths[0] == pytest.approx(widths[1], rel=0.35), "800 images, of which 600 are copies, are not 800 images"


def test_rare_classes_are_folded_without_a_warning():
    table = make_table(train=60, validation=40)
    table.labels["train"][:] = np.where(np.arange(60) < 2, 8, table.labels["train"] % 8)
    table.labels["validation"][:] = table.labels["validation"] % 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_members(table, COSTS, NAMES).n_held_out == 100
    table.labels["train"][:] = table.labels["validation"][:] = 3
    with pytest.raises(ValueError, match="all rows are of one class"):
        select_members(table, COSTS, NAMES)


@pytest.mark.parametrize("metric", ["mean_per_class", "macro_f1", "auroc", "average_precision"])
def test_another_metric_scores_and_compares_subsets(metric):
    """One class in ten: top-1 is level with guessing, which ranking metrics and recall see through."""
    table = make_table(train=700, validation=300)
    for split, labels in table.labels.items():
        table.labels[split] = (labels == 4).astype(np.int64)
    table = FeatureTable(table.blocks, table.labels, ["rest", "four"])
    selection, rows = select_members(table, COSTS, NAMES, metric=metric), pool(table)
    assert selection.metric == metric and selection.subsets == sorted(selection.subsets, key=lambda s: -s.score)
    assert selection[selection.best].loss_interval[1] <= 0.01 and 1 in selection.best
    if metric == "auroc":
        folds = make_folds(rows, 5, seed=0)
        for subset in selection.subsets[:4]:
            scores = np.empty((1000, 2))
            by_strength = [ridge_scores(rows, subset.members, folds, s) for s in L2_STRENGTHS]
            ranks = [s[:, 1] - s[:, 0] for s in by_strength]
            for fold in folds:
                best = np.argmax([roc_auc_score(rows.labels[fold.train], r[fold.train]) for r in ranks])
                scores[fold.held_out] = by_strength[best][fold.held_out]
            assert subset.score == pytest.approx(roc_auc_score(rows.labels, scores[:, 1] - scores[:, 0]), abs=1e-3)
    whole = selection[0, 1, 2, 3]
    for part in selection.contributions:
        smaller = tuple(k for k in selection.best if k != part.member)
        if smaller:
            assert part.gain == pytest.approx(whole.score - selection[smaller].score)


def test_an_unknown_metric_is_refused(table):
    with pytest.raises(ValueError, match=r"metric='f2' must be one of top1"):
        select_members(table, COSTS, NAMES, metric="f2")


def test_is_saved_and_loaded(selection, tmp_path):
    selection.save(tmp_path / "a" / "b.json")
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["schema_version"] == 2 and content["best"] == [1, 2] and len(content["subsets"]) == 15
    assert "sample" not in content["subsets"][0]
    loaded = Selection.load(tmp_path / "a" / "b.json")
    assert loaded == selection and loaded.verdict == selection.verdict and loaded.margin == 0.01
    few = select_members(make_table(train=90, validation=60), COSTS, NAMES)
    few.save(tmp_path / "few.json")
    assert Selection.load(tmp_path / "few.json").verdict == few.verdict


def test_a_file_of_version_1_is_read():
    """`selection-version-1.json` was written by 0.1.0: two members and a copy of the first."""
    path = Path(__file__).parent / "selection-version-1.json"
    selection, content = Selection.load(path), json.loads(path.read_text())
    assert selection.protocol == content["protocol"] and selection.feature_dims == content["widths"]
    assert [subset.l2_strength for subset in selection.subsets] == [one["strength"] for one in content["subsets"]]
    assert [subset.score for subset in selection.subsets] == [one["top1"] for one in content["subsets"]]
    assert [list(step[:2]) for step in selection.greedy_order] == [one[:2] for one in content["order"]]
    assert selection.n_held_out == content["n_held"] and selection.best == tuple(content["best"])
    assert selection.margin is None and "Subset " in selection.verdict


def test_a_file_without_a_margin_is_read(selection, tmp_path):
    """As this version's selections were written before they had one."""
    selection.save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    for name in ("margin", "over_budget", "undecided", "images_needed", "n_groups", "audit"):
        del content[name]
    for subset in content["subsets"]:
        del subset["score"], subset["loss"], subset["loss_interval"]
    for part in content["contributions"]:
        del part["margin"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    older = Selection.load(tmp_path / "x.json")
    assert older.best == (1, 2) and older[1, 2].score == selection[1, 2].top1
    assert older.verdict.startswith("Subset 1+2 reaches") and older.protocol == selection.protocol


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 3}, {"contributions": []}, {"best": [7]}, {"undecided": [7]}, {"subsets": [5]}],
    ids=["newer", "no contributions", "no such subset", "no such undecided one", "no subset"],
)
def test_a_broken_file_is_named_with_the_way_out(change, selection, tmp_path):
    selection.save(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()) | change))
    with pytest.raises(ValueError, match=r"x\.json is not a selection file .*--overwrite"):
        Selection.load(tmp_path / "x.json")


def test_costs_are_those_of_the_members():
    small, large = (assemble([f"random:{name}"]) for name in ("test_vit", "test_resnet"))
    (cost,), (other,) = member_costs(small), member_costs(large)
    assert cost.million_parameters == pytest.approx(sum(p.numel() for p in small.parameters()) / 1e6)
    assert cost.gflops > 0 and other.gflops > 0
    assert cost + other == Cost(cost.gflops + other.gflops, cost.million_parameters + other.million_parameters)


def test_flops_are_counted_by_hand():
    """A linear layer multiplies and adds once for each weight and row."""
    with torch.device("meta"):
        assert count_flops(nn.Linear(3, 5), torch.zeros(2, 3)) == 2 * 2 * 3 * 5
