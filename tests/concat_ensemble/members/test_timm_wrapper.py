"""What transformers' TimmWrapper saved or holds in memory becomes a member with its `pooler_output`."""

import json

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from transformers import (
    AutoImageProcessor,
    AutoModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
)

from concat_ensemble import ConcatEnsembleImageProcessor, assemble

torch.set_num_threads(1)
PIXELS = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "crop_pct": 0.9}
PIXELS |= {"interpolation": "bilinear", "crop_mode": "squash", "license": "mit"}
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32, "global_pool": "avg"}),
    "resnet": ("resnet18.tv_in1k", {"channels": [8, 8, 16, 16]}),  # transformers takes names with tags
    "one channel": ("test_resnet", {"in_chans": 1}),
}
CLASSES = (TimmWrapperModel, TimmWrapperForImageClassification)


def wrapper(name: str, cls=TimmWrapperForImageClassification, **settings):
    architecture, model_args = NETWORKS[name]
    channels = model_args.get("in_chans", 3)
    pixels = PIXELS | {"input_size": [channels, 32, 32]} | {key: PIXELS[key][:channels] for key in ("mean", "std")}
    labels = dict(enumerate(["ant", "bee", "cat"]))
    settings = {"model_args": model_args, "pretrained_cfg": pixels, "id2label": labels} | settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(TimmWrapperConfig(architecture=architecture, **settings)).eval()


@torch.no_grad()
def assert_pooled_alike(ensemble, folder) -> None:
    size = ensemble.config.pixel_shape
    pixels = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    expected = AutoModel.from_pretrained(folder).eval()(pixels, do_pooling=True).pooler_output
    pooled = ensemble(pixels).pooler_output
    if size[0] == 3:
        assert torch.equal(pooled, expected)
    else:  # on some processors two copies of a network of one channel differ in the last bit
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_and_a_model_in_memory_give_its_pooler_output(name, cls, tmp_path):
    model = wrapper(name, cls)
    model.save_pretrained(tmp_path)
    channels = NETWORKS[name][1].get("in_chans", 3)
    for source in (tmp_path, model):
        ensemble = assemble([source])
        assert_pooled_alike(ensemble, tmp_path)
        (member,) = ensemble.config.members
        assert member["architecture"] == NETWORKS[name][0].split(".")[0]
        assert member["model_args"] == NETWORKS[name][1]
        assert member["provenance"]["label_names"] == ["ant", "bee", "cat"]
        assert member["preprocessing"]["mean"] == PIXELS["mean"][:channels]
        assert member["preprocessing"]["crop_mode"] == "squash"


def test_pixels_are_those_of_its_image_processor(tmp_path):
    photos = [Image.fromarray(np.asarray(photo)) for photo in load_sample_images().images]
    wrapper("vit").save_pretrained(tmp_path)
    ensemble = assemble([tmp_path])
    processor = ConcatEnsembleImageProcessor.from_config(ensemble.config)
    expected = AutoImageProcessor.from_pretrained(tmp_path)(photos)["pixel_values"]
    assert torch.equal(processor(photos)["pixel_values"], expected)


def test_shards_half_precision_and_models_that_do_not_pool(tmp_path):
    model = wrapper("vit", TimmWrapperModel, do_pooling=False).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ensemble = assemble([tmp_path])
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        pooled = AutoModel.from_pretrained(tmp_path, dtype="float32").eval()(pixels, do_pooling=True).pooler_output
        assert torch.equal(ensemble(pixels).pooler_output, pooled)
        assert torch.equal(assemble([model])(pixels).pooler_output, pooled)


def test_its_weights_are_a_checkpoint_file_too(tmp_path):
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    by_file, by_folder = assemble([f"test_resnet={tmp_path / 'model.safetensors'}"]), assemble([tmp_path])
    hashes = [model.config.members[0]["provenance"]["weights_sha256"] for model in (by_file, by_folder)]
    assert hashes[0] == hashes[1]


def test_a_trainers_checkpoint_is_a_folder(tmp_path):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = [{"pixel_values": image, "labels": k % 3} for k, image in enumerate(images)]
    options = {"max_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(wrapper("resnet"), TrainingArguments(tmp_path, **options), train_dataset=rows)
    trainer.train()
    ensemble = assemble([tmp_path / "checkpoint-1"])
    assert_pooled_alike(ensemble, tmp_path / "checkpoint-1")
    in_memory = assemble([trainer.model])  # in training mode
    assert (
        in_memory.config.members[0]["provenance"]["weights_sha256"]
        == (ensemble.config.members[0]["provenance"]["weights_sha256"])
    )


def test_names_that_only_count_the_classes_are_left_out(tmp_path):
    wrapper("resnet", id2label=None, num_labels=5).save_pretrained(tmp_path)
    for source in (tmp_path, wrapper("resnet", id2label=None, num_labels=5)):
        assert "label_names" not in assemble([source]).config.members[0]["provenance"]


def edit(folder, **config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def drop_a_key(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["timm_model.conv1.weight"]
    save_file(tensors, folder / "model.safetensors")


def shard(folder, name: str):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"timm_model.conv1.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit(folder, architecture="resnet34"),
            r"does not hold the weights of resnet34; missing: layer1",
        ),
        (
            lambda folder: edit(folder, architecture="resnet180"),
            "'resnet180' is not one of timm.*did you mean resnet18",
        ),
        (lambda folder: edit(folder, model_args={}), r"other shape: layer1\.0\.bn1\.bias \(8,\) for \(64,\)"),
        (lambda folder: edit(folder, model_args={"features_only": True}), "may not hold 'features_only'"),
        (lambda folder: edit(folder, model_args=["depth"]), "is not a model's config"),
        (drop_a_key, r"missing: conv1\.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no checkpoint file .*model\.safetensors"),
        (lambda folder: shard(folder, "model-2.safetensors"), r"no checkpoint file .*model-2\.safetensors"),
        (lambda folder: shard(folder, "../model-1.safetensors"), "is not an index of weights.*bad file name"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(damage, message, tmp_path):
    wrapper("resnet").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        assemble([tmp_path])
    assert "\n" not in str(error.value)


def test_models_in_memory_that_are_no_member_are_named():
    adapted = peft.get_peft_model(wrapper("vit"), peft.LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"PeftModel has adapters.*merge_and_unload\(\)"):
        assemble([adapted])
    assert assemble([adapted.merge_and_unload()]).config.members[0]["provenance"]["label_names"][0] == "ant"
    maps = wrapper("resnet", TimmWrapperModel, model_args={"features_only": True})
    with pytest.raises(ValueError, match="returns list, not pooled features; create it without features_only"):
        assemble([maps])
    changed = wrapper("vit")
    changed.timm_model.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act is ReLU, not GELU"):
        assemble([changed])
