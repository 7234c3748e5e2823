import base64
import dataclasses
import json

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concat_ensemble.probes.intervals import paired_resampled_difference
from concat_ensemble.probes.repeats import estimate_over_repeats_and_images
from concat_ensemble.studies.results import Results, Row, Run, pack_bits, pack_numbers


def test_mean_and_students_interval_by_hand(study):
    """0.79, 0.8, 0.81: mean 0.8, deviation 0.01, t(2 degrees) = 4.302653, half 4.302653 * 0.01 / sqrt 3 = 0.02484."""
    row = study(pair=[0.79, 0.8, 0.81])["pair"]
    assert row.mean == pytest.approx(0.8)
    assert row.interval == pytest.approx((0.7751586, 0.8248414), abs=1e-6)


def test_students_interval_that_would_leave_0_to_1_is_taken_on_the_logit_scale(study):
    """0.7, 0.8, 0.9 would reach 1.048. Of logit 0.8 = 1.386294, half 0.248414 / (0.8 * 0.2) = 1.552588: from
    1 / (1 + e^0.166293) to 1 / (1 + e^-2.938882)."""
    assert study(pair=[0.7, 0.8, 0.9])["pair"].interval == pytest.approx((0.458522, 0.949735), abs=1e-5)


def test_all_images_right_in_all_repeats_have_wilsons_interval_over_them(study):
    """300 images: z^2 = 3.841459, from 1 / (1 + z^2 / 300)."""
    assert study(pair=[1.0, 1.0, 1.0])["pair"].interval == (pytest.approx(0.987357, abs=1e-6), 1.0)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_no_interval_leaves_0_to_1_and_each_holds_the_mean(counts):
    runs = [Run(seed, {"top1": count / 100}, 0.1, 50, 100) for seed, count in enumerate(counts)]
    row = Row("a", "ensemble", 4, runs=runs)
    low, high = row.interval
    assert 0 <= low <= row.mean + 1e-12 and row.mean - 1e-12 <= high <= 1
    other = Row("b", "member", 4, runs=[dataclasses.replace(run, metrics={"top1": 0.0}) for run in runs])
    if len(counts) > 1:
        low, high = Results("a", {}, {}, [row, other]).difference("a", "b")[1]
        assert -1 <= low <= high <= 1


def test_one_repeat_has_wilsons_interval(study):
    assert study(pair=[0.5])["pair"].interval == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_difference_is_paired(study):
    """0.1, 0.2, 0.3 repeat by repeat, though each row moves by far more."""
    results = study(pair=[0.5, 0.9, 0.7], other=[0.4, 0.7, 0.4])
    mean, interval, p = results.difference("pair", "other")
    assert mean == pytest.approx(0.2) and interval == pytest.approx((0.2 - 0.248414, 0.2 + 0.248414), abs=1e-6)
    assert p == pytest.approx(0.0742, abs=1e-4), "t = 0.2 / (0.1 / sqrt 3) = 3.4641: p = 1 - t / sqrt(t^2 + 2)"
    assert results.difference("other", "pair")[0] == pytest.approx(-0.2)


def test_one_repeat_is_paired_image_by_image():
    """Of ten images the first predicts 0 to 7, the second 0, 1, 8: six wins, one loss. McNemar: 2 * (1 + 7) / 2^7."""
    correct = [np.isin(np.arange(10), images) for images in (range(8), [0, 1, 8])]
    runs = [Run(0, {"top1": bits.mean()}, 0.1, 50, 10, correct=pack_bits(bits)) for bits in correct]
    rows = [Row(name, "ensemble", 4, runs=[run]) for name, run in zip("ab", runs, strict=True)]
    results = Results("a", {}, {}, rows)
    mean, (low, high), p = results.difference("a", "b")
    assert mean == pytest.approx(0.5) and p == pytest.approx(16 / 128)
    assert low <= 0.5 <= high and low in np.arange(-10, 11) / 10
    for row in rows:
        row.runs[0].correct = ""
    assert results.difference("a", "b")[1:] == ((-np.inf, np.inf), 1.0), "an older file does not record which images"


def test_the_deviation_over_resamples_by_hand(study):
    results = study(pair=[0.5, 0.6])
    assert results["pair"].resample_deviation is None
    results["pair"].runs[0].resamples, results["pair"].runs[1].resamples = [0.4, 0.5, 0.6], [0.5, 0.5, 0.5]
    assert results["pair"].resample_deviation == pytest.approx((0.01 / 2) ** 0.5), "variances 0.01 and 0"


def test_comes_back_from_its_file_as_it_was(study, tmp_path):
    results = study(pair=[0.5, 0.6], other=[0.4, 0.3])
    results.save(tmp_path / "deep" / "down" / "x.json")
    assert Results.load(tmp_path / "deep" / "down" / "x.json") == results
    assert [path.name for path in (tmp_path / "deep" / "down").iterdir()] == ["x.json"], "nothing is left beside it"
    assert json.loads((tmp_path / "deep" / "down" / "x.json").read_text())["protocol"] == results.protocol


def test_merged_repeats_are_rows_with_several_runs(study):
    one, two = study(pair=[0.5], other=[0.4]), study({"seed": 1}, pair=[0.7], other=[0.3])
    merged = Results.merged([one, two])
    assert merged["pair"].top1.tolist() == [0.5, 0.7] and merged["other"].top1.tolist() == [0.4, 0.3]
    assert merged.repeats == 2 and one.repeats == 1, "the merged results stay as they are"
    assert merged.protocol == one.protocol


@pytest.mark.parametrize(
    "other",
    [
        lambda study: study(pair=[0.5]),
        lambda study: study(other=[0.4], pair=[0.5]),
        lambda study: study({"limit": 5}, pair=[0.5], other=[0.4]),
    ],
    ids=["a row less", "another order", "other data"],
)
def test_results_of_different_protocols_are_not_merged(other, study):
    with pytest.raises(ValueError, match="repeats differ in protocol or rows"):
        Results.merged([study(pair=[0.5], other=[0.4]), other(study)])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "mnist"},
        {"classes": [5]},
        {"limit": 10},
        {"revision": "v2"},
        {"test_size": 0.3},
        {"columns": ["a", "b"]},
    ],
)
def test_the_protocol_changes_with_the_data(changes, study):
    assert study(changes, pair=[0.5]).protocol != study(pair=[0.5]).protocol


def test_the_protocol_changes_with_the_probe_but_not_with_seed_or_outcome(study):
    first, other = study(pair=[0.5]), study(pair=[0.5])
    other.probe = other.probe | {"l2_strengths": [1.0]}
    assert other.protocol != first.protocol
    assert study({"seed": 7}, pair=[0.9, 0.8], other=[0.1, 0.2]).protocol == first.protocol
    assert len(first.protocol) == 8 and int(first.protocol, 16) >= 0


def test_rows_are_found_by_name(study):
    results = study(pair=[0.5], other=[0.4])
    assert "other" in results and "another" not in results
    with pytest.raises(KeyError, match="another"):
        results["another"]


def test_rows_without_runs_or_steps_survive(tmp_path):
    results = Results("e", {}, {}, [Row("a", "ensemble", 3, runs=[Run(0, {"top1": 1.0}, 0.1, 5, 5)])])
    results.save(tmp_path / "x.json")
    assert Results.load(tmp_path / "x.json").rows[0].steps is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'{"protocol": "x"}',
        b'{"protocol": "x", "rows": [{"name": "a"}]}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_file_is_named_with_the_way_out(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not a results file .*probe again with --overwrite"):
        Results.load(tmp_path / "x.json")


def test_a_file_of_a_newer_version_is_refused(study, tmp_path):
    study(pair=[0.5]).save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text()) | {"schema_version": 3}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"x\.json is not a results file .*schema_version=3"):
        Results.load(tmp_path / "x.json")


def test_repeats_may_score_other_numbers_of_test_images(study):
    """An audit leaves other images out for each seed; another limit is another measurement."""
    first, second = (study({"test_images": number, "limit": 100}, pair=[0.5], member=[0.4]) for number in (90, 95))
    assert Results.merged([first, second]).repeats == 2
    with pytest.raises(ValueError, match="repeats differ in protocol"):
        Results.merged([first, study({"test_images": 90, "limit": 50}, pair=[0.5], member=[0.4])])


# --- other metrics than top-1, and groups


def metric_results(metric: str = "auroc", audit: dict | None = None) -> Results:
    """Two rows of one repeat on 10 test images, with four resamples each."""
    rows = []
    for name, value, resampled in (("a", 0.9, [0.8, 0.85, 0.9, 0.95]), ("b", 0.6, [0.5, 0.6, 0.7, 0.6])):
        metrics, intervals = {"top1": 0.5, metric: value}, {metric: [min(resampled), max(resampled)]}
        run = Run(0, metrics, 0.1, 50, 10, intervals, correct=pack_bits(np.arange(10) < 5))
        run.resampled = pack_numbers(np.array(resampled), "<f4")
        rows.append(Row(name, "ensemble", 4, runs=[run]))
    return Results("a", {}, {"metric": metric}, rows, audit=audit)


def test_rows_are_compared_in_the_metric_of_the_probe():
    """Top-1 is the same in both rows. The paired differences of the resamples are 0.3, 0.25, 0.2 and 0.35, of mean
    0.275; they are shifted to the mean 0.3."""
    results = metric_results()
    assert results.metric == "auroc" and results["a"].mean == 0.9 and results["a"].top1.tolist() == [0.5]
    assert results["b"].interval == (0.5, 0.7)
    difference, (low, high), p = results.difference("a", "b")
    assert difference == pytest.approx(0.3)
    expected = np.percentile([0.225, 0.275, 0.325, 0.375], [2.5, 97.5])
    assert [low, high] == pytest.approx(expected.tolist(), abs=1e-6)
    exact = paired_resampled_difference(*(results[name].runs[0].resampled_values for name in "ab"), 0.9, 0.6)
    assert p == exact[2]


def test_top1_of_images_in_groups_has_the_interval_and_the_test_of_the_groups():
    results = metric_results("top1", {"groups": {"train": 9, "test": 3}})
    results["a"].runs[0].metrics["top1"] = 0.9
    assert results.num_groups == 3 and results["a"].interval == (0.8, 0.95)
    expected = np.percentile([0.225, 0.275, 0.325, 0.375], [2.5, 97.5])
    assert results.difference("a", "b")[1] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_metric_of_several_repeats_is_compared_over_the_repeats(study):
    results = study(pair=[0.5, 0.9, 0.7], other=[0.4, 0.7, 0.4])
    results.probe["metric"] = "macro_f1"  # half of top-1 in these results
    results = dataclasses.replace(results)
    assert results["pair"].values.tolist() == [0.25, 0.45, 0.35]
    assert results.difference("pair", "other")[:2] == (
        pytest.approx(0.1),
        pytest.approx((-0.024207, 0.224207), abs=1e-6),
    )


def test_a_metric_comes_back_from_its_file(tmp_path):
    results = metric_results()
    results["a"].runs[0].confusion, results.class_names = pack_numbers(np.array([[5, 0], [2, 3]]), "<u4"), ["x", "y"]
    results.save(tmp_path / "x.json")
    again = Results.load(tmp_path / "x.json")
    assert again == results and again["a"].metric == "auroc" and again["a"].mean == 0.9
    assert again["a"].runs[0].confusion_matrix.tolist() == [[5, 0], [2, 3]]


def edit(results, path, change):
    results.save(path)
    content = msgspec.json.decode(path.read_bytes())
    change(content, content["rows"][0]["runs"][0])
    path.write_bytes(msgspec.json.encode(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content, run: content["probe"].update(metric="accuracy"),
        lambda content, run: content["probe"].update(metric=["auroc"]),
        lambda content, run: content.update(controls="some"),
        lambda content, run: content.update(audit=[1]),
        lambda content, run: content.update(audit={"groups": {"train": 3}}),
        lambda content, run: content.update(audit={"groups": 3}),
        lambda content, run: content.update(audit={"num_images": {"train": -1}}),
        lambda content, run: content.update(audit={"classes": {"a": {"train": -1}, "b": {"train": 1}}}),
        lambda content, run: content.update(class_names=["x"] * 101),
        lambda content, run: run["metrics"].pop("auroc"),
        lambda content, run: run["metrics"].update(auroc=1.5),
        lambda content, run: run["metrics"].update(average_precision=-1),
        lambda content, run: run["intervals"].clear(),
        lambda content, run: run["intervals"].update(auroc=[0.1]),
        lambda content, run: run["intervals"].update(auroc=[0.9, 0.1]),
        lambda content, run: run["intervals"].update(auroc=[0.5, 2.0]),
        lambda content, run: run.update(resampled="<script>"),
        lambda content, run: run.update(resampled=base64.b64encode(b"123").decode()),
        lambda content, run: run.update(resampled=pack_numbers(np.full(4, np.nan), "<f4")),
        lambda content, run: run.update(resampled=pack_numbers(np.full(3, 0.5), "<f4")),
        lambda content, run: run.update(resampled=pack_numbers(np.full(20_000, 0.5), "<f4")),
        lambda content, run: run.update(resampled=""),
        lambda content, run: run.update(confusion=pack_numbers(np.array([10]), "<u4")),
        lambda content, run: content.update(class_names=["x"]) or run.update(confusion=pack_numbers([9], "<u4")),
        lambda content, run: content.update(class_names=["x"]) or run.update(confusion=pack_numbers([5, 5], "<u4")),
        lambda content, run: content.update(class_names=["x", 2]) or run.update(confusion=""),
        lambda content, run: run.update(at_edge="yes"),
    ],
)
def test_values_that_no_probe_gives_are_refused(change, tmp_path):
    edit(metric_results(), tmp_path / "x.json", change)
    with pytest.raises(ValueError, match=r"x\.json is not a results file .*probe again with --overwrite"):
        Results.load(tmp_path / "x.json")


def test_repeats_that_differ_by_the_same_are_no_certainty(study):
    difference, (low, high), p = study(pair=[0.6, 0.7], other=[0.4, 0.5]).difference("pair", "other")
    assert difference == pytest.approx(0.2) and (low, high) == (-1, 1) and p == 1


def shared(rows_of_bits, digest="abc"):
    """Results of two rows over repeats on the same test images, from (row, repeats, images) bits."""
    rows = []
    for name, repeats in zip("ab", rows_of_bits, strict=True):
        runs = [
            Run(seed, {"top1": bits.mean()}, 0.1, 50, len(bits), correct=pack_bits(bits))
            for seed, bits in enumerate(repeats)
        ]
        rows.append(Row(name, "ensemble", 4, runs=runs))
    repeats = [
        Results("e", {}, {}, [dataclasses.replace(row, runs=[row.runs[k]]) for row in rows], audit=audit)
        for k, audit in enumerate({"test_sha256": digest or str(k)} for k in range(len(rows[0].runs)))
    ]
    return Results.merged(repeats)


def test_repeats_that_share_their_images_are_compared_over_images_too():
    """One network on one test split: only the training images of the probe vary, and repeats nearly agree."""
    rng = np.random.default_rng(0)
    easy = rng.random((2, 1, 400)) < np.array([0.9, 0.86])[:, None, None]
    bits = easy ^ (rng.random((2, 5, 400)) < 0.005)
    results, apart = shared(bits), shared(bits, digest="")
    assert results.audit["test_sha256"] == "abc" and apart.audit["test_sha256"] == ""
    difference, (low, high), p = results.difference("a", "b")
    expected = estimate_over_repeats_and_images(bits[0].astype(float) - bits[1])
    assert (difference, low, high, p) == pytest.approx(
        (expected.mean, *expected.interval, expected.p_value()), abs=1e-12
    )
    _, (narrow_low, narrow_high), _ = apart.difference("a", "b")
    assert high - low > 3 * (narrow_high - narrow_low)
    (low, high), (narrow_low, narrow_high) = results["a"].interval, apart["a"].interval
    assert high - low > 3 * (narrow_high - narrow_low) and low < results["a"].mean < high


def test_results_remember_whether_repeats_share_their_images(tmp_path):
    results = shared(np.random.default_rng(0).random((2, 3, 40)) < 0.8)
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again.difference("a", "b") == results.difference("a", "b") and again["a"].interval == results["a"].interval
