"""Subsets of members against probes of each subset on its own, on members whose relations are known."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from concat_ensemble import RidgeProbe, assemble
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.studies.cost import count_flops, member_costs
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import L2_STRENGTHS, select_members
from concat_ensemble.studies.selection_results import FEW_IMAGES, Selection


@pytest.fixture(scope="module")
def table():
    """Four members of eight features: two that each distinguish three groups of classes, a copy of one, and noise."""
    rng = np.random.default_rng(0)
    blocks, labels = {}, {}
    for split, number in {"train": 600, "validation": 500, "test": 10}.items():
        y = rng.integers(0, 9, number)
        first, second = np.eye(3)[y // 3], np.eye(3)[y % 3]
        rows = [np.hstack([x, np.zeros((number, 5))]) + 0.35 * rng.normal(size=(number, 8)) for x in (first, second)]
        rows += [rows[0] @ np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0], rng.normal(size=(number, 8))]
        blocks[split], labels[split] = [block.astype(np.float32) for block in rows], y
    return FeatureTable(blocks, labels, [str(k) for k in range(9)])


COSTS = [Cost(1.0, 10.0), Cost(2.0, 5.0), Cost(0.5, 20.0), Cost(4.0, 1.0)]
NAMES = ["thirds", "rests", "copy", "noise"]


@pytest.fixture(scope="module")
def selection(table):
    return select_members(table, COSTS, NAMES)


def test_every_subset_has_the_accuracy_of_a_ridge_probe_of_its_own(selection, table):
    assert len(selection.subsets) == 15 and selection.subsets == sorted(selection.subsets, key=lambda s: -s.top1)
    for subset in selection.subsets:
        part = table.members(subset.members)
        alone = RidgeProbe(L2_STRENGTHS).fit(part["train"], validation=part["validation"])
        assert subset.top1 == pytest.approx(max(alone.path_.values()), abs=1 / 500 + 1e-9)
        assert subset.cost == sum((COSTS[k] for k in subset.members), Cost(0.0, 0.0))


def test_kernels_for_few_rows_give_the_same(table):
    few = FeatureTable(
        {
            name: [block[:25] for block in blocks] if name == "train" else blocks
            for name, blocks in table.blocks.items()
        },
        {name: rows[:25] if name == "train" else rows for name, rows in table.labels.items()},
        table.class_names,
    )
    selection = select_members(few, COSTS, NAMES)
    for subset in selection.subsets:
        part = few.members(subset.members)
        alone = RidgeProbe(L2_STRENGTHS).fit(part["train"], validation=part["validation"])
        assert subset.top1 == pytest.approx(max(alone.path_.values()), abs=1 / 500 + 1e-9)


def test_advises_on_each_member(selection):
    thirds, rests, copy, noise = selection.contributions
    assert (noise.advice, thirds.advice, copy.advice) == ("drop", "drop", "keep"), (
        "one of the copies is needed, not both"
    )
    assert rests.advice == "keep" and rests.gain > 0.3 and copy.gain > 0.3
    assert thirds.shapley == pytest.approx(copy.shapley, abs=0.02) and thirds.shapley > 10 * abs(noise.shapley)
    assert selection.best == (1, 2), "the cheaper copy, and the member with what it lacks"
    assert [member for member, *_ in selection.greedy_order][:2] in ([0, 1], [2, 1], [1, 0], [1, 2])
    assert "Drop member 3 (noise)" in selection.verdict and "Keep member 1 (rests)" in selection.verdict
    assert selection.outlook.startswith("Stop at K = 2: 1+2.")
    assert "trust them less" in replace(selection, n_held_out=FEW_IMAGES - 1).outlook
    assert "trust them less" not in replace(selection, n_held_out=FEW_IMAGES).outlook
    assert "Members 0 and 2 are the most alike (CKA 0.9" in selection.verdict


def test_shapley_values_share_out_the_whole_gain_and_are_the_mean_over_orders(selection, table):
    guess = np.mean(table.labels["validation"] == np.bincount(table.labels["train"]).argmax())
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


def test_intervals_are_those_of_paired_differences(selection):
    gap = selection[1, 2, 3].correct.astype(float) - selection[1, 2].correct
    half = 1.96 * gap.std() / math.sqrt(len(gap))
    low, high = selection.contributions[3].gain_interval
    assert (low, high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.004)


@pytest.mark.parametrize(
    ("budget", "affordable"),
    [
        ({"max_members": 1}, [(0,), (1,), (2,), (3,)]),
        ({"max_gflops": 1.6}, [(0,), (2,), (0, 2)]),
        ({"max_parameters": 7}, [(1,), (3,), (1, 3)]),
    ],
)
def test_the_chosen_subset_is_within_the_budget(budget, affordable, table):
    assert select_members(table, COSTS, NAMES, **budget).best in affordable


def test_a_budget_below_every_member_is_refused(table):
    with pytest.raises(ValueError, match=r"no subset is within the budget; the cheapest member has 0\.50 GFLOPs"):
        select_members(table, COSTS, NAMES, max_gflops=0.1)


def test_too_many_members_are_searched_greedily(table, monkeypatch):
    monkeypatch.setattr("concat_ensemble.studies.selection.MAX_MEMBERS", 3)
    selection = select_members(table, COSTS, NAMES)
    assert len(selection.subsets) < 15 and selection.best == (1, 2) and selection.contributions[0].shapley is None
    assert (0, 1, 2, 3) in [s.members for s in selection.subsets]


def test_folds_predict_every_image_once_and_never_the_test(table):
    selection = select_members(table, COSTS, NAMES, folds=5)
    assert selection.n_held_out == 1100 and selection.n_train == 880 and selection.best == (1, 2)
    other = FeatureTable(table.blocks | {"test": []}, table.labels, table.class_names)
    assert select_members(other, COSTS, NAMES, folds=5).subsets == selection.subsets


def test_is_saved_and_loaded(selection, tmp_path):
    selection.save(tmp_path / "a" / "b.json")
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["schema_version"] == 2 and content["best"] == [1, 2] and len(content["subsets"]) == 15
    assert "correct" not in content["subsets"][0]
    assert Selection.load(tmp_path / "a" / "b.json") == selection


def test_a_file_of_version_1_is_read():
    """`selection-version-1.json` was written by 0.1.0: two members and a copy of the first."""
    path = Path(__file__).parent / "selection-version-1.json"
    selection, content = Selection.load(path), json.loads(path.read_text())
    assert selection.protocol == content["protocol"] and selection.feature_dims == content["widths"]
    assert [subset.l2_strength for subset in selection.subsets] == [one["strength"] for one in content["subsets"]]
    assert [list(step[:2]) for step in selection.greedy_order] == [one[:2] for one in content["order"]]
    assert selection.n_held_out == content["n_held"] and selection.best == tuple(content["best"])


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 3}, {"contributions": []}, {"best": [7]}, {"subsets": [5]}],
    ids=["newer", "no contributions", "no such subset", "no subset"],
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
