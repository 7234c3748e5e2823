"""What a user does on a GPU gives what it gives on the CPU. Run with `make gpu`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsembleImageProcessor,
    assemble,
    extract_features,
    load_data,
)
from concat_ensemble.data.images import read_image
from concat_ensemble.features.ntk import NTK
from concat_ensemble.inference.prediction import predict_images

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "training" / "recipes" / "scattered_digits_timecat.yaml"


@pytest.fixture(scope="module")
def images():
    return load_data("digits", classes=[0, 1, 2], limit=60)


@pytest.fixture(scope="module")
def pair():
    """A convolutional and an attention network of grey pixels."""
    torch.manual_seed(0)
    pixels = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    resnet = timm.create_model("resnet10t", in_chans=1, pretrained_cfg_overlay=pixels)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return assemble(
        [resnet, timm.create_model("vit_tiny_patch16_224", in_chans=1, pretrained_cfg_overlay=pixels, **small)]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_cpu_in_all_their_digits(pair, images, workers, tmp_path):
    """In TF32, which torch would take for convolutions, they differ by 1e-3."""
    tables = [
        extract_features(pair, images, device=device, num_workers=workers, store=tmp_path / device, quiet=True)
        for device in ("cuda", "cpu")
    ]
    for split in tables[0]:
        np.testing.assert_allclose(tables[0][split].features, tables[1][split].features, rtol=1e-4, atol=2e-5)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32", "torch's own setting is back"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_is_where_it_was_after_its_features_are_extracted(pair, images, device, tmp_path):
    model = copy.deepcopy(pair).to(device)
    extract_features(model, images, store=tmp_path, quiet=True)
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_bfloat16_features_are_near(pair, images, tmp_path):
    half = extract_features(pair, images, compute=torch.bfloat16, store=tmp_path, quiet=True)["train"].features
    full = extract_features(pair, images, store=tmp_path, quiet=True)["train"].features
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_gradient_features_are_those_of_the_cpu(pair, images, tmp_path):
    tables = [
        extract_features(
            pair, images, ntk=NTK(dim=64), device=device, store=tmp_path / device, batch_size=16, quiet=True
        )
        for device in ("cuda", "cpu")
    ]
    on_gpu, on_cpu = (table["train"].features for table in tables)
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-2, atol=1e-3 * np.abs(on_cpu).max())


def test_compiled_and_folded_ensembles_give_the_same_features(pair):
    model = copy.deepcopy(pair).eval().cuda()
    pixels = torch.randn(4, *model.config.pixel_shape, device="cuda")
    with torch.inference_mode():
        wanted = model(pixels).pooler_output
        for other in (copy.deepcopy(model).fold_batchnorm(), torch.compile(model)):
            torch.testing.assert_close(other(pixels).pooler_output, wanted, rtol=5e-3, atol=5e-3)


def test_device_map_auto_and_pipelines_use_the_gpu(pair, images, tmp_path):
    pair.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map="auto")
    assert loaded.device.type == "cuda"
    images = [read_image(images["train"], number) for number in range(4)]
    processor = ConcatEnsembleImageProcessor.from_config(pair.config)
    features = pipeline("image-feature-extraction", model=loaded, image_processor=processor, pool=True)(images)
    with torch.inference_mode():
        wanted = pair(**processor(images, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(np.concatenate(features), wanted.numpy(), rtol=2e-2, atol=1e-2)


def test_predictions_are_those_of_the_cpu(pair, images, tmp_path):
    config = copy.deepcopy(pair.config)
    config.num_labels = 3
    torch.manual_seed(0)
    model = ConcatEnsembleForImageClassification(config).eval()
    for number in range(8):
        read_image(images["train"], number).save(tmp_path / f"{number}.png")
    on_cpu = predict_images(model, tmp_path, quiet=True).probabilities
    on_gpu = predict_images(model.cuda(), tmp_path, quiet=True).probabilities
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)


@pytest.mark.parametrize(
    "changes", [[], ["--mixed-precision", "bf16"], ["--mixed-precision", "fp16"], ["--compile", "true"]]
)
def test_members_are_trained_on_the_gpu(changes, tmp_path):
    words = ["--smoke", "--members", "[2]", "--wide-steps", "0", "--snapshots", "0", "--output", str(tmp_path)]
    program = [sys.executable, "-m", "concat_ensemble.training.pretraining", str(RECIPE), *words, *changes]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        folder = tmp_path / "members" / f"cat2-{number}"
        compute = json.loads((folder / "config.json").read_text())["provenance"]["compute"]
        assert compute["device"] == "cuda"
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_processor_takes_images_from_the_gpu_and_puts_pixels_there(pair):
    processor = ConcatEnsembleImageProcessor.from_config(pair.config)
    images = torch.rand(3, 1, 40, 50)
    expected = processor(images)["pixel_values"]
    pixels = processor(images.cuda().requires_grad_(), device="cuda")["pixel_values"]
    assert pixels.device.type == "cuda" and torch.equal(pixels.cpu(), expected)
    assert torch.equal(processor(images.cuda())["pixel_values"], expected)


def test_probe_runs_from_the_command_line(pair, tmp_path):
    pair.save_pretrained(tmp_path / "pair")
    words = ["probe", str(tmp_path / "pair"), "--dataset", "digits", "--limit", "100", "--save-head"]
    done = subprocess.run(
        [sys.executable, "-c", "from concat_ensemble.commands.app import main; main()", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "untrained members" in done.stdout, done.stderr
