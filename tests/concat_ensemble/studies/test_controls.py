import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel, load_data
from concat_ensemble.studies.controls import pixel_table, untrained_like


def weights(model):
    return torch.cat([tensor.flatten().float() for tensor in model.members.state_dict().values()])


def test_untrained_members_have_as_many_features_and_depend_on_the_seed_alone(ensemble):
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = (untrained_like(ensemble, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weights(first), weights(again)) and not torch.equal(weights(first), weights(other))
    assert not torch.equal(weights(first), weights(ensemble))
    assert first.config.num_features == ensemble.config.num_features == 32 and not first.training
    kernels = [first.members[k].conv1[0].weight for k in "01"]
    assert not torch.equal(*kernels), "the members differ from each other"


def test_untrained_members_of_some_members_and_of_a_classifier(ensemble, folder):
    part = ConcatEnsembleModel.from_pretrained(folder, active_members=[1])
    assert untrained_like(part, 0).config.num_features == 16
    config = type(ensemble.config)(members=ensemble.config.members, num_labels=3)
    assert untrained_like(ConcatEnsembleForImageClassification(config), 0).config.num_features == 32


def in_memory(*arrays):
    return load_data(
        Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays], "label": ["a", "b"] * (len(arrays) // 2)})
    )


def test_small_images_become_their_pixels_divided_by_255():
    arrays = [np.full((2, 3), n, np.uint8) for n in range(20)]
    table = pixel_table(in_memory(*arrays), "L")
    assert table.feature_dims == [6] and table.class_names == ["a", "b"]
    values = sorted(round(float(row[0]) * 255) for kind in table for row in table[kind].features)
    assert values == list(range(20))
    assert all((row == row[0]).all() for kind in table for row in table[kind].features)


def test_the_colors_of_a_pixel_stay_together():
    arrays = [np.tile(np.array([n, 100, 200], np.uint8), (2, 2, 1)) for n in range(20)]
    rows = pixel_table(in_memory(*arrays), "RGB")["test"].features
    assert rows.shape[1] == 12
    np.testing.assert_allclose(rows[:, 1::3] * 255, 100, atol=1e-4)
    np.testing.assert_allclose(rows[:, 2::3] * 255, 200, atol=1e-4)
    assert pixel_table(in_memory(*arrays), "L").feature_dims == [4]


@pytest.mark.parametrize(
    "shapes", [[(40, 20)], [(8, 8), (8, 9)], [(33, 33)]], ids=["large", "two sizes", "one pixel too large"]
)
def test_other_images_are_resized_to_32_by_32(shapes):
    arrays = [np.full(shapes[n % len(shapes)], n, np.uint8) for n in range(20)]
    table = pixel_table(in_memory(*arrays), "L")
    assert table.feature_dims == [1024]
    assert sorted(round(float(row.mean()) * 255) for kind in table for row in table[kind].features) == list(range(20))


def test_pixels_keep_their_labels(images):
    """Images with label b are bright."""
    data = load_data(DatasetDict(train=images(["b", "a"] * 20), test=images(["a", "b"] * 5)))
    features, labels = pixel_table(data, "L")["test"]
    assert ((features.mean(1) * 255 > 60) == labels).all()
