import json
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.models import save_for_hf
from torch import nn

from concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsembleImageProcessor,
    ConcatEnsembleModel,
    assemble,
)
from concat_ensemble.members.checkpoints import weights_sha256

SOURCES = [
    "a model in memory",
    "a folder of timm's",
    "a folder of timm's, pickled and named",
    "a file named after its architecture",
    "a file of another name",
    "an ensemble in memory",
    "an ensemble's folder",
]


@pytest.fixture(scope="module")
def trained():
    """An RGB network with a classifier of seven classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=7).eval()


@pytest.fixture(scope="module")
def sources(trained, tmp_path_factory):
    """The same network in each form that `assemble` accepts."""
    folder = tmp_path_factory.mktemp("sources")
    save_file(trained.state_dict(), folder / "test_resnet.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, folder / "last.pth.tar")
    save_for_hf(trained, folder / "timm", safe_serialization=True)
    save_for_hf(trained, folder / "pickled", safe_serialization=False)
    assemble([trained]).save_pretrained(folder / "ensemble")
    forms = [
        trained,
        folder / "timm",
        f"test_resnet={folder / 'pickled/pytorch_model.bin'}",
        folder / "test_resnet.safetensors",
    ]
    forms += [f"test_resnet={folder / 'last.pth.tar'}", assemble([trained]), str(folder / "ensemble")]
    return dict(zip(SOURCES, forms, strict=True))


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(np.asarray(photo)[:300]) for photo in load_sample_images().images]


@torch.no_grad()
def timm_features(model, photos):
    """Pooled features by timm's own evaluation transform and methods."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model.forward_head(model.forward_features(torch.stack([*map(transform, photos)])), pre_logits=True)


@torch.no_grad()
def ensemble_features(model, photos):
    return model(**ConcatEnsembleImageProcessor.from_config(model.config)(photos)).pooler_output


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_timms_features_and_the_same_hash(source, sources, trained, photos):
    model = assemble(sources[source])  # a single member needs no list
    torch.testing.assert_close(ensemble_features(model, photos), timm_features(trained, photos), atol=1e-4, rtol=0)
    bare = timm.create_model("test_resnet", num_classes=0)
    bare.load_state_dict(trained.state_dict(), strict=False)
    assert model.config.members[0]["provenance"]["weights_sha256"] == weights_sha256(bare.state_dict())
    assert model.config.members[0]["provenance"]["source"]
    assert not model.training and model.dtype == torch.float32


def test_members_keep_their_order_and_their_own_preprocessing(trained, photos):
    other = timm.create_model(
        "test_vit", num_classes=0, pretrained_cfg_overlay={"input_size": (3, 160, 160), "crop_pct": 0.8}
    ).eval()
    model = assemble([other, trained])
    expected = torch.cat([timm_features(other, photos), timm_features(trained, photos)], dim=1)
    torch.testing.assert_close(ensemble_features(model, photos), expected, atol=1e-4, rtol=0)
    assert [member["architecture"] for member in model.config.members] == ["test_vit", "test_resnet"]


def test_shared_preprocessing_is_the_first_ones(trained, photos):
    other = timm.create_model("test_vit", num_classes=0, pretrained_cfg_overlay={"crop_pct": 0.8}).eval()
    assert len(assemble([trained, other]).config.geometries) == 2
    model = assemble([trained, other], preprocessing="shared")
    assert model.config.pixel_shape == (3, 160, 160)
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(trained), is_training=False)
    with torch.no_grad():
        expected = other(torch.stack([*map(pixels, photos)]))
    torch.testing.assert_close(ensemble_features(model, photos)[:, -64:], expected, atol=1e-4, rtol=0)


def test_untrained_members_are_seeded_by_position_and_leave_the_global_seed_alone():
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    model = assemble(["random:test_resnet", "random:test_vit", "random:test_resnet"], seed=3)
    assert torch.equal(torch.rand(1), undisturbed)
    torch.manual_seed(3 + 2)
    by_hand = timm.create_model("test_resnet", num_classes=0)
    assert weights_sha256(model.members["2"].state_dict()) == weights_sha256(by_hand.state_dict())
    provenances = [member["provenance"] for member in model.config.members]
    assert [p["seed"] for p in provenances] == [3, 4, 5]
    assert provenances[0]["source"] == "random:test_resnet" and provenances[0]["steps"] == 0
    assert len({p["weights_sha256"] for p in provenances}) == 3


def test_grey_members_of_changed_width_survive_a_save(backbone, tmp_path):
    model = assemble([backbone(0), backbone(1, channels=(8, 8, 8, 24))])
    model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        expected = torch.cat([backbone(0)(pixels), backbone(1, channels=(8, 8, 8, 24))(pixels)], dim=1)
        assert torch.equal(model(pixels).pooler_output, expected)
        assert torch.equal(ConcatEnsembleModel.from_pretrained(tmp_path)(pixels).pooler_output, expected)
    assert [member["num_features"] for member in model.config.members] == [16, 24]


def test_members_of_an_ensemble_keep_their_provenance(ensemble, folder, backbone):
    model = assemble([backbone(7), ensemble, folder])
    hashes = [member["provenance"]["weights_sha256"] for member in model.config.members]
    assert hashes[1:3] == hashes[3:5] == [m["provenance"]["weights_sha256"] for m in ensemble.config.members]
    assert hashes[0] not in hashes[1:]


def test_an_ensembles_head_is_left_behind(ensemble, tmp_path):
    config = type(ensemble.config)(members=ensemble.config.members, num_labels=3)
    ConcatEnsembleForImageClassification(config).save_pretrained(tmp_path / "with-head")
    assert type(assemble([tmp_path / "with-head"])) is ConcatEnsembleModel


def test_only_the_built_members_of_an_ensemble_are_used(folder, ensemble):
    model = assemble([ConcatEnsembleModel.from_pretrained(folder, active_members=[1])])
    assert model.config.members == [ensemble.config.members[1]]


def test_an_ensemble_used_as_a_member_does_not_change(backbone):
    source = assemble([backbone(0)]).bfloat16().train()
    model = assemble([source])
    assert source.dtype == torch.bfloat16 and source.training
    assert model.dtype == torch.float32 and not model.training
    recorded = model.config.members[0]["provenance"]["weights_sha256"]
    assert recorded == weights_sha256(model.members["0"].state_dict()), (
        "the hash is that of the weights that are saved"
    )


def test_provenance_of_a_folder_wins_over_what_assemble_would_write(backbone, tmp_path):
    model = backbone(0)
    model_config = {"provenance": {"source": "trained by me", "steps": 12}, "pretrained_cfg": {"license": "mit"}}
    args = {key: value for key, value in model._model_args.items() if key != "num_classes"}
    save_for_hf(model, tmp_path / "m", model_config=model_config, model_args=args, safe_serialization=True)
    provenance = assemble([tmp_path / "m"], license="apache-2.0").config.members[0]["provenance"]
    assert (provenance["source"], provenance["steps"], provenance["license"]) == ("trained by me", 12, "mit")


def test_a_stated_license_fills_gaps_only(tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "test_resnet.pth")
    model = assemble([tmp_path / "test_resnet.pth", "random:test_resnet"], license="cc-by-4.0")
    assert [member["provenance"]["license"] for member in model.config.members] == ["cc-by-4.0", "apache-2.0"]


def broken_folder(tmp_path, name, config=None):
    (tmp_path / name).mkdir()
    if config is not None:
        (tmp_path / name / "config.json").write_text(config)
    return tmp_path / name


# Members, and a pattern of the one-line message: the value and the remedy.
BAD_MEMBERS = {
    "none": (lambda *_: [], "members is empty; name at least one"),
    "unknown architecture": (lambda *_: ["resnet9000"], "'resnet9000' is not one of timm.*did you mean resnet"),
    "unknown architecture, random": (
        lambda *_: ["random:resnet9000"],
        "'resnet9000' is not one of timm.*did you mean",
    ),
    "unknown weights of a known architecture": (
        lambda *_: ["resnet18.a1_in1"],
        r"'resnet18\.a1_in1'; did you mean resnet18\.a1_in1k or .*resnet18=FILE.*random:resnet18",
    ),
    "no pretrained weights": (lambda *_: ["darknet17"], "'darknet17'.*darknet17=FILE"),
    "unknown architecture of a file": (
        lambda t, _: [t / "mine.safetensors"],
        r"mine\.safetensors: 'mine' is not a timm arch.*ARCHITECTURE=mine",
    ),
    "checkpoint of another architecture": (
        lambda t, _: [f"test_resnet={t / 'mine.safetensors'}"],
        "test_resnet; missing: .*NAME=FILE",
    ),
    "missing folder": (
        lambda t, _: [str(broken_folder(t, "cat4")).replace("cat4", "cat44")],
        "no such folder: .*cat44; did you mean .*cat4\\?.*hf-hub:ORG/NAME",
    ),
    "missing file": (lambda t, _: [f"resnet18={t / 'no.pth'}"], r"no checkpoint file .*no\.pth"),
    "folder of files": (lambda t, _: [f"resnet18={t}"], "no checkpoint file .*: it is a folder; name a file in it"),
    "folder of something else": (
        lambda t, _: [broken_folder(t, "f")],
        "has no config.json; give a folder saved by timm",
    ),
    "folder with a broken config": (
        lambda t, _: [broken_folder(t, "f", "{")],
        r"config\.json is not a model's config.*save the model again",
    ),
    "folder of another library": (
        lambda t, _: [broken_folder(t, "f", '{"model_type": "bert"}')],
        "architecture None|bert",
    ),
    "folder without weights": (
        lambda t, _: [broken_folder(t, "f", '{"architecture": "test_vit"}')],
        r"model\.safetensors",
    ),
    "not a timm model": (lambda *_: [nn.Linear(2, 2)], r"Linear is not a timm model.*timm\.create_model"),
    "unpooled": (
        lambda _, b: [b(global_pool="")],
        r"resnet10t\) has no pooled features: it returns \(1, 16, 1, 1\).*set its global_pool",
    ),
    "33 channels": (
        lambda _, b: [b(in_chans=33)],
        r"resnet10t: input_size=\[33, 32, 32\] must be \[C, H, W\] with 1 to 32 channels",
    ),
    "not a name": (lambda *_: [None], "None"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_the_message_about_a_bad_member_has_the_value_and_the_remedy(case, backbone, tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "mine.safetensors")
    make, message = BAD_MEMBERS[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        assemble(make(tmp_path, backbone))
    assert "\n" not in str(error.value)


def test_the_message_counts_members_as_the_user_does():
    with pytest.raises(ValueError) as error:
        assemble(["random:test_vit", "random:nonesuch"])
    assert "members[0]" not in str(error.value)


def test_bad_preprocessing_is_named():
    with pytest.raises(ValueError, match="preprocessing='same' must be 'own' or 'shared'"):
        assemble(["random:test_vit"], preprocessing="same")


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k@v2"]
)
def test_without_the_hub_the_answer_comes_at_once(name):
    started = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"cannot reach the Hub for hf-hub:timm/resnet18\.a1_in1k.*give ARCHITECTURE=FILE"
    ):
        assemble([name])
    assert time.perf_counter() - started < 5


def test_config_of_an_assembled_model_is_plain_json(ensemble):
    assert json.loads(ensemble.config.to_json_string())["members"] == ensemble.config.members


# --- channels -------------------------------------------------------------------------------------------------------


def test_channels_mean_and_std_hold_for_all_members_of_a_call_and_mix_by_nesting(backbone):
    four = assemble(
        [backbone(0, in_chans=4), backbone(1, in_chans=4)], channels=[7, 3, 2, 1], mean=[0.1, 0.2, 0.3, 0.4]
    )
    mixed = assemble([four, backbone(2)])
    seen = [member["preprocessing"] for member in mixed.config.members]
    assert [each.get("channels") for each in seen] == [[7, 3, 2, 1], [7, 3, 2, 1], None]
    assert seen[0]["mean"] == [0.1, 0.2, 0.3, 0.4] and seen[0]["std"] == [0.5] * 4 and seen[2]["mean"] == [0.5]
    assert [each["image_mode"] for each in seen] == ["channels", "channels", "L"]


def test_mean_and_std_alone_leave_the_channels_as_they_are(backbone):
    (member,) = assemble(backbone(0), mean=[0.1], std=[0.2]).config.members
    assert (member["preprocessing"]["mean"], member["preprocessing"]["std"]) == ([0.1], [0.2])
    assert member["preprocessing"]["image_mode"] == "L" and "channels" not in member["preprocessing"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": [0, 1]}, r"member 0 \(resnet10t\): channels=\[0, 1\] must be 4 numbers"),
        ({"mean": [0.5]}, r"member 0 \(resnet10t\): mean=\[0\.5\] must be 4 numbers, one per channel"),
        ({"std": [1, 1, 1, 0]}, r"std=\[1, 1, 1, 0\] must be above zero"),
    ],
)
def test_channels_that_do_not_fit_a_member_are_refused(backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        assemble(backbone(0, in_chans=4), **settings)


def test_the_preprocessing_of_other_channels_cannot_be_shared(backbone):
    with pytest.raises(ValueError, match=r"member 1 \(resnet10t\) cannot take an image of \(4, 32, 32\)"):
        assemble([backbone(0, in_chans=4), backbone(1)], preprocessing="shared")
