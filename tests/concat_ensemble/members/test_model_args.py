"""Arguments of timm's networks for members by name, folder and file."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from concat_ensemble import ConcatEnsembleModel, assemble
from concat_ensemble.commands.build import _parse_model_args


@torch.no_grad()
def assert_features(member, network):
    size = member.config.members[0]["preprocessing"]["input_size"]
    pixels = torch.randn(2, *size)
    expected = network.eval().forward_head(network.forward_features(pixels), pre_logits=True)
    assert torch.equal(member(pixels).pooler_output, expected)


@pytest.mark.parametrize(
    ("architecture", "model_args", "size"),
    [
        ("test_vit", {"img_size": 96, "global_pool": "avg", "in_chans": 4}, [4, 96, 96]),
        ("test_vit", {"img_size": [96, 128]}, [3, 96, 128]),
        ("test_vit", {"dynamic_img_size": True, "img_size": 64}, [3, 64, 64]),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": [1, 1, 1, 1]}, [3, 64, 64]),
        ("test_resnet", {"in_chans": 2, "global_pool": "max"}, [2, 160, 160]),
        ("test_resnet", {"in_chans": 1}, [1, 160, 160]),
    ],
)
def test_untrained_members_are_built_with_arguments_and_survive_a_save(architecture, model_args, size, tmp_path):
    ensemble = assemble(f"random:{architecture}", model_args=model_args)
    member = ensemble.config.members[0]
    assert (member["model_args"], member["preprocessing"]["input_size"]) == (model_args, size)
    network = timm.create_model(architecture, num_classes=0, **model_args)
    network.load_state_dict(ensemble.members["0"].state_dict())
    ensemble.save_pretrained(tmp_path)
    assert_features(ConcatEnsembleModel.from_pretrained(tmp_path), network)


def test_arguments_for_files_and_folders_must_fit_their_weights(tmp_path):
    network = timm.create_model("test_vit", num_classes=5, img_size=96, global_pool="avg")
    torch.save(network.state_dict(), tmp_path / "test_vit.pth")
    save_for_hf(network, tmp_path / "folder", safe_serialization=True)
    with pytest.raises(ValueError, match=r"other shape: pos_embed \(1, 37, 64\) for \(1, 101, 64\)"):
        assemble(tmp_path / "test_vit.pth", model_args={"global_pool": "avg"})
    assert_features(assemble(tmp_path / "test_vit.pth", model_args={"img_size": 96, "global_pool": "avg"}), network)
    kept = assemble(tmp_path / "folder", model_args={"no_embed_class": False})
    assert kept.config.members[0]["model_args"]["img_size"] == [96, 96]
    assert_features(kept, network)
    with pytest.raises(ValueError, match=r"does not hold .* other shape: pos_embed .*model_args"):
        assemble(tmp_path / "folder", model_args={"img_size": 160})


def test_what_has_arguments_already_takes_none(ensemble, folder, backbone):
    for source in (ensemble, folder, backbone()):
        with pytest.raises(ValueError, match=r"model_args=\{'global_pool': 'max'\} cannot be applied to"):
            assemble([source], model_args={"global_pool": "max"})


@pytest.mark.parametrize("prefix", ["", "test_vit="])
def test_a_pickle_in_a_folder_of_timms_is_read_with_its_config(prefix, tmp_path, run):
    network = timm.create_model("test_vit", num_classes=5, img_size=96, global_pool="avg")
    network.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "input_size": (3, 96, 96), "license": "mit"}
    save_for_hf(network, tmp_path / "mine", safe_serialization=False)
    code, _, err = run("build", tmp_path / "mine", "--output", "out")
    assert code == 2 and f"to read them, give {tmp_path / 'mine' / 'pytorch_model.bin'}" in err
    code, _, err = run("build", f"{prefix}{tmp_path / 'mine' / 'pytorch_model.bin'}", "--output", tmp_path / "out")
    assert code == 0, err
    loaded = ConcatEnsembleModel.from_pretrained(tmp_path / "out")
    member = loaded.config.members[0]
    assert (member["model_args"]["img_size"], member["model_args"]["global_pool"]) == ([96, 96], "avg")
    assert (member["preprocessing"]["mean"], member["preprocessing"]["input_size"]) == ([0.1, 0.2, 0.3], [3, 96, 96])
    assert (member["provenance"]["license"], member["provenance"]["source"]) == ("mit", "mine")
    assert_features(loaded, network)


def test_the_command_takes_arguments_as_timm_does(run, tmp_path):
    words = ["--model-arg", "img_size=96", "--model-arg", "global_pool=avg", "--model-arg", "in_chans=4"]
    code, out, err = run("build", "random:test_vit", *words, "--output", "out", "--json")
    assert code == 0, err
    member = json.loads(out)["members"][0]
    assert member["model_args"] == {"img_size": 96, "global_pool": "avg", "in_chans": 4}
    assert member["preprocessing"]["input_size"] == [4, 96, 96]
    assert "--model-arg in_chans=4" in member["provenance"]["command"]


def test_values_are_parsed_as_timms_model_kwargs():
    texts = ["a=3", "b=(1, 2)", "c=None", "d=True", "e=token", "f='3'", "g=x=y", "h=1e-6", "i=" + "[" * 10_000]
    assert _parse_model_args(["a=false", "b=TRUE", "c=none"]) == {"a": False, "b": True, "c": None}
    expected = {"a": 3, "b": (1, 2), "c": None, "d": True, "e": "token", "f": "3", "g": "x=y", "h": 1e-6}
    assert _parse_model_args(texts) == expected | {"i": "[" * 10_000}


def test_an_argument_is_given_once(run):
    code, _, err = run("build", "random:test_vit", "--model-arg=depth=1", "--model-arg=depth=2", "--output", "out")
    assert code == 2 and "--model-arg depth=2: depth is given twice; give it once." in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img_size", "--model-arg img_size: give NAME=VALUE"),
        ("=3", "--model-arg =3: give NAME=VALUE"),
        ("in_chans=", "--model-arg in_chans=: give NAME=VALUE"),
        ("a b=3", "--model-arg a b=3: give NAME=VALUE"),
        ("pretrained=True", "model_args may not hold 'pretrained'"),
        ("checkpoint_path=x.pth", "model_args may not hold 'checkpoint_path'"),
        ("num_classes=3", "model_args may not hold 'num_classes'"),
        ("nonsense=3", "timm cannot build test_vit with model_args {'nonsense': 3}"),
        ("global_pool=nonsense", "timm cannot build test_vit with model_args {'global_pool': 'nonsense'}"),
        ("norm_layer=/etc/passwd", "model_args holds '/etc/passwd'"),
        ("img_size=50000", "img_size=50000 must be a whole number from 1 to 4,096"),
        ("img_size=-3", "img_size=-3 must be a whole number"),
        ("img_size=large", "img_size='large' must be a whole number"),
        ("img_size=[3,96,96]", "img_size=[3, 96, 96] must be a whole number from 1 to 4,096, or two"),
        ("img_size=97", "cannot take an image of (3, 97, 97)"),
        ("in_chans=0", "in_chans=0 must be a whole number from 1 to 32"),
        ("in_chans=True", "in_chans=True must be a whole number"),
        ("in_chans=2.5", "in_chans=2.5 must be a whole number"),
        ("in_chans=33", "in_chans=33 must be a whole number from 1 to 32"),
        ("depth=10**9", "'10**9'"),
        ("depth=60000", "timm cannot build test_vit with model_args {'depth': 60000}"),
        ("mlp_ratio={1}", "model_args"),
        ("mlp_ratio=b'x'", "model_args"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(text, message, run, tmp_path):
    code, _, err = run("build", "random:test_vit", "--model-arg", text, "--output", "out")
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert message in err
