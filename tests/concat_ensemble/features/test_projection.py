import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleImageProcessor, ConcatEnsembleModel, extract_features
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names
from concat_ensemble.features.projection import Projection, principal_projection, random_projection, with_projection
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.studies.probing import probe_ensemble, with_head


@pytest.fixture
def wide():
    """Ten training, five validation and four test rows of two blocks, whose features have very different scales."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    blocks, labels = {}, {}
    for kind, number in {"train": 10, "validation": 5, "test": 4}.items():
        rows = (rng.normal(size=(number, 6)) @ mix * 10.0 ** np.arange(6) + 3).astype(np.float32)
        blocks[kind], labels[kind] = [rows[:, :2], rows[:, 2:]], np.arange(number) % 2
    return FeatureTable(blocks, labels, ["a", "b"])


def test_principal_projection_is_pca_of_the_standardized_training_and_validation_rows(wide):
    fitted = np.vstack([wide["train"].features, wide["validation"].features]).astype(np.float64)
    standard = {kind: (wide[kind].features - fitted.mean(0)) / fitted.std(0) for kind in wide}
    directions = np.linalg.svd(np.vstack([standard["train"], standard["validation"]]), full_matrices=False)[2][:3]
    table = principal_projection(wide, 3)(wide)
    assert (
        table.feature_dims == [3]
        and table.class_names == ["a", "b"]
        and list(table) == ["train", "validation", "test"]
    )
    for kind in table:
        # up to the sign of each direction
        np.testing.assert_allclose(
            np.abs(table[kind].features), np.abs(standard[kind] @ directions.T), rtol=1e-3, atol=1e-4
        )
        assert table[kind].labels.tolist() == wide[kind].labels.tolist()


def test_principal_projection_learns_nothing_from_the_test_rows(wide):
    other = FeatureTable(
        wide.blocks | {"test": [block * 100 + 7 for block in wide.blocks["test"]]}, wide.labels, wide.class_names
    )
    assert np.array_equal(
        principal_projection(wide, 3)(wide)["train"].features, principal_projection(other, 3)(other)["train"].features
    )


def test_principal_projection_to_all_features_keeps_all_distances(wide):
    table = principal_projection(wide, 6)(wide)
    fitted = np.vstack([wide["train"].features, wide["validation"].features])
    standard = (wide["test"].features - fitted.mean(0)) / fitted.std(0)
    apart = [np.linalg.norm(rows[0] - rows[3]) for rows in (table["test"].features, standard)]
    assert apart[0] == pytest.approx(apart[1], rel=1e-4)
    assert principal_projection(wide, 50)(wide).feature_dims == [6], "no more than the table has"


def test_random_projection_keeps_distances_on_average(wide):
    """Of standardized rows; 2,000 directions of variance 1 / 2,000 keep a length to a few per cent."""
    fitted = np.vstack([wide["train"].features, wide["validation"].features])
    standard = (wide["test"].features - fitted.mean(0)) / fitted.std(0)
    table = random_projection(wide, 2000, seed=0)(wide)
    assert table.feature_dims == [2000]
    apart = [np.linalg.norm(rows[0] - rows[3]) for rows in (table["test"].features, standard)]
    assert apart[0] == pytest.approx(apart[1], rel=0.1)
    again, other = (random_projection(wide, 3, seed)(wide)["test"].features for seed in (0, 1))
    assert np.array_equal(random_projection(wide, 3, 0)(wide)["test"].features, again) and not np.array_equal(
        again, other
    )


@pytest.fixture(scope="module")
def compressed(ensemble, digits):
    table = extract_features(ensemble, digits, quiet=True)
    projection = principal_projection(table, 5)
    return with_projection(ensemble, projection), projection(table)


def test_a_projected_ensemble_gives_the_projected_features(compressed, ensemble, digits):
    model, table = compressed
    assert model.config.num_features == 5 and model.config.num_member_features == 32
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    pixels = processor([read_image(digits["test"], n) for n in range(4)], return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, output_member_features=True)
    np.testing.assert_allclose(output.pooler_output.numpy(), table["test"].rows(slice(4)), atol=1e-3)
    assert [member.shape[1] for member in output.member_features] == [16, 16]
    again = extract_features(model, digits, quiet=True)
    assert again.extracted == 0 and again.feature_dims == [5], "the members' features are stored already"
    np.testing.assert_allclose(again["test"].features, table["test"].features, atol=1e-5)
    assert again.keys == table.keys != extract_features(ensemble, digits, quiet=True).keys


def test_a_projection_is_saved_and_loaded_with_the_ensemble(compressed, digits, tmp_path):
    model, _ = compressed
    model.save_pretrained(tmp_path)
    names = [f"{name}.safetensors" for name in ("member-00", "member-01", "projection")]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.projection.weight, model.projection.weight)
    pixels = torch.rand(2, *model.config.pixel_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).pooler_output, model(pixels).pooler_output, atol=1e-3, rtol=1e-4)
    part = ConcatEnsembleModel.from_pretrained(tmp_path, active_members=[1], projection_dim=None)
    assert part.config.num_features == 16 and part.projection is None
    with pytest.raises(
        ValueError, match=r"a projection needs all members; .*ConcatEnsembleModel.*projection_dim=None"
    ):
        ConcatEnsembleModel.from_pretrained(tmp_path, active_members=[1])
    (tmp_path / "projection.safetensors").unlink()
    with pytest.raises(OSError, match="projection"):
        ConcatEnsembleModel.from_pretrained(tmp_path)


def test_a_head_goes_onto_a_projection(compressed, digits, tmp_path):
    model, _ = compressed
    results, probe = probe_ensemble(model, digits, name="small", num_resamples=0, quiet=True)
    assert [row.name for row in results.rows][:2] == ["small", "small, not projected"]
    assert [(row.num_features, row.num_members) for row in results.rows][:3] == [(5, 2), (32, 2), (5, 2)]
    with_head(model, probe, class_names(digits["train"])).save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    processor = ConcatEnsembleImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = classifier(**processor([read_image(digits["test"], n) for n in range(20)], return_tensors="pt"))
    np.testing.assert_allclose(output.logits.numpy(), probe.logits(output.pooler_output.numpy()), atol=2e-3)
    assert AutoModel.from_pretrained(tmp_path).config.num_features == 5, "it is projected without the head too"


def test_a_projection_that_does_not_fit_is_refused(compressed, ensemble):
    model, _ = compressed
    with pytest.raises(ValueError, match="takes 5 features; the ensemble has 32"):
        with_projection(ensemble, Projection(np.ones((5, 2), np.float32), np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="without one; use export_active"):
        with_projection(model, Projection(np.ones((5, 2), np.float32), np.zeros(2, np.float32)))


def test_half_precision_weights_compute_in_float32(ensemble, digits):
    half = ConcatEnsembleModel(ensemble.config)
    half.load_state_dict(ensemble.state_dict())
    half = half.half().eval()
    rounded, full = (extract_features(model, digits, quiet=True)["test"].features for model in (half, ensemble))
    assert next(half.parameters()).dtype == torch.float16, "the model is not changed"
    np.testing.assert_allclose(rounded, full, atol=0.02)
    assert not np.array_equal(rounded, full)
