"""Checkpoints that timm's `CheckpointSaver` writes for its `train.py`, compared with what timm loads from them."""

import json
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3

from concat_ensemble import assemble

ARGS = dict.fromkeys(["input_size", "in_chans", "img_size", "mean", "std", "crop_pct", "crop_mode", "gp", "bn_eps"])
ARGS |= {"interpolation": "", "model_kwargs": {}, "lr": 0.05, "data_dir": "images", "opt": "adamw", "seed": 42}

METRIC = np.float64(70.5)


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(network, model=..., ...)`: path of what `train.py` writes after a step with these arguments."""

    def save(network, ema=ModelEmaV3, metric=METRIC, wrap=lambda network: network, **args):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        averaged = ema(network, decay=0.5) if ema else None
        channels, *size = timm.models.get_model_input_config(network)["input_size"]
        network(torch.randn(2, channels, *size)).square().sum().backward()
        optimizer.step()
        if averaged:
            averaged.update(network)
        saver = CheckpointSaver(
            wrap(network),
            optimizer,
            args=Namespace(**ARGS | args),
            model_ema=averaged,
            amp_scaler=timm.utils.NativeScaler(device="cpu"),
            checkpoint_dir=str(tmp_path),
            recovery_dir=str(tmp_path),
        )
        saver.save_checkpoint(3, metric)
        return tmp_path / ("last.pth.tar" if metric is None else "model_best.pth.tar")

    return save


@torch.no_grad()
def assert_timms_features(ensemble, path, architecture, **model_args):
    numpys = [np._core.multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64))]
    with torch.serialization.safe_globals(numpys):
        expected = timm.create_model(architecture, num_classes=5, checkpoint_path=str(path), **model_args).eval()
    pixels = torch.randn(2, *ensemble.config.members[0]["preprocessing"]["input_size"])
    pooled = expected.forward_head(expected.forward_features(pixels), pre_logits=True)
    assert torch.equal(ensemble.members["0"](pixels), pooled)


VIT = {"img_size": 96, "in_chans": 4, "global_pool": "avg"}


@pytest.mark.parametrize("ema", [ModelEmaV2, ModelEmaV3, None])
@pytest.mark.parametrize("metric", [np.float64(70.5), np.float32(70.5), 70.5, None])
def test_a_checkpoint_of_timms_train_script_gives_timms_features(ema, metric, checkpoint):
    network = timm.create_model("test_vit", num_classes=5, **VIT)
    pixels = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5], "crop_pct": 0.8, "interpolation": "bilinear"}
    args = {"model": "test_vit.r160_in1k", "gp": "avg", "img_size": 96, "in_chans": 4} | pixels
    path = checkpoint(network, ema=ema, metric=metric, **args)
    ensemble = assemble(path)
    assert_timms_features(ensemble, path, "test_vit", **VIT)
    member = ensemble.config.members[0]
    assert member["architecture"] == "test_vit"
    assert member["model_args"] == {"img_size": [96, 96], "in_chans": 4, "global_pool": "avg"}
    assert member["provenance"].get("weights") == ("EMA" if ema else None)
    preprocessing = member["preprocessing"]
    assert (preprocessing["input_size"], preprocessing["mean"]) == ([4, 96, 96], [0.1, 0.2, 0.3, 0.4])
    assert (preprocessing["crop_pct"], preprocessing["interpolation"]) == (0.8, "bilinear")
    assert preprocessing["std"] == [0.5] * 4


def test_model_kwargs_and_the_size_of_a_convolutional_network(checkpoint):
    network = timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 16, 16), stem_width=8)
    kwargs = {"channels": (8, 8, 16, 16), "stem_width": 8}
    path = checkpoint(network, wrap=torch.nn.DataParallel, model="resnet10t", model_kwargs=kwargs, img_size=64)
    ensemble = assemble(path)
    assert_timms_features(ensemble, path, "resnet10t", **kwargs)
    assert ensemble.config.members[0]["preprocessing"]["input_size"] == [3, 64, 64]


def test_input_size_and_arguments_of_assemble_override(checkpoint):
    network = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    path = checkpoint(network, model="test_resnet", input_size=(1, 48, 56), gp="max")
    member = assemble(path).config.members[0]
    assert member["preprocessing"]["input_size"] == [1, 48, 56]
    assert member["model_args"] == {"in_chans": 1, "global_pool": "max"}
    assert assemble(path, model_args={"global_pool": "avg"}).config.members[0]["model_args"]["global_pool"] == "avg"
    with pytest.raises(ValueError, match=r"other shape: conv1\.0\.weight"):
        assemble(path, model_args={"in_chans": 3})


def test_arguments_of_other_scripts_are_read_where_they_mean_the_same(tmp_path):
    """torchvision's and DeiT's: an `input_size` of one number is not timm's."""
    network = timm.create_model("test_resnet", num_classes=5)
    args = Namespace(model="test_resnet", input_size=160, interpolation="bilinear", val_crop_size=160, lr=0.1)
    torch.save({"model": network.state_dict(), "args": args, "epoch": 90}, tmp_path / "checkpoint.pth")
    ensemble = assemble(tmp_path / "checkpoint.pth")
    assert_timms_features(ensemble, tmp_path / "checkpoint.pth", "test_resnet")
    assert ensemble.config.members[0]["preprocessing"]["interpolation"] == "bilinear"


def test_the_name_of_a_file_comes_before_what_it_says(checkpoint):
    path = checkpoint(timm.create_model("test_resnet", num_classes=5), model="resnet18")
    assert assemble(f"test_resnet={path}").config.members[0]["architecture"] == "test_resnet"
    assert assemble(path.rename(path.with_name("test_resnet.pth.tar"))).config.members[0]["num_features"] > 0


def test_build_says_that_it_took_the_average(checkpoint, run):
    path = checkpoint(timm.create_model("test_resnet", num_classes=5), model="test_resnet")
    code, out, err = run("build", path, "--output", "out")
    assert code == 0 and "(EMA weights)" in " ".join(out.replace("│", " ").split()), out + err
    code, out, err = run("build", path, "--output", "again", "--json")
    assert json.loads(out)["members"][0]["provenance"]["weights"] == "EMA"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model_kwargs": {"checkpoint_path": "x"}}, "may not hold 'checkpoint_path'"),
        ({"model_kwargs": {"nonsense": 3}}, "timm cannot build test_resnet.*nonsense"),
        ({"model_kwargs": [1]}, r"model_args=\[1\] must be a dict"),
        ({"img_size": "large"}, "positive image size"),
        ({"input_size": (3, 9)}, "input_size"),
        ({"model_kwargs": {"img_size": 50_000}}, "img_size=50000 must be a whole number from 1 to 4,096"),
        ({"in_chans": [3]}, r"'in_chans': \[3\]"),
        ({"mean": torch.ones(3)}, "not plain values: .* Tensor"),
        ({"mean": np.ones(3)}, "not plain values: .* Placeholder"),
        ({"mean": [float("inf"), 0.5, 0.5]}, "not plain values"),
        ({"gp": {"avg": "/etc/passwd"}}, "'/etc/passwd'"),
        ({"in_chans": 10**9}, "1000000000|1,000,000,000"),
        ({"mean": "red"}, "mean"),
        ({"crop_pct": "all"}, "crop_pct"),
        ({"interpolation": "random"}, "interpolation='random' must be one of"),
    ],
)
def test_bad_training_arguments_are_named(args, message, checkpoint):
    path = checkpoint(timm.create_model("test_resnet", num_classes=5), model="test_resnet", **args)
    with pytest.raises(ValueError, match=message) as error:
        assemble(path)
    assert "\n" not in str(error.value)
