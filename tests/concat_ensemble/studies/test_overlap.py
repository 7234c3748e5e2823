"""What members hold of one another, on members whose relations are known, and the command."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from concat_ensemble.features.table import FeatureTable
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.reporting.figures import plot_overlap
from concat_ensemble.studies.overlap import L2_STRENGTHS, REST_L2_STRENGTH, measure_overlap

SIZES = {"train": 600, "validation": 300, "test": 800}
NAMES = ["thirds", "copy", "linear", "rests", "noise"]


def tabled(blocks, labels, seed=0):
    """A table of each split's blocks, and its control: noise of the same shapes."""
    rng = np.random.default_rng(seed)
    noise = {
        name: [rng.normal(size=block.shape).astype(np.float32) for block in part] for name, part in blocks.items()
    }
    return FeatureTable(blocks, labels, list("012345678")), FeatureTable(noise, labels, list("012345678"))


@pytest.fixture(scope="module")
def tables():
    """Of nine classes: a member that tells thirds apart, a copy, a linear map of it, the same map with what tells each third's
    classes apart, and noise of which a quarter is dead."""
    rng, width = np.random.default_rng(3), 24
    basis = rng.normal(size=(width, width)) * np.arange(1, width + 1)[:, None] ** -0.7
    turn, thirds, rests = rng.normal(size=(width, width)), rng.normal(size=(3, width)), rng.normal(size=(3, width))
    blocks, labels = {}, {}
    for split, number in SIZES.items():
        y = rng.integers(0, 9, number)
        first = rng.normal(size=(number, width)) @ basis + thirds[y // 3]
        other = 0.3 * first @ turn + rng.normal(size=(number, width)) @ basis + rests[y % 3]
        noise = rng.normal(size=(number, width))
        noise[:, :3], noise[:, 3:6] = 7.3, 7.3 + 1e-3 * noise[:, 3:6]
        blocks[split] = [x.astype(np.float32) for x in (first, first.copy(), first @ turn, other, noise)]
        labels[split] = y
    return tabled(blocks, labels)


@pytest.fixture(scope="module")
def found(tables):
    return measure_overlap(*tables, {name: [k] for k, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def relation(found):
    return lambda given, wanted: next(r for r in found.relations if (r.given, r.wanted) == (given, wanted))


def test_a_copy_and_a_linear_map_are_repeats_whose_rest_is_good_for_nothing(found, relation):
    for k, cka in ((1, 1.0), (2, None)):
        part = relation((0,), k)
        assert part.r2 == pytest.approx(1, abs=2e-3) and part.untrained_r2 < 0.02
        assert cka is None or part.cka == pytest.approx(cka, abs=1e-5)
        assert part.rest_interval[0] <= found.guessing < found.subjects[k].top1 - 0.1
    assert found.verdict[1].startswith(
        "copy repeats thirds: R2 1.00 (0.00 from untrained networks; a repeat from 0.9 on)."
    )


def test_unrelated_members_predict_nothing_of_each_other(found, relation):
    for given_, wanted in (((0,), 4), ((4,), 0), ((0, 1, 2, 3), 4)):
        assert abs(relation(given_, wanted).cka) < 0.03 and relation(given_, wanted).r2 < 0.02
    assert relation((4,), 3).rest_top1 == pytest.approx(found.subjects[3].top1, abs=0.03), "all of it is left"
    assert relation((0,), 4).rest_interval[0] <= found.guessing
    assert found.verdict[4].startswith("noise has nothing seen to help here beyond the 4 others: R2 0.00")


def test_what_a_member_has_of_its_own_is_what_its_rest_is_good_for(found, relation):
    """Given the thirds, the rests alone are left: one class of three is guessed right, 1/3, not 1/9 nor all that it knows."""
    part = relation((0,), 3)
    assert 0.3 < part.r2 < 0.9 and found.subjects[3].top1 > 0.6
    assert 0.28 < part.rest_top1 < 0.42
    assert found.verdict[3].startswith("rests has what is not in the 4 others")


def test_dead_features_are_counted_and_predicted_by_nobody(found, relation):
    assert [subject.dead for subject in found.subjects] == [0, 0, 0, 0, 0.25]
    assert relation((0,), 4).features[:6] == [None] * 6 and None not in relation((0,), 4).features[6:]


def test_equals_a_naive_reference(tables, found, relation):
    """R2 by scikit-learn's ridge feature by feature, CKA by kernels, the rest's probe on arrays."""
    (a, a_held, a_test), (b, b_held, b_test) = (
        [(x.astype(float) - tables[0]["train"].blocks[k].mean(0)) / tables[0]["train"].blocks[k].std(0) for x in
         (tables[0][split].blocks[k] for split in SIZES)] for k in (0, 3)
    )  # fmt: skip
    part, models = relation((0,), 3), [Ridge(len(a) * s, fit_intercept=False) for s in L2_STRENGTHS]
    for j, r2 in enumerate(part.features):
        errors = [np.mean((model.fit(a, b[:, j]).predict(a_held) - b_held[:, j]) ** 2) for model in models]
        predicted = models[int(np.argmin(errors))].predict(a_test)
        assert r2 == pytest.approx(1 - np.mean((predicted - b_test[:, j]) ** 2) / np.mean(b_test[:, j] ** 2), abs=1e-4)
    assert part.r2 == pytest.approx(np.clip(part.features, 0, None).mean())

    joined, own = (Ridge(len(x) * REST_L2_STRENGTH, fit_intercept=False).fit(x, y) for x, y in
                   ((np.vstack([a, a_held]), np.vstack([b, b_held])), (a_test, b_test)))  # fmt: skip
    rests = [b - joined.predict(a), b_held - joined.predict(a_held), b_test - own.predict(a_test)]
    labels = [tables[0][split].labels for split in SIZES]
    probe = LinearProbe(standardize=False).fit(rests[0], labels[0], validation=(rests[1], labels[1]))
    assert part.rest_top1 == pytest.approx(probe.score(rests[2], labels[2]), abs=0.01)

    raw = [tables[0]["train"].blocks[k].astype(float) for k in (0, 3)]
    assert part.cka == pytest.approx(kernel_cka(*raw), abs=1e-5)
    shares = np.linalg.svd(raw[1] - raw[1].mean(0), compute_uv=False) ** 2
    shares /= shares.sum()
    assert found.subjects[3].effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def kernel_cka(x, y):
    """By the unbiased HSIC of Song et al. 2012, equation 5, from kernels without their diagonals."""

    def hsic(k, m):
        n, one = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return np.trace(k @ m) + one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2) - 2 / (n - 2) * one @ k @ m @ one

    kernels = x @ x.T, y @ y.T
    return hsic(*kernels) / math.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), width=st.integers(1, 6), shift=st.floats(-3, 3))
def test_cka_and_rank_ignore_rotation_scale_and_shift(seed, scale, width, shift):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    plain, turned, labels = {}, {}, {}
    for split in SIZES:
        x, y = rng.normal(size=(20, width)), rng.normal(size=(20, 4))
        y[:, :1] += x[:, :1]
        plain[split], turned[split], labels[split] = [x, y], [scale * (x @ turn + shift), y], np.arange(20) % 2
    first, second = (measure_overlap(*tabled(blocks, labels), {"x": [0], "y": [1]}) for blocks in (plain, turned))
    assert first.relations[0].cka == pytest.approx(second.relations[0].cka, abs=1e-6)
    assert first.relations[0].cka == pytest.approx(kernel_cka(*plain["train"]), abs=1e-6)
    for k in range(2):
        assert first.subjects[k].effective_rank == pytest.approx(second.subjects[k].effective_rank, rel=1e-5)


def test_ensembles_are_compared_as_wholes(tables, relation):
    """Two of the members in one subject hold of a third what `relation` says that they hold together."""
    found = measure_overlap(*tables, {"pair": [0, 4], "rests": [3]})
    assert [subject.num_features for subject in found.subjects] == [48, 24]
    alone = relation((0,), 3)
    assert alone.r2 - 0.05 < found.relations[1].r2 < alone.r2 + 0.02, "noise beside it tells nothing more"


def test_members_of_nothing_but_dead_features_and_few_rows_are_measured(tables):
    few = {split: [block[:12] for block in tables[0].blocks[split]] for split in SIZES}
    few = {split: [part[0], np.full_like(part[1], 2.5), part[3]] for split, part in few.items()}
    found = measure_overlap(*tabled(few, {s: np.arange(12) % 3 for s in SIZES}), {"a": [0], "dead": [1], "b": [2]})
    assert found.subjects[1].dead == 1 and "nan" not in str(found).lower()
    assert found.verdict[-1] == "Images are fewer than features: R2 and the rests come out too small, or as nothing."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table, control: (table, control, {"a": [0, 1]}), "1 to compare on 600 training images: take 2 and 4"),
        (lambda table, control: (table, control.members([0]), {"a": [0], "b": [1]}), r"widths \[24\] are no control"),
        (lambda table, control: (*tabled({s: [b[:3] for b in table.blocks[s]] for s in SIZES}, {s: np.arange(3) for s in SIZES}),
                                 {"a": [0], "b": [1]}), "2 to compare on 3 training images: take 2 and 4"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused_in_one_line(change, said, tables):
    with pytest.raises(ValueError, match=said) as error:
        measure_overlap(*change(*tables))
    assert "\n" not in str(error.value)


def test_is_written_and_drawn(found, tmp_path):
    found.save(tmp_path / "a" / "b.json", dataset={"name": "made"})
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["dataset"] == {"name": "made"} and content["verdict"] == found.verdict
    assert len(content["relations"]) == 5 * 4 + 5 and len(content["relations"][0]["features"]) == 24
    plot_overlap(found, tmp_path / "c" / "d.png")
    assert (tmp_path / "c" / "d.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_what_two_members_hold_of_each_other(run, folder):
    code, out, err = run("compare", "pair", "--dataset", "digits", "--limit", "100", "--output", "seen")
    assert code == 0, err
    content = json.loads((folder.parent / "seen" / "digits-limit-100.json").read_text())
    assert [(r["given"], r["wanted"]) for r in content["relations"]] == [([1], 0), ([0], 1)]
    assert (
        content["verdict"][0] in out and "member 1 (resnet10t)" in out and "written: seen/digits-limit-100.json" in out
    )
    assert (folder.parent / "seen" / "digits-limit-100.png").is_file()


def test_compare_takes_whole_ensembles_and_prints_json_alone(run, folder):
    words = ["compare", "pair", "random:test_resnet", "--dataset", "digits", "--limit", "60", "--json", "--quiet"]
    code, out, err = run(*words)
    content = json.loads(out)
    assert (
        code == 0
        and err == ""
        and [one["name"] for one in content["subjects"]] == ["0: pair", "1: random:test_resnet"]
    )
    assert content["subjects"][0]["num_features"] == 32 and content["dataset"]["limit"] == 60
    code, _, err = run(*words)
    assert code == 2 and "overlap/digits-limit-60.json is there already; add --overwrite" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["random:test_resnet", "--limit", "30"], "member 0 (test_resnet) is the only member; name another model"),
        (["pair", "--recipe", "cifar10", "--recipe", "mnist"], "compare looks at one dataset; give one --recipe"),
        (["nowhere", "--limit", "30"], "nowhere"),
    ],
)
def test_compare_refuses_in_one_line(words, said, refused, folder):
    refused(["compare", *words], said)
