import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from concat_ensemble import ConcatEnsembleImageProcessor, assemble, extract_features, load_data
from concat_ensemble.data.images import read_image

SHAPES = [(1, 0), (7, 0), (64, 0), (7, 2)]  # batch size (30 images: the last batch of 7 has two), workers


@torch.no_grad()
def one_by_one(model, split):
    """The model's own forward on one image at a time."""
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    return np.concatenate(
        [model(**processor([read_image(split, n)])).pooler_output.numpy() for n in range(len(split))]
    )


@pytest.mark.parametrize(("batch_size", "num_workers"), SHAPES)
def test_rows_are_the_models_own_features_in_order(batch_size, num_workers, ensemble, digits, tmp_path):
    table = extract_features(
        ensemble, digits, batch_size=batch_size, num_workers=num_workers, store=tmp_path, quiet=True
    )
    assert (
        list(table) == ["train", "validation", "test"]
        and table.class_names == ["0", "1", "2"]
        and table.feature_dims == [16, 16]
    )
    for kind in table:
        np.testing.assert_allclose(table[kind].features, one_by_one(ensemble, digits[kind]), atol=1e-5)
        assert table[kind].labels.tolist() == digits[kind]["label"][:]
    assert table["test"].features.dtype == np.float32 and table["test"].labels.dtype == np.int64
    assert table.images_per_second > 0 and table.extracted == sum(map(len, digits.values()))


def test_members_of_two_geometries_are_extracted_together(backbone, digits):
    small = backbone(1, pixels={"input_size": (1, 24, 24)})
    model = assemble([backbone(0), small])
    table = extract_features(model, digits, quiet=True)
    np.testing.assert_allclose(table["test"].features, one_by_one(model, digits["test"]), atol=1e-5)
    np.testing.assert_allclose(
        table.members([1])["test"].features, one_by_one(assemble([small]), digits["test"]), atol=1e-5
    )


def test_members_are_blocks_of_columns_and_a_split_unpacks(table):
    features, labels = table["train"]
    assert table.members([0])["train"].features.tolist() == features[:, :16].tolist()
    assert table.members([1])["train"].features.tolist() == features[:, 16:].tolist()
    swapped = table.members([1, 0])
    assert swapped["train"].features.tolist() == np.hstack([features[:, 16:], features[:, :16]]).tolist()
    assert swapped.feature_dims == [16, 16] and swapped["train"].labels.tolist() == labels.tolist()
    with pytest.raises(KeyError, match="no split 'dev' in the table; it has train, validation, test"):
        table["dev"]


def test_a_timm_model_is_a_table_of_one_block(backbone, digits, table):
    alone = extract_features(backbone(1), digits, quiet=True)
    assert alone.feature_dims == [16]
    np.testing.assert_allclose(alone["test"].features, table.members([1])["test"].features, atol=1e-6)


def test_a_timm_model_with_a_classifier_gives_pooled_features(backbone, digits):
    model = backbone(1, num_classes=3)
    assert extract_features(model, digits, quiet=True).feature_dims == [16]
    assert model.get_classifier().out_features == 3, "the model is not changed"


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        return ViTModel(config).eval()


@pytest.fixture(scope="module")
def colors():
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (20, 20, 20, 3), dtype=np.uint8)
    dataset = Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays], "label": ["a", "b"] * 10})
    return load_data(dataset)


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


@torch.no_grad()
def transformers_features(model, split):
    images = [read_image(split, n).convert("RGB") for n in range(len(split))]
    return model(**PROCESSOR(images, return_tensors="pt")).pooler_output.flatten(1).numpy()


def test_a_transformers_model_is_a_table_of_one_block(vit, colors):
    table = extract_features(vit, colors, PROCESSOR, batch_size=3, quiet=True)
    assert table.feature_dims == [16]
    np.testing.assert_allclose(table["test"].features, transformers_features(vit, colors["test"]), atol=1e-5)


def test_a_saved_transformers_model_uses_the_processor_in_its_folder(vit, colors, tmp_path):
    vit.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    table = extract_features(ViTModel.from_pretrained(tmp_path), colors, quiet=True)
    np.testing.assert_allclose(table["test"].features, transformers_features(vit, colors["test"]), atol=1e-5)


def test_pooled_maps_of_a_transformers_resnet_are_flattened(colors):
    """Its pooler_output is (B, C, 1, 1)."""
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")).eval()
    table = extract_features(model, colors, PROCESSOR, quiet=True)
    assert table.feature_dims == [24]
    np.testing.assert_allclose(table["test"].features, transformers_features(model, colors["test"]), atol=1e-5)


def test_grey_images_are_made_rgb_for_a_transformers_model(vit, digits):
    table = extract_features(vit, digits, PROCESSOR, quiet=True)
    np.testing.assert_allclose(table["test"].features, transformers_features(vit, digits["test"]), atol=1e-5)


def test_a_model_without_a_processor_is_refused(vit, colors):
    with pytest.raises((ValueError, OSError), match="processor"):
        extract_features(vit, colors, quiet=True)


def test_a_plain_dataset_is_loaded_with_the_defaults(backbone, splits):
    table = extract_features(backbone(0), splits, quiet=True)
    expected = extract_features(backbone(0), load_data(splits), quiet=True)
    assert all(np.array_equal(table[kind].features, expected[kind].features) for kind in expected)


def test_the_model_runs_in_evaluation_mode_and_is_not_changed(backbone, digits, table):
    model = assemble([backbone(0), backbone(1)]).train()
    mean = model.members["0"].bn1.running_mean.clone()
    again = extract_features(model, digits, quiet=True)
    assert model.training and torch.equal(model.members["0"].bn1.running_mean, mean)
    assert np.array_equal(again["test"].features, table["test"].features)


def test_frozen_members_stay_frozen_in_evaluation_mode(backbone, digits):
    model = assemble([backbone(0)])
    model.freeze_members()
    model.train()
    extract_features(model, digits, quiet=True)
    assert model.training and not model.members["0"].training


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_features_that_are_not_finite_are_named_with_their_member_and_image(value, backbone, digits):
    model = assemble([backbone(0), backbone(1)])
    model.members["1"].bn1.bias.data[0] = float(value)
    with pytest.raises(ValueError, match=r"member 1 gives NaN or infinite features for image 0 of the train split"):
        extract_features(model, digits, quiet=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_with_its_split_and_file(num_workers, ensemble, images):
    bad = load_data(DatasetDict(train=images(["a", "b"] * 20), test=images(["a", "b"] * 4)))
    rows = list(bad["test"]["image"])
    rows[5] = {"bytes": b"only text", "path": "x.png"}
    bad["test"] = Dataset.from_dict({"image": rows, "label": bad["test"]["label"][:]}, features=bad["test"].features)
    with pytest.raises(ValueError, match=r"the test split, image 5.*x\.png.*remove or repair it") as error:
        extract_features(ensemble, bad, num_workers=num_workers, quiet=True)
    assert "\n" not in str(error.value)


def test_timms_own_forward_gives_the_same_numbers(backbone, digits, table):
    """End to end, with none of our code but the reading of the file."""
    transform = timm.data.create_transform(
        input_size=(1, 32, 32), crop_pct=1.0, mean=(0.5,), std=(0.5,), interpolation="bicubic"
    )
    pixels = torch.stack([transform(read_image(digits["test"], n)) for n in range(30)])
    with torch.no_grad():
        expected = torch.cat([backbone(0)(pixels), backbone(1)(pixels)], dim=1)
    np.testing.assert_allclose(table["test"].features, expected.numpy(), atol=1e-5)
