import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from concat_ensemble import ConcatEnsembleImageProcessor, assemble, extract_features, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.features import extraction
from concat_ensemble.features.store import stored_blocks

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
    first, second = (member["architecture"] for member in ensemble.config.members)
    assert table.member_names == [f"{first} (0)", f"{second} (1)"] and f"{second} (1) (16)" in repr(table)
    assert table.members([1]).member_names == [f"{second} (1)"]
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


# --- images that cannot be read --------------------------------------------------------------------------------------


def stored_rows(store) -> int:
    """Images that have a row, in the block that has the fewest."""
    return min(block["images"] for block in stored_blocks(store))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_bad_images_are_named_and_the_others_are_stored_first(
    num_workers, ensemble, damaged, bad_images, tmp_path
):
    data = damaged(train=list(bad_images), validation=["cut.jpg"], test=["text.png", "missing"])
    with pytest.raises(ValueError, match="11 of 50 images cannot be used: the train split, image 3") as error:
        extract_features(ensemble, data, num_workers=num_workers, batch_size=7, store=tmp_path, quiet=True)
    message = str(error.value)
    for row, name in enumerate(bad_images, start=3):
        place = f"image {row}" if name == "null" else rf"image {row} \(.*{name}.*\)"
        assert re.search(rf"the train split, {place}: \w", message), (name, message)
    assert "the validation split, image 3 (cut.jpg): " in message, "the same bytes as in the training split"
    assert "the test split, image 3 (text.png): it is not an image in one of the formats BMP" in message
    assert "the test split, image 4 (/nonesuch/missing.png): " in message
    assert message.endswith("remove or repair them, or leave them out with skip_bad=True.")
    assert "\n" not in message and "0x" not in message and "more" not in message
    assert stored_rows(tmp_path) == 50 - 11
    again = extract_features(ensemble, data, store=tmp_path, skip_bad=True, quiet=True)
    assert again.extracted == 0, "a second run reads what the first has stored"


def test_without_bad_images_labels_and_groups_fit_the_features(ensemble, damaged, bad_images, tmp_path):
    names = list(bad_images)
    data, whole = damaged(train=names, test=["empty.png"]), damaged()
    table = extract_features(ensemble, data, store=tmp_path / "bad", skip_bad=True, quiet=True)
    expected = extract_features(ensemble, whole, store=tmp_path / "whole", quiet=True)
    assert table.skipped == {"train": [*range(3, 3 + len(names))], "validation": [], "test": [3]}
    assert expected.skipped is None and table.members([1]).skipped == table.skipped
    for kind in table:
        rows = [row for row in range(len(whole[kind])) if row not in table.skipped[kind]]
        np.testing.assert_allclose(table[kind].features, expected[kind].features[rows], atol=1e-6)
        assert table[kind].labels.tolist() == expected[kind].labels[rows].tolist()
        assert table[kind].groups.tolist() == [f"{kind} {row}" for row in rows]


def test_more_than_twenty_bad_images_are_counted(ensemble, damaged):
    with pytest.raises(ValueError, match=r"25 of 50 images.*; and 5 more; remove or repair them") as error:
        extract_features(ensemble, damaged(train=["null"] * 25), quiet=True)
    assert str(error.value).count("the train split, image ") == 20


def test_one_bad_image_is_named_in_the_singular(ensemble, damaged):
    with pytest.raises(
        ValueError, match=r"^1 of 50 images cannot be used: .* repair it, or leave it out with skip_bad"
    ):
        extract_features(ensemble, damaged(test=["empty.png"]), quiet=True)


def test_a_split_or_a_class_without_any_usable_image_is_refused_also_with_skip_bad(ensemble, damaged, bad_images):
    data = damaged()
    data["test"] = damaged(test=["empty.png"] * 7)["test"].select(range(3, 10))
    with pytest.raises(ValueError, match=r"no image of the test split can be used; 7 of 47 images.*the file is empty"):
        extract_features(ensemble, data, skip_bad=True, quiet=True)
    data = damaged()
    columns = data["train"].to_dict()
    columns["image"] = [
        None if label else image for image, label in zip(columns["image"], columns["label"], strict=True)
    ]
    data["train"] = Dataset.from_dict(columns, features=data["train"].features)
    with pytest.raises(ValueError, match=r"of these classes can be used: b; 16 of 50 .*with classes\."):
        extract_features(ensemble, data, skip_bad=True, quiet=True)


def test_extraction_gives_up_if_none_of_the_first_images_can_be_read(ensemble, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 8)
    data = damaged(train=["null"] * 29)
    data["train"] = data["train"].select(range(3, 32))
    with pytest.raises(
        ValueError, match=r"none of the first 8 images can be used, so the others were not tried; 8 of"
    ):
        extract_features(ensemble, data, skip_bad=True, batch_size=4, store=tmp_path, quiet=True)


def test_many_bad_images_do_not_stop_a_run_that_has_stored_others(ensemble, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 8)
    data = damaged(train=["null"] * 25)
    tables = [extract_features(ensemble, data, skip_bad=True, store=tmp_path, quiet=True) for _ in range(2)]
    assert [table.extracted for table in tables] == [25, 0]
    assert tables[0].skipped == tables[1].skipped == {"train": [*range(3, 28)], "validation": [], "test": []}


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_a_run_that_goes_on_stores_the_same_files_whatever_images_are_bad(
    batch_size, ensemble, damaged, bad_images, tmp_path, contents, monkeypatch
):
    """A kill leaves some whole shards; the bad images are met again, but must not move the others."""
    monkeypatch.setattr(extraction, "SHARD_IMAGES", 8)
    data = damaged(train=list(bad_images), test=["cut.jpg", "null"])
    settings = {"store": tmp_path, "skip_bad": True, "batch_size": batch_size, "quiet": True}
    extract_features(ensemble, data, **settings)
    files = sorted(tmp_path.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    expected = {str(path): path.read_bytes() for path in files}
    assert len(files) == 2 * 5  # 40 readable images
    for kept in (3, 6):  # one member may have a shard that the other has not
        for path in files[kept:]:
            path.unlink()
        extract_features(ensemble, data, **settings)
        assert {str(path): path.read_bytes() for path in tmp_path.glob("*/*.safetensors")} == expected


class Failing(ViTImageProcessor):
    """Fails for bright images, as a processor may for images that PIL itself can read."""

    def preprocess(self, images, **kwargs):
        if np.asarray(images[0]).mean() > 120:
            raise KeyError("bright")
        return super().preprocess(images, **kwargs)


def test_images_for_which_the_processor_fails_are_named_too(vit, images, tmp_path):
    data = load_data(DatasetDict(train=images(["a", "b"] * 10), test=images(["a", "b", "c"] * 4)))
    processor = Failing(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match=r"4 of 32 images .*the test split, image 2: KeyError: 'bright'"):
        extract_features(vit, data, processor, store=tmp_path, quiet=True)


def test_a_processor_without_one_size_is_refused(vit, images):
    data = load_data(DatasetDict(train=images(["a", "b"] * 10), test=images(["a", "b"] * 4)))
    pictures = [Image.new("RGB", (20, 20 + n % 2), (n, n, n)) for n in range(8)]
    sizes = Dataset.from_dict({"image": pictures, "label": [0, 1] * 4})
    data["test"] = load_data(DatasetDict(train=sizes, test=sizes))["test"].cast(data["test"].features)
    with pytest.raises(ValueError, match=r"processor=\.\.\. makes pixel_values of several shapes.*must make one"):
        extract_features(vit, data, ViTImageProcessor(do_resize=False), batch_size=50, quiet=True)


def test_extraction_says_how_far_it_is_unless_quiet(ensemble, damaged, tmp_path, capsys):
    data = damaged(train=["null"])
    extract_features(ensemble, data, store=tmp_path, skip_bad=True)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == "" and first == "features: 50 images" and last.startswith("features: 50 of 50 images in ")
    extract_features(ensemble, data, store=tmp_path / "quiet", skip_bad=True, quiet=True)
    assert capsys.readouterr() == ("", "")


SHARED = """
import json, pickle, sys
from pathlib import Path
from accelerate import PartialState
state = PartialState(cpu=True)
assert state.num_processes == 2
import torch
torch.set_num_threads(1)
from concat_ensemble.features import extraction
from concat_ensemble import ConcatEnsembleModel, extract_features
extraction.SHARD_IMAGES = 8
model, store = ConcatEnsembleModel.from_pretrained(sys.argv[1]), Path(sys.argv[3])
data = pickle.loads(Path(sys.argv[2]).read_bytes())
try:
    extract_features(model, data, store=store)
except ValueError as error:
    message = str(error)
table = extract_features(model, data, store=store, skip_bad=True)
rows = {"message": message, "skipped": table.skipped, "features": table["train"].features.tolist()}
Path(f"{sys.argv[3]}-{state.process_index}.json").write_text(json.dumps(rows))
"""


def test_processes_name_the_bad_images_of_all_of_them(ensemble, damaged, bad_images, tmp_path):
    data = damaged(train=list(bad_images), validation=["cut.jpg"], test=["null"])
    expected = extract_features(ensemble, data, skip_bad=True, store=tmp_path / "alone", quiet=True)
    (tmp_path / "data").write_bytes(pickle.dumps(data))  # `datasets` saves no missing files
    ensemble.save_pretrained(tmp_path / "model")
    (tmp_path / "shared.py").write_text(SHARED)
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", tmp_path / "shared.py"]
    words += [tmp_path / name for name in ("model", "data", "store")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"store-{number}.json").read_text()) for number in range(2))
    assert first == second and first["skipped"] == expected.skipped
    assert first["message"].startswith("10 of 50 images cannot be used: the train split, image 3 (cut.jpg)")
    np.testing.assert_allclose(first["features"], expected["train"].features, atol=1e-6)
    assert "features (process 1 of 2): " in done.stderr and "process 2 of 2" not in done.stderr
