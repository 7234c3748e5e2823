import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as Undecoded
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsembleImageProcessor,
    LinearProbe,
    assemble,
    extract_features,
    load_data,
)
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names
from concat_ensemble.data.naming import METRICS
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.probes.intervals import (
    central_interval,
    paired_resampled_difference,
    resampled_metrics,
    wilson_interval,
)
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.measuring import collect_convergence_warnings, warn_of_convergence
from concat_ensemble.studies.probing import probe_ensemble, probe_table, with_head
from concat_ensemble.studies.results import Results


@pytest.fixture(scope="module")
def trio(backbone):
    return assemble([backbone(0), backbone(1), backbone(2, channels=(8, 8, 8, 24))])


@pytest.fixture(scope="module")
def probed(trio, digits, backbone):
    return probe_ensemble(trio, digits, name="trio", baselines={"one": assemble([backbone(5)])}, quiet=True)


def test_rows_are_the_ensemble_its_parts_baselines_and_controls(probed):
    results, _ = probed
    assert [(row.name, row.kind, row.num_features, row.num_members) for row in results.rows] == [
        ("trio", "ensemble", 56, 3),
        ("trio, first 2 members", "first_members", 32, 2),
        ("trio, member 0 alone", "member", 16, 1),
        ("trio, member 1 alone", "member", 16, 1),
        ("trio, member 2 alone", "member", 24, 1),
        ("trio, PCA to 24", "projected", 24, 3),
        ("trio, random projection to 24", "projected", 24, 3),
        ("one", "baseline", 16, 1),
        ("untrained members", "control", 56, 3),
        ("raw pixels", "control", 64, 0),
        ("majority class", "control", 0, 0),
    ]
    run = results.rows[0].runs[0]
    assert (run.n_train, run.n_test) == (60, 30), "30 training and 30 validation images: the last fit is on both"


def test_the_cost_of_an_image_is_the_sum_over_the_members(probed, trio):
    results, _ = probed
    alone = [results[f"trio, member {k} alone"].cost for k in range(3)]
    parameters = [sum(tensor.numel() for tensor in member.parameters()) / 1e6 for member in trio.members.values()]
    assert [cost.million_parameters for cost in alone] == pytest.approx(parameters)
    for quantity in ("gflops", "million_parameters", "seconds"):
        whole = [getattr(results[name].cost, quantity) for name in ("trio", "trio, PCA to 24", "untrained members")]
        assert whole == pytest.approx([sum(getattr(cost, quantity) for cost in alone)] * 3) and whole[0] > 0
    assert results["raw pixels"].cost is None and results.hardware


def test_every_accuracy_is_that_of_its_own_features(probed, trio, digits):
    results, probe = probed
    table = extract_features(trio, digits, quiet=True)
    tables = {
        "trio": (table, True),
        "trio, first 2 members": (table.members([0, 1]), True),
        "trio, member 2 alone": (table.members([2]), True),
        "trio, PCA to 24": (principal_projection(table, 24)(table), False),
        "raw pixels": (pixel_table(digits, "L"), True),
    }
    for name, (features, standardize) in tables.items():
        by_hand = LinearProbe(standardize=standardize).fit(features["train"], validation=features["validation"])
        assert results[name].mean == pytest.approx(by_hand.score(features["test"]))
    assert probe.score(table["test"]) == pytest.approx(results["trio"].mean)


def test_results_record_weights_and_training_steps(probed, trio, backbone, digits):
    results, _ = probed
    assert results.members_sha256 == [member["provenance"]["weights_sha256"] for member in trio.config.members]
    assert results["trio"].steps is None, "members in memory do not state their training steps"
    pair = assemble([backbone(0), backbone(1)])
    for member, steps in zip(pair.config.members, (30, 50), strict=True):
        member["provenance"]["steps"] = steps
    rows = probe_ensemble(pair, digits, name="pair", quiet=True)[0]
    assert [
        rows[name].steps for name in ("pair", "pair, member 0 alone", "pair, member 1 alone", "untrained members")
    ] == [80, 30, 50, 0]


def test_a_single_member_has_no_parts(backbone, digits):
    results, _ = probe_ensemble(assemble([backbone(0)]), digits, name="solo", quiet=True)
    assert [row.name for row in results.rows] == ["solo", "untrained members", "raw pixels", "majority class"]


def test_the_test_split_changes_nothing_that_is_fitted(ensemble, digits, images):
    noise = images(["a", "b", "c"] * 2, seed=7).cast_column("image", Undecoded(decode=False))
    noise = noise.select_columns("image").add_column("label", [0, 1, 2] * 2).cast(digits["test"].features)
    other = DatasetDict(digits | {"test": noise})
    (results, probe), (changed, same) = (probe_ensemble(ensemble, data, quiet=True) for data in (digits, other))
    assert np.array_equal(probe.coef_, same.coef_) and np.array_equal(probe.mean_, same.mean_)
    assert [row.runs[0].l2_strength for row in results.rows] == [row.runs[0].l2_strength for row in changed.rows]


def test_the_head_predicts_what_the_probe_predicts(probed, trio, digits, tmp_path):
    _, probe = probed
    with_head(trio, probe, class_names(digits["train"])).save_pretrained(tmp_path)
    model = ConcatEnsembleForImageClassification.from_pretrained(tmp_path)
    processor = ConcatEnsembleImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor([read_image(digits["test"], n) for n in range(30)]))
    expected = probe.logits(output.pooler_output.numpy())
    np.testing.assert_allclose(output.logits.numpy(), expected, atol=2e-3)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.fixture(scope="module")
def lacking(images):
    """The class b has test images but no training images."""
    return load_data(
        DatasetDict(train=images(["a", "c"] * 30), test=images(["a"] * 10 + ["b"] * 4 + ["c"] * 16, seed=1))
    )


def test_classes_without_training_images_do_not_shift_the_others(ensemble, lacking):
    results, probe = probe_ensemble(ensemble, lacking, quiet=True)
    expected = probe.score(extract_features(ensemble, lacking, quiet=True)["test"])
    assert results["ensemble"].mean == pytest.approx(expected)
    assert results["raw pixels"].mean == pytest.approx(26 / 30), (
        "brightness distinguishes a and c; b is never predicted"
    )


def test_a_head_has_a_row_for_every_class(ensemble, lacking):
    _, probe = probe_ensemble(ensemble, lacking, quiet=True)
    model = with_head(ensemble, probe, class_names(lacking["train"]))
    processor = ConcatEnsembleImageProcessor.from_config(ensemble.config)
    with torch.no_grad():
        logits = model(**processor([read_image(lacking["test"], n) for n in range(30)])).logits
    assert logits.shape == (30, 3)
    assert set(logits.argmax(1).tolist()) <= {0, 2}, "a class without training images is not predicted"


def test_two_classes_get_a_head_of_two_rows(ensemble, images):
    data = load_data(images(["a", "b"] * 40))
    _, probe = probe_ensemble(ensemble, data, quiet=True)
    assert with_head(ensemble, probe, ["a", "b"]).classifier.weight.shape == (2, 32)


def test_an_ensemble_with_a_head_is_probed_as_one_without(probed, trio, digits):
    results, probe = probed
    again, _ = probe_ensemble(with_head(trio, probe, ["0", "1", "2"]), digits, name="trio", quiet=True)
    assert again["trio"].mean == results["trio"].mean


def test_a_dataset_with_colors_gets_color_pixels():
    arrays = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    dataset = Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays], "label": ["a", "b"] * 10})
    results, _ = probe_ensemble(assemble("random:test_vit"), load_data(dataset), quiet=True)
    assert results["raw pixels"].num_features == 3 * 8 * 8


# --- metrics, class balance and groups

BRIEF = {"controls": "none", "num_resamples": 0, "quiet": True}


def draw(labels, *, seed, gap=40, repeat=1):
    """8x8 grey images of a random brightness, on average brighter by `gap` for class 1: the classes overlap. `repeat`
    images after one another have the same brightness but for some noise."""
    rng = np.random.default_rng(seed)
    levels = 100 + gap * np.asarray(labels) + np.repeat(rng.normal(0, 25, len(labels) // repeat), repeat)
    pixels = np.clip(levels[:, None, None] + rng.normal(0, 5, (len(labels), 8, 8)), 0, 255).astype(np.uint8)
    columns = {"image": [Image.fromarray(each) for each in pixels], "label": [str(label) for label in labels]}
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def rare():
    """A class of 5% that overlaps with the other."""
    parts = {"train": (200, 1), "validation": (100, 2), "test": (200, 3)}
    return load_data(
        DatasetDict(
            {name: draw([0] * (19 * n // 20) + [1] * (n // 20), seed=seed) for name, (n, seed) in parts.items()}
        )
    )


def by_hand(ensemble, data, metric, **settings):
    """A probe whose L2 strength this metric has chosen, its labels, logits and predictions on the test split."""
    table = extract_features(ensemble, data, quiet=True)
    probe = LinearProbe(metric=metric, **settings).fit(table["train"], validation=table["validation"])
    return probe, table["test"].labels, probe.logits(table["test"]), probe.predict(table["test"])


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_chooses_the_strength_and_carries_the_interval_and_the_test(metric, ensemble, rare):
    results, probe = probe_ensemble(ensemble, rare, metric=metric, **BRIEF)
    expected, labels, logits, predicted = by_hand(ensemble, rare, metric)
    run = results.rows[0].runs[0]
    assert results.metric == metric and run.l2_strength == probe.l2_strength_ == expected.l2_strength_
    margin = logits[:, 1] - logits[:, 0]
    values = {
        "top1": np.mean(predicted == labels),
        "mean_per_class": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "auroc": roc_auc_score(labels, margin),
        "average_precision": average_precision_score(labels, margin),
    }
    assert {name: run.metrics[name] for name in METRICS} == pytest.approx(values)
    assert results.rows[0].mean == pytest.approx(values[metric])
    if metric == "top1":
        return
    draws = {}
    for k, name in enumerate(["ensemble", "ensemble, member 0 alone"]):
        features = ensemble if k == 0 else ensemble.export_active([0])
        _, labels, logits, _ = by_hand(features, rare, metric)
        draws[name] = resampled_metrics(logits, labels, metrics=[metric])[metric]
    assert results.rows[0].interval == pytest.approx(central_interval(draws["ensemble"], values[metric]))
    points = [results[name].mean for name in draws]
    difference, interval, p = paired_resampled_difference(*draws.values(), *points)
    measured = results.difference(*draws)
    assert measured[0] == pytest.approx(difference) and measured[1] == pytest.approx(interval, abs=1e-6)
    assert measured[2] == pytest.approx(p, abs=0.01)


def test_imbalanced_classes_are_compared_in_mean_per_class_recall(ensemble, rare):
    results, _ = probe_ensemble(ensemble, rare, controls="quick", num_resamples=0, quiet=True)
    assert results.metric == "mean_per_class" and results.audit["imbalanced"]
    majority = results["majority class"]
    assert majority.mean == 0.5 and majority.top1[0] == 0.95 and majority.num_features == 0
    assert majority.runs[0].metrics["auroc"] == 0.5 and majority.runs[0].metrics["average_precision"] == 0.05
    assert probe_ensemble(ensemble, rare, metric="top1", **BRIEF)[0].metric == "top1"
    customary = probe_ensemble(ensemble, rare, described={"metric": "auroc"}, **BRIEF)[0]
    assert customary.metric == "auroc", "the recipe's own"


def test_balanced_classes_are_compared_in_top1(probed):
    results, _ = probed
    assert results.metric == "top1" and not results.audit["imbalanced"] and not results.rows[0].runs[0].resampled


def test_balanced_class_weights_reach_every_probe(ensemble, rare):
    results, probe = probe_ensemble(ensemble, rare, class_weight="balanced", **BRIEF)
    expected, *_ = by_hand(ensemble, rare, "mean_per_class", class_weight="balanced")
    assert results.probe["class_weight"] == "balanced"
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-5)


def test_an_unknown_setting_is_refused_before_any_work(ensemble, rare):
    for name, value in (("metric", "accuracy"), ("class_weight", "rare"), ("controls", "some")):
        with pytest.raises(ValueError, match=rf"{name}='{value}' must be"):
            probe_ensemble(ensemble, rare, quiet=True, **{name: value})
    one_class = DatasetDict(rare | {"test": rare["test"].select(range(20))})
    with pytest.raises(ValueError, match="metric='auroc' must have test images of two classes"):
        probe_ensemble(ensemble, one_class, metric="auroc", quiet=True)


def test_every_resample_of_six_training_images_has_both_classes(ensemble, images):
    """Drawn from all six rows at once, one of the classes was missing in 2 / 2^6 of the resamples."""
    data = load_data(
        DatasetDict(
            train=images(["a", "b"] * 2), validation=images(["a", "b"], seed=1), test=images(["a", "b"] * 4, seed=2)
        )
    )
    for seed in range(8):
        settings = {"num_resamples": 6, "seed": seed, "controls": "none", "quiet": True}
        results, _ = probe_ensemble(ensemble, data, **settings)
        assert all(len(row.runs[0].resamples) == 6 for row in results.rows)


@pytest.fixture(scope="module")
def grouped():
    """Twelve groups of five images in each split, each group of one class; none is in two splits."""
    parts = {}
    for place, name in enumerate(("train", "validation", "test")):
        groups = np.repeat(np.arange(12) + 12 * place, 5)
        split = draw(groups % 2, seed=place, gap=25, repeat=5)
        parts[name] = split.add_column("patient", [f"p{group}" for group in groups])
    data = load_data(DatasetDict({name: split.remove_columns("patient") for name, split in parts.items()}))
    return DatasetDict({name: data[name].add_column("group", parts[name]["patient"]) for name in data})


def test_intervals_and_tests_of_grouped_images_are_over_the_groups(ensemble, grouped):
    results, _ = probe_ensemble(ensemble, grouped, **BRIEF)
    assert results.num_groups == 12 and results.metric == "top1"
    _, labels, logits, _ = by_hand(ensemble, grouped, "top1")
    groups = np.array(grouped["test"]["group"])
    draws = resampled_metrics(logits, labels, metrics=["top1"], groups=groups)["top1"]
    assert results.rows[0].interval == pytest.approx(central_interval(draws, results.rows[0].mean))
    images = resampled_metrics(logits, labels, metrics=["top1"])["top1"]
    assert draws.std() > 1.2 * images.std(), "images of a group are alike here"
    _, interval, _ = results.difference("ensemble", "ensemble, member 0 alone")
    assert np.isfinite(interval).all() and results.rows[0].runs[0].resampled


def test_a_single_group_of_test_images_is_refused_before_any_work(ensemble, grouped):
    one = DatasetDict(grouped | {"test": grouped["test"].select(range(5))})
    with pytest.raises(ValueError, match="all of the group 'p24', which leaves no interval"):
        probe_ensemble(ensemble, one, quiet=True)


# --- leaks and controls


def test_test_images_that_are_in_training_are_left_out(ensemble, digits):
    leaking = DatasetDict(digits | {"test": digits["test"].select(range(20))})
    for split in ("train", "validation"):
        leaking[split] = digits[split]
    copies = digits["train"].select(range(7))
    merged = Dataset.from_dict(
        {key: [*leaking["test"][key], *copies[key]] for key in ("image", "label")}, features=copies.features
    )
    results, _ = probe_ensemble(ensemble, DatasetDict(leaking | {"test": merged}), **BRIEF)
    assert results.audit["removed_from_test"] == 7 and results.audit["duplicates_across"]["train/test"] == 7
    assert {row.runs[0].n_test for row in results.rows} == {20}
    clean, _ = probe_ensemble(ensemble, DatasetDict(leaking), **BRIEF)
    assert [row.mean for row in clean.rows] == [row.mean for row in results.rows]


@pytest.mark.parametrize(
    ("controls", "names"),
    [
        ("all", ["untrained members", "raw pixels", "majority class"]),
        ("quick", ["raw pixels", "majority class"]),
        ("none", []),
    ],
)
def test_controls_can_be_left_out(controls, names, ensemble, digits):
    results, _ = probe_ensemble(ensemble, digits, controls=controls, num_resamples=0, quiet=True)
    assert [row.name for row in results.rows if row.kind == "control"] == names and results.controls == controls


def test_untrained_members_have_a_seed_of_their_own(ensemble, digits):
    results, _ = probe_ensemble(ensemble, digits, seed=3, untrained_seed=1, num_resamples=0, quiet=True)
    table = extract_features(untrained_like(ensemble, 1), digits, quiet=True)
    expected = LinearProbe(seed=3).fit(table["train"], validation=table["validation"]).score(table["test"])
    assert results["untrained members"].mean == expected


def test_the_confusion_matrix_is_that_of_the_ensemble(probed, trio, digits):
    results, probe = probed
    test = extract_features(trio, digits, quiet=True)["test"]
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (test.labels, probe.predict(test)), 1)
    assert results.rows[0].runs[0].confusion_matrix.tolist() == expected.tolist()
    assert results.class_names == ["0", "1", "2"]
    assert not any(row.runs[0].confusion for row in results.rows[1:])


def test_many_warnings_of_convergence_become_one():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with collect_convergence_warnings() as messages:
            for strength in (1.0, 0.1):
                warnings.warn(f"no minimum at {strength}", ConvergenceWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
        warn_of_convergence(messages)
        warn_of_convergence([])
    texts = [str(warning.message) for warning in caught]
    assert texts == ["something else", "2 fits of the probes did not converge: no minimum at 1.0"]


# --- features of one's own


def test_a_table_is_probed_as_the_ensemble_that_it_comes_from(trio, digits, probed):
    table = extract_features(trio, digits, quiet=True)
    results, _ = probed
    own = probe_table(table, name="trio", quiet=True)
    assert [row.name for row in own.rows] == [
        *(row.name for row in results.rows if row.kind not in ("baseline", "control")),
        "majority class",
    ]
    for row in own.rows:
        assert row.runs[0].metrics == results[row.name].runs[0].metrics and row.cost is None
    assert own.controls == "quick" and own.metric == "top1" and own.members_sha256 == []


def test_a_table_of_arrays_needs_no_validation_rows_and_comes_back_from_its_file(tmp_path):
    rng = np.random.default_rng(0)
    labels = {"train": np.repeat([0, 1], [190, 10]), "test": np.repeat([0, 1], [190, 10])}
    splits = {name: (rng.normal(size=(200, 5)) + y[:, None], y) for name, y in labels.items()}
    splits["test"][0][:3] = splits["train"][0][:3]
    with pytest.warns(UserWarning, match="also in the train split"):
        table = FeatureTable.from_arrays(splits)
    results = probe_table(table, quiet=True)
    assert results.metric == "mean_per_class" and results.audit["duplicates_across"] == {"train/test": 3}
    assert [row.name for row in results.rows] == ["features", "majority class"]
    probe, test = LinearProbe(metric="mean_per_class").fit(table["train"]), table["test"].select(np.arange(3, 200))
    assert results.audit["removed_from_test"] == 3 and results.rows[0].runs[0].n_test == 197
    assert results.rows[0].mean == pytest.approx(balanced_accuracy_score(test.labels, probe.predict(test)))
    results.save(tmp_path / "x.json")
    assert Results.load(tmp_path / "x.json") == results


def test_a_table_of_several_members_without_validation_rows_has_all_rows():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    splits = {name: ([rng.normal(size=(60, dim)) + y[:, None] for dim in (3, 4)], y) for name in ("train", "test")}
    results = probe_table(FeatureTable.from_arrays(splits), name="own", num_resamples=0, quiet=True)
    assert [row.name for row in results.rows] == [
        "own",
        "own, member 0 alone",
        "own, member 1 alone",
        "own, PCA to 4",
        "own, random projection to 4",
        "majority class",
    ]


def test_groups_of_a_table_are_in_one_split_only():
    rng = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 20), np.repeat(np.arange(10), 4)
    splits = {name: (rng.normal(size=(40, 3)), labels, groups + shift) for name, shift in (("train", 0), ("test", 8))}
    with pytest.warns(UserWarning, match="2 groups are in the train and in the test split"):
        table = FeatureTable.from_arrays(splits)
    results = probe_table(table, num_resamples=0, quiet=True)
    assert results.audit["groups_across"] == {"train/test": 2} and results.audit["removed_from_test"] == 8
    assert results.num_groups == 8 and results.rows[0].runs[0].n_test == 32
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all test rows, or their groups, are also in an"):
        probe_table(FeatureTable.from_arrays(splits | {"test": splits["train"]}), quiet=True)


def test_a_table_without_test_rows_is_refused():
    table = FeatureTable.from_arrays({"train": (np.eye(4), [0, 1, 0, 1])})
    with pytest.raises(ValueError, match="the table has the splits train but must have test"):
        probe_table(table)


def test_a_class_without_training_images_is_a_tie_in_auroc():
    rng, y = np.random.default_rng(0), np.arange(300) % 3
    X = rng.normal(size=(300, 8)).astype(np.float32)
    X[np.arange(300), y] += 2
    seen = (y < 2) & (np.arange(300) < 150)
    splits = {"train": (X[seen], y[seen]), "test": (X[150:], y[150:])}
    table = FeatureTable.from_arrays(splits, class_names=["a", "b", "c"])
    results = probe_table(table, metric="auroc", num_resamples=0, quiet=True)
    run, probe = results.rows[0].runs[0], LinearProbe([results.rows[0].runs[0].l2_strength]).fit(X[seen], y[seen])
    log_probabilities = np.log(probe.predict_proba(X[150:]))
    known = [roc_auc_score(y[150:] == c, log_probabilities[:, c]) for c in (0, 1)]
    assert run.metrics["auroc"] == pytest.approx((sum(known) + 0.5) / 3, abs=1e-3)


def test_a_perfect_score_of_few_images_has_an_interval():
    y = np.array([0] * 18 + [1] * 2)
    shift = np.arange(20)[:, None]
    splits = {"train": (y[:, None] + shift / 100, y), "test": (y[:, None] + shift / 97 + 0.003, y)}
    run = probe_table(FeatureTable.from_arrays(splits), num_resamples=0, quiet=True).rows[0].runs[0]
    assert run.metrics["mean_per_class"] == 1
    assert run.intervals["mean_per_class"] == pytest.approx(wilson_interval(1.0, 2))
    assert run.intervals["top1"] == pytest.approx(wilson_interval(1.0, 20))


def test_a_table_is_audited_as_a_dataset_is():
    """Rows that leak are left out before repetitions are counted; labels that contradict each other are counted."""
    X, y = np.arange(80.0).reshape(40, 2), np.arange(40) % 2
    test = np.concatenate([X[:1].repeat(3, 0), X + 1_000])
    splits = {"train": (np.concatenate([X, X[1:2]]), [*y, 1 - y[1]]), "test": (test, [y[0]] * 3 + [*y])}
    audit = probe_table(FeatureTable.from_arrays(splits), num_resamples=0, quiet=True).audit
    assert audit["removed_from_test"] == 3 and audit["conflicting_labels"] == 1
    assert audit["duplicates_within"] == {"train": 1, "test": 0}
