import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

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
from concat_ensemble.features.projection import principal_projection
from concat_ensemble.studies.controls import pixel_table
from concat_ensemble.studies.probing import probe_ensemble, with_head


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
    assert [row.name for row in results.rows] == ["solo", "untrained members", "raw pixels"]


def test_the_test_split_changes_nothing_that_is_fitted(ensemble, digits):
    blank = digits["train"].select([0] * 5)
    other = DatasetDict(digits | {"test": blank})
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
