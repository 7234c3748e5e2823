"""How devices share networks, as numbers that can be computed by hand."""

import itertools
import random

import pytest

from concat_ensemble.training.sharing import PARALLELISMS, Sharing, finish_first, share_networks, split_processes


def share(parallelism: str, costs: list[float], num_devices: int, efficiency: float = 1.0, **batch) -> Sharing:
    batch = {"batch_size": 1024, **batch}
    return finish_first(share_networks(parallelism, costs, num_devices, **batch), costs, efficiency)


def test_five_networks_on_eight_devices():
    costs = [1.0] * 5
    data, members, auto = (share(parallelism, costs, 8) for parallelism in ("data", "members", "auto"))
    assert sorted(map(len, members.teams)) == [1, 1, 2, 2, 2]
    assert members.finish(costs) / data.finish(costs) == 1.6
    assert auto.finish(costs) == data.finish(costs) == 5 / 8
    assert str(auto) == "1 on all, then 4 on teams of 4 x 2"


@pytest.mark.parametrize(
    ("costs", "devices", "expected"),
    [
        ([1.0] * 4, 8, "4 on teams of 4 x 2"),
        ([1.0] * 8, 4, "8 on teams of 4 x 1"),
        ([1.0] * 5, 4, "1 on all, then 4 on teams of 4 x 1"),
        ([1.0] * 5, 1, "5 on all"),
        ([1.0], 8, "1 on all"),
        ([4.5, 1.0, 1.0, 1.0, 1.0], 4, "1 on all, then 4 on teams of 4 x 1"),  # CAT1 beside CAT4
        ([1.0, 1.0, 1.0, 1.0, 3.9], 8, "1 on all, then 4 on teams of 4 x 2"),  # W2 beside CAT4
        ([1.0, 0.999], 2, "2 on teams of 2 x 1"),  # nothing is gained by communication that is worth it
    ],
)
def test_auto_takes_what_ends_first_with_the_fewest_networks_on_all_devices(costs, devices, expected):
    assert str(share("auto", costs, devices)) == expected


def test_auto_puts_the_most_expensive_networks_on_all_devices():
    assert share("auto", [1.0, 4.5, 1.0, 1.0, 1.0], 4).together == (1,)


def test_a_low_efficiency_keeps_networks_apart():
    assert str(share("auto", [1.0] * 5, 4, efficiency=0.2)) == "5 on teams of 4 x 1"
    assert share("data", [1.0] * 5, 4, efficiency=0.5).finish([1.0] * 5, 0.5) == 2.5


def test_every_network_is_trained_once_and_auto_is_never_later():
    random.seed(0)
    for _ in range(200):
        costs = [random.choice([1.0, 2.0, 4.5, 0.3]) for _ in range(random.randint(1, 9))]
        devices = random.randint(1, 9)
        plans = {parallelism: share(parallelism, costs, devices, batch_size=2520) for parallelism in PARALLELISMS}
        for plan in plans.values():
            assert sorted(plan.together + plan.apart) == list(range(len(costs)))
            assert sorted(itertools.chain(*plan.teams)) == list(range(devices))
        finishes = {parallelism: plan.finish(costs) for parallelism, plan in plans.items()}
        assert finishes["auto"] <= 1.011 * min(finishes.values())
        assert finishes["data"] == pytest.approx(sum(costs) / devices)


def test_a_team_takes_the_next_network_when_it_is_free():
    plan = share("members", [3.0, 2.0, 1.0, 1.0], 2)
    assert plan.apart == (0, 1, 2, 3) and plan.finish([3.0, 2.0, 1.0, 1.0]) == 4.0  # 3 and 1, 2 and 1


def test_one_device_keeps_the_order_of_the_recipe():
    assert share("auto", [1.0, 3.0, 2.0], 1).together == (0, 1, 2)


def test_batches_that_cannot_be_divided_are_refused_before_any_team_begins():
    with pytest.raises(ValueError, match="batch_size=1024 must be a multiple of 6 processes x"):
        share("data", [1.0] * 5, 6)
    assert share("members", [1.0] * 5, 6).sizes == [1, 2]
    assert share("auto", [1.0] * 5, 6).sizes == [1, 2], "what remains is possible"
    with pytest.raises(ValueError, match="of 2 and of 3 processes x gradient_accumulation=2"):
        share("members", [1.0] * 2, 5, accumulation=2)


@pytest.mark.parametrize(
    ("processes", "jobs", "teams"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (2, 5, [[0], [1]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, 5, [[0, 1], [2, 3], [5, 6], [4], [7]]),
        (3, 1, [[0, 1, 2]]),
    ],
)
def test_team_sizes_differ_by_one_at_most(processes, jobs, teams):
    assert split_processes(processes, jobs) == teams
