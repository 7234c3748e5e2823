import json

import numpy as np
import pytest

from concat_ensemble.studies.results import Results, Row, Run, pack_bits


def test_mean_and_students_interval_by_hand(study):
    """0.7, 0.8, 0.9: mean 0.8, deviation 0.1, t(2 degrees) = 4.302653, half 4.302653 * 0.1 / sqrt 3 = 0.248414."""
    row = study(pair=[0.7, 0.8, 0.9])["pair"]
    assert row.mean == pytest.approx(0.8)
    assert row.interval == pytest.approx((0.551586, 1.048414), abs=1e-6)


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
