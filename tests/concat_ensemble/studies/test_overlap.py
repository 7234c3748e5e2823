"""How members predict each other's features: on members whose relations are known, and by the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from concat_ensemble.features.table import FeatureTable
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.reporting.figures import plot_overlap
from concat_ensemble.studies.overlap import L2_STRENGTHS, RESIDUAL_L2_STRENGTH, measure_overlap
from concat_ensemble.studies.overlap_results import Overlap

SIZES = {"train": 600, "validation": 300, "test": 800}
NAMES = ["thirds", "copy", "linear", "rests", "noise"]


def make_tables(blocks, labels, seed=0):
    """A table of each split's blocks, and its control: noise of the same shapes."""
    rng = np.random.default_rng(seed)
    noise = {
        name: [rng.normal(size=block.shape).astype(np.float32) for block in part] for name, part in blocks.items()
    }
    return FeatureTable(blocks, labels, list("012345678")), FeatureTable(noise, labels, list("012345678"))


@pytest.fixture(scope="module")
def tables():
    """Five members on nine classes.

    The first one distinguishes thirds of the classes; then come its copy, a linear map of it, the same map with what
    distinguishes each third's classes, and noise of which a quarter is dead.
    """
    rng, dim = np.random.default_rng(3), 24
    basis = rng.normal(size=(dim, dim)) * np.arange(1, dim + 1)[:, None] ** -0.7
    turn, thirds, rests = rng.normal(size=(dim, dim)), rng.normal(size=(3, dim)), rng.normal(size=(3, dim))
    blocks, labels = {}, {}
    for split, number in SIZES.items():
        y = rng.integers(0, 9, number)
        first = rng.normal(size=(number, dim)) @ basis + thirds[y // 3]
        other = 0.3 * first @ turn + rng.normal(size=(number, dim)) @ basis + rests[y % 3]
        noise = rng.normal(size=(number, dim))
        noise[:, :3], noise[:, 3:6] = 7.3, 7.3 + 1e-3 * noise[:, 3:6]
        blocks[split] = [x.astype(np.float32) for x in (first, first.copy(), first @ turn, other, noise)]
        labels[split] = y
    return make_tables(blocks, labels)


@pytest.fixture(scope="module")
def overlap(tables):
    return measure_overlap(*tables, {name: [k] for k, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def relation(overlap):
    return lambda sources, target: next(r for r in overlap.relations if (r.sources, r.target) == (sources, target))


def test_a_copy_and_a_linear_map_are_repeats_whose_residual_is_useless(overlap, relation):
    for k, cka in ((1, 1.0), (2, None)):
        part = relation((0,), k)
        assert part.r2 == pytest.approx(1, abs=2e-3) and part.untrained_r2 < 0.02
        assert cka is None or part.cka == pytest.approx(cka, abs=1e-5)
        assert part.residual_interval[0] <= overlap.majority_share < overlap.subjects[k].top1 - 0.1
    assert overlap.verdict[1].startswith("copy repeats thirds: R2 1.00 (0.00 from untrained networks")


def test_unrelated_members_predict_nothing_of_each_other(overlap, relation):
    for sources, target in (((0,), 4), ((4,), 0), ((0, 1, 2, 3), 4)):
        assert abs(relation(sources, target).cka) < 0.03 and relation(sources, target).r2 < 0.02
    assert relation((4,), 3).residual_top1 == pytest.approx(overlap.subjects[3].top1, abs=0.03), "all of it is left"
    assert relation((0,), 4).residual_interval[0] <= overlap.majority_share
    assert overlap.verdict[4].startswith(
        "noise has no features shown to help on this dataset beyond the 4 others: R2 0.00"
    )


def test_a_residual_contains_what_only_its_member_has(overlap, relation):
    """Without the thirds, only the rests remain: one class of three is guessed right, 1/3, not 1/9 nor all of it."""
    part = relation((0,), 3)
    assert 0.3 < part.r2 < 0.9 and overlap.subjects[3].top1 > 0.6
    assert 0.28 < part.residual_top1 < 0.42
    assert overlap.verdict[3].startswith("rests has features that help on this dataset beyond the 4 others")


def test_dead_features_are_counted_and_not_predicted(overlap, relation):
    assert [subject.dead_share for subject in overlap.subjects] == [0, 0, 0, 0, 0.25]
    assert relation((0,), 4).feature_r2[:6] == [None] * 6 and None not in relation((0,), 4).feature_r2[6:]


def test_equals_a_naive_reference(tables, overlap, relation):
    """R2 by scikit-learn's ridge feature by feature, CKA by kernels, the residual's probe on arrays."""
    table, part = tables[0], relation((0,), 3)
    (a, a_validation, a_test), (b, b_validation, b_test) = (standardize(table, k) for k in (0, 3))
    models = [Ridge(len(a) * s, fit_intercept=False) for s in L2_STRENGTHS]
    for j, r2 in enumerate(part.feature_r2):
        errors = [np.mean((model.fit(a, b[:, j]).predict(a_validation) - b_validation[:, j]) ** 2) for model in models]
        predicted = models[int(np.argmin(errors))].predict(a_test)
        assert r2 == pytest.approx(1 - np.mean((predicted - b_test[:, j]) ** 2) / np.mean(b_test[:, j] ** 2), abs=1e-4)
    assert part.r2 == pytest.approx(np.clip(part.feature_r2, 0, None).mean())

    pairs = (np.vstack([a, a_validation]), np.vstack([b, b_validation])), (a_test, b_test)
    pooled, own = (Ridge(len(x) * RESIDUAL_L2_STRENGTH, fit_intercept=False).fit(x, y) for x, y in pairs)
    residuals = [b - pooled.predict(a), b_validation - pooled.predict(a_validation), b_test - own.predict(a_test)]
    labels = [table[split].labels for split in SIZES]
    probe = LinearProbe(standardize=False).fit(residuals[0], labels[0], validation=(residuals[1], labels[1]))
    assert part.residual_top1 == pytest.approx(probe.score(residuals[2], labels[2]), abs=0.01)

    raw = [table["train"].blocks[k].astype(float) for k in (0, 3)]
    assert part.cka == pytest.approx(kernel_cka(*raw), abs=1e-5)
    shares = np.linalg.svd(raw[1] - raw[1].mean(0), compute_uv=False) ** 2
    shares /= shares.sum()
    assert overlap.subjects[3].effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def standardize(table, k):
    """Member k's rows of each split, by the training rows."""
    train = table["train"].blocks[k]
    return [(table[split].blocks[k].astype(float) - train.mean(0)) / train.std(0) for split in SIZES]


def kernel_cka(x, y):
    """By the unbiased HSIC of Song et al. 2012, equation 5, from kernels without their diagonals."""

    def hsic(k, m):
        n, one = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        return np.trace(k @ m) + one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2) - 2 / (n - 2) * one @ k @ m @ one

    kernels = x @ x.T, y @ y.T
    return hsic(*kernels) / math.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), width=st.integers(1, 6), shift=st.floats(-3, 3))
def test_cka_and_rank_ignore_rotation_scale_and_shift(seed, scale, width, shift):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    plain, turned, labels = {}, {}, {}
    for split in SIZES:
        x, y = rng.normal(size=(20, width)), rng.normal(size=(20, 4))
        y[:, :1] += x[:, :1]
        plain[split], turned[split], labels[split] = [x, y], [scale * (x @ turn + shift), y], np.arange(20) % 2
    first, second = (measure_overlap(*make_tables(blocks, labels), {"x": [0], "y": [1]}) for blocks in (plain, turned))
    assert first.relations[0].cka == pytest.approx(second.relations[0].cka, abs=1e-6)
    assert first.relations[0].cka == pytest.approx(kernel_cka(*plain["train"]), abs=1e-6)
    for k in range(2):
        assert first.subjects[k].effective_rank == pytest.approx(second.subjects[k].effective_rank, rel=1e-5)


def test_ensembles_are_compared_as_wholes(tables, relation):
    """Two members in one subject predict a third one as well as the better one of them does."""
    overlap = measure_overlap(*tables, {"pair": [0, 4], "rests": [3]})
    assert [subject.num_features for subject in overlap.subjects] == [48, 24]
    alone = relation((0,), 3)
    assert alone.r2 - 0.05 < overlap.relations[1].r2 < alone.r2 + 0.02, "the noise beside it adds nothing"


def test_members_with_only_dead_features_and_few_rows_are_measured(tables):
    few = {split: [block[:12] for block in tables[0].blocks[split]] for split in SIZES}
    few = {split: [part[0], np.full_like(part[1], 2.5), part[3]] for split, part in few.items()}
    few = make_tables(few, {split: np.arange(12) % 3 for split in SIZES})
    overlap = measure_overlap(*few, {"a": [0], "dead": [1], "b": [2]})
    assert overlap.subjects[1].dead_share == 1 and "nan" not in str(overlap).lower()
    assert overlap.verdict[-1].startswith("There are fewer images than features")


@pytest.mark.parametrize("rows", [12, 30, 300])
def test_a_feature_that_is_nearly_constant_in_training_only_is_measured(tables, rows):
    """It deviates by 1e-5 in training and by 0.04 on test rows: a |z| of thousands, and Cholesky failed."""
    table = {split: [block[:rows].copy() for block in tables[0].blocks[split]] for split in SIZES}
    for split, scale in (("train", 1e-5), ("validation", 1e-5), ("test", 0.04)):
        for block in (table[split][0], table[split][4]):
            block[:, :2] = 1 + scale * np.random.default_rng(0).normal(size=(len(block), 2))
        table[split][1] = table[split][0] * (1 + 1e-6)  # and near duplicates of it all
    labels = {split: np.arange(rows) % 3 for split in SIZES}
    overlap = measure_overlap(*make_tables(table, labels), {name: [k] for k, name in enumerate(NAMES)})
    assert "nan" not in str(overlap).lower() and all(relation.r2 <= 1 for relation in overlap.relations)
    copy = next(r for r in overlap.relations if (r.sources, r.target) == ((0,), 1))
    assert copy.r2 > (0.9 if rows > 24 else 0.5), "12 rows cannot determine 24 features"


def one_subject(table, control):
    return table, control, {"a": [0, 1]}


def another_control(table, control):
    return table, control.members([0]), {"a": [0], "b": [1]}


def three_images(table, control):
    few = make_tables({s: [b[:3] for b in table.blocks[s]] for s in SIZES}, {s: np.arange(3) for s in SIZES})
    return *few, {"a": [0], "b": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_subject, "1 to compare on 600 training images: take 2 and 4"),
        (another_control, r"feature_dims=\[24\] are no control .*untrained_like"),
        (three_images, "2 to compare on 3 training images: take 2 and 4"),
    ],
)
def test_bad_inputs_are_refused_in_one_line(change, message, tables):
    with pytest.raises(ValueError, match=message) as error:
        measure_overlap(*change(*tables))
    assert "\n" not in str(error.value)


def test_is_saved_loaded_and_plotted(overlap, tmp_path):
    overlap.save(tmp_path / "a" / "b.json", dataset={"name": "made"})
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["schema_version"] == 2
    assert content["dataset"] == {"name": "made"} and content["verdict"] == overlap.verdict
    assert len(content["relations"]) == 5 * 4 + 5 and len(content["relations"][0]["feature_r2"]) == 24
    loaded = Overlap.load(tmp_path / "a" / "b.json")
    assert (loaded.subjects, loaded.relations) == (overlap.subjects, overlap.relations)
    assert loaded.dataset == {"name": "made"} and loaded.verdict == overlap.verdict
    plot_overlap(overlap, tmp_path / "c" / "d.png")
    assert (tmp_path / "c" / "d.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_version_1_is_read():
    """`overlap-version-1.json` was written by 0.1.0: two members and a copy of the first."""
    path = Path(__file__).parent / "overlap-version-1.json"
    overlap, content = Overlap.load(path), json.loads(path.read_text())
    assert [subject.num_features for subject in overlap.subjects] == [one["width"] for one in content["subjects"]]
    for relation, one in zip(overlap.relations, content["relations"], strict=True):
        assert (list(relation.sources), relation.source_name, relation.target) == (
            one["given"],
            one["source"],
            one["wanted"],
        )
        assert (relation.feature_r2, relation.residual_top1) == (one["features"], one["rest_top1"])
    assert overlap.majority_share == content["guessing"] and overlap.dataset == {"name": "made"}
    assert overlap.verdict[2].startswith("copy repeats halves: R2 1.00")


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 3}, {"relations": []}, {"subjects": [5]}],
    ids=["newer", "no relations", "no subject"],
)
def test_a_broken_file_is_named_with_the_way_out(change, overlap, tmp_path):
    overlap.save(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()) | change))
    with pytest.raises(ValueError, match=r"x\.json is not a comparison file .*--overwrite"):
        Overlap.load(tmp_path / "x.json")


def test_compare_measures_two_members(run, folder):
    code, out, err = run("compare", "pair", "--dataset", "digits", "--limit", "100", "--output", "seen")
    assert code == 0, err
    content = json.loads((folder.parent / "seen" / "digits-limit-100.json").read_text())
    assert [(r["sources"], r["target"]) for r in content["relations"]] == [([1], 0), ([0], 1)]
    assert content["verdict"][0] in out and "member 1 (resnet10t)" in out
    assert "written: seen/digits-limit-100.json" in out
    assert (folder.parent / "seen" / "digits-limit-100.png").is_file()


def test_compare_takes_whole_ensembles_and_prints_json_alone(run, folder):
    words = ["compare", "pair", "random:test_resnet", "--dataset", "digits", "--limit", "60", "--json", "--quiet"]
    code, out, err = run(*words)
    content = json.loads(out)
    assert code == 0 and err == ""
    assert [one["name"] for one in content["subjects"]] == ["0: pair", "1: random:test_resnet"]
    assert content["subjects"][0]["num_features"] == 32 and content["dataset"]["limit"] == 60
    code, _, err = run(*words)
    assert code == 2 and "overlap/digits-limit-60.json is there already; add --overwrite" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["random:test_resnet", "--limit", "30"], "member 0 (test_resnet) is the only member; name another model"),
        (["pair", "--recipe", "cifar10", "--recipe", "mnist"], "compare looks at one dataset; give one --recipe"),
        (["nowhere", "--limit", "30"], "nowhere"),
    ],
)
def test_compare_refuses_in_one_line(words, message, refused, folder):
    refused(["compare", *words], message)


def test_a_table_without_a_split_is_refused():
    rng, y = np.random.default_rng(0), np.arange(40) % 2
    splits = {name: ([rng.normal(size=(40, 4)), rng.normal(size=(40, 3))], y) for name in ("train", "test")}
    with pytest.raises(ValueError, match="the table has the splits train, test but must have validation; add it"):
        measure_overlap(FeatureTable.from_arrays(splits), quiet=True)
