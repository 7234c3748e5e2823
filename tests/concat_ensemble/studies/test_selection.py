"""Subsets of members against probes of each subset on its own, on made-up members of which one is what it seems."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from concat_ensemble import RidgeProbe, assemble
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.studies.cost import member_costs
from concat_ensemble.studies.results import Cost
from concat_ensemble.studies.selection import FEW_IMAGES, L2_STRENGTHS, select_members


@pytest.fixture(scope="module")
def table():
    """Four members of eight columns: two that tell halves of nine classes apart, a copy of the first, and noise."""
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
def found(table):
    return select_members(table, COSTS, NAMES)


def test_every_subset_has_the_accuracy_of_a_ridge_probe_of_its_own(found, table):
    assert len(found.subsets) == 15 and found.subsets == sorted(found.subsets, key=lambda s: -s.top1)
    for subset in found.subsets:
        part = table.members(subset.members)
        alone = RidgeProbe(L2_STRENGTHS).fit(part["train"], validation=part["validation"])
        assert subset.top1 == pytest.approx(max(alone.path_.values()), abs=1 / 500 + 1e-9)
        assert subset.cost == sum((COSTS[k] for k in subset.members), Cost(0.0, 0.0))


def test_few_rows_go_by_kernels_and_give_the_same(table):
    few = FeatureTable(
        {
            name: [block[:25] for block in blocks] if name == "train" else blocks
            for name, blocks in table.blocks.items()
        },
        {name: rows[:25] if name == "train" else rows for name, rows in table.labels.items()},
        table.class_names,
    )
    found = select_members(few, COSTS, NAMES)
    for subset in found.subsets:
        part = few.members(subset.members)
        alone = RidgeProbe(L2_STRENGTHS).fit(part["train"], validation=part["validation"])
        assert subset.top1 == pytest.approx(max(alone.path_.values()), abs=1 / 500 + 1e-9)


def test_says_what_each_member_is_worth(found):
    thirds, rests, copy, noise = found.contributions
    assert (noise.advice, thirds.advice, copy.advice) == ("drop", "drop", "keep"), "one of the copies can go, not both"
    assert rests.advice == "keep" and rests.gain > 0.3 and copy.gain > 0.3
    assert thirds.shapley == pytest.approx(copy.shapley, abs=0.02) and thirds.shapley > 10 * abs(noise.shapley)
    assert found.best == (1, 2), "the cheaper of the copies, and what it lacks"
    assert [member for member, *_ in found.order][:2] in ([0, 1], [2, 1], [1, 0], [1, 2])
    assert "Drop member 3 (noise)" in found.verdict and "Keep member 1 (rests)" in found.verdict
    assert found.outlook.startswith("Stop at K = 2: 1+2.")
    few = replace(found, n_held=FEW_IMAGES - 1)
    assert "believe them less" in few.outlook and "believe them less" not in replace(found, n_held=FEW_IMAGES).outlook
    assert "Most alike are members 0 and 2 (CKA 0.9" in found.verdict


def test_shapley_values_share_out_the_whole_gain_and_are_the_mean_over_orders(found, table):
    guess = np.mean(table.labels["validation"] == np.bincount(table.labels["train"]).argmax())
    value = {subset.members: subset.top1 for subset in found.subsets} | {(): guess}
    assert sum(c.shapley for c in found.contributions) == pytest.approx(value[0, 1, 2, 3] - guess)
    for k in range(4):
        gains = []
        for order in itertools.permutations(range(4)):
            before = order[: order.index(k)]
            gains.append(value[tuple(sorted((*before, k)))] - value[tuple(sorted(before))])
        assert found.contributions[k].shapley == pytest.approx(np.mean(gains))
        low, high = found.contributions[k].shapley_interval
        assert low <= found.contributions[k].shapley <= high


def test_intervals_are_those_of_paired_differences(found):
    gap = found[1, 2, 3].right.astype(float) - found[1, 2].right
    half = 1.96 * gap.std() / math.sqrt(len(gap))
    low, high = found.contributions[3].gain_interval
    assert (low, high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.004)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [({"max_members": 1}, lambda s: len(s) == 1), ({"max_gflops": 1.6}, lambda s: set(s) <= {0, 2}), ({"max_parameters": 7}, lambda s: set(s) <= {1, 3})],
)  # fmt: skip
def test_a_budget_is_kept(budget, allowed, table):
    assert allowed(select_members(table, COSTS, NAMES, **budget).best)


def test_a_budget_that_nothing_keeps_is_named(table):
    with pytest.raises(ValueError, match=r"no subset is within the budget; the cheapest member has 0\.50 GFLOPs"):
        select_members(table, COSTS, NAMES, max_gflops=0.1)


def test_too_many_members_are_searched_greedily(table, monkeypatch):
    monkeypatch.setattr("concat_ensemble.studies.selection.MOST_MEMBERS", 3)
    found = select_members(table, COSTS, NAMES)
    assert len(found.subsets) < 15 and found.best == (1, 2) and found.contributions[0].shapley is None
    assert (0, 1, 2, 3) in [s.members for s in found.subsets]


def test_folds_predict_every_image_once_and_never_the_test(table):
    found = select_members(table, COSTS, NAMES, folds=5)
    assert found.n_held == 1100 and found.n_train == 880 and found.best == (1, 2)
    other = FeatureTable(table.blocks | {"test": []}, table.labels, table.class_names)
    assert select_members(other, COSTS, NAMES, folds=5).subsets == found.subsets


def test_is_written_as_json(found, tmp_path):
    found.save(tmp_path / "a" / "b.json")
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["best"] == [1, 2] and len(content["subsets"]) == 15 and "right" not in content["subsets"][0]


def test_costs_are_counted_by_hand():
    """A ViT's patch embedding alone: test_vit's parameters are those of timm; FLOPs double when the input does."""
    small, large = (assemble([f"random:{name}"]) for name in ("test_vit", "test_resnet"))
    (cost,), (other,) = member_costs(small), member_costs(large)
    assert cost.million_parameters == pytest.approx(sum(p.numel() for p in small.parameters()) / 1e6)
    assert (
        cost.gflops > 0
        and other.gflops > 0
        and cost + other == Cost(cost.gflops + other.gflops, cost.million_parameters + other.million_parameters)
    )
