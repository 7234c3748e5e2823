"""What every road into an ensemble says of a member's licence, tag and origin."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from concat_ensemble import assemble
from concat_ensemble.members.origins import ORIGIN, TRAINED_HERE, find_pretrained_cfg, name_repo, read_license
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.images import Images
from concat_ensemble.training.recipe import Settings
from concat_ensemble.training.saving import save_network

TIMMS = {"tag": "r160_in1k", "license": "apache-2.0"}  # timm's own test_vit


@pytest.fixture(scope="module")
def network():
    """A user's own, of an architecture for which timm has weights."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3)


def provenance(source, **options):
    return assemble([source], **options).config.members[0]["provenance"]


def test_timm_says_the_same_of_any_weights(network, tmp_path):
    save_for_hf(network, tmp_path / "own", safe_serialization=True)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["pretrained_cfg"].items() >= TIMMS.items()


ROADS = ["timm's folder", "an older folder of timm's", "transformers' folder", "a pickle", "safetensors", "in memory"]


@pytest.mark.parametrize("road", ROADS)
def test_weights_of_a_user_have_the_licence_that_the_user_names(road, network, tmp_path):
    if "folder" in road and "transformers" not in road:
        save_for_hf(network, tmp_path / "own", safe_serialization=True)
        source = tmp_path / "own"
        if "older" in road:  # what is in pretrained_cfg stood beside it
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(config | config.pop("pretrained_cfg")))
    elif road == "transformers' folder":
        source = tmp_path / "wrapped"
        TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_vit.r160_in1k")).save_pretrained(source)
    elif road == "a pickle":
        source = tmp_path / "test_vit.pth"
        torch.save({"state_dict": network.state_dict()}, source)
    elif road == "safetensors":
        source = tmp_path / "test_vit.safetensors"
        save_file(network.state_dict(), source)
    else:
        source = network
    written = provenance(source)
    assert not written.keys() & {*ORIGIN, "hub_id", "revision"} - {"source"}
    assert "timm" not in written["source"]
    assert provenance(source, license="mit")["license"] == "mit"


def test_a_licence_that_differs_from_timms_was_named_by_somebody(network, tmp_path):
    for name, stated in {
        "other": TIMMS | {"license": "mit"},
        "untagged": {"license": "apache-2.0", "tag": None},
    }.items():
        save_for_hf(network, tmp_path / name, model_config={"pretrained_cfg": stated}, safe_serialization=True)
        assert provenance(tmp_path / name)["license"] == stated["license"]
    save_file(network.state_dict(), tmp_path / "test_vit.safetensors", metadata={"license": "gpl-3.0"})
    assert provenance(tmp_path / "test_vit.safetensors")["license"] == "gpl-3.0"


def test_timms_own_weights_have_timms_licence():
    """In the repo where timm has them, whatever the license is."""
    for name in ("resnet50.a1_in1k", "convnextv2_atto.fcmae_ft_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        timms = find_pretrained_cfg(name)
        architecture, config, repo = name.split(".")[0], timms.to_dict(), name_repo(timms)
        assert repo == f"timm/{name}" and read_license(architecture, config, repo=repo) == timms.license
        assert read_license(architecture, config) is None, "in a folder they may be anybody's"
        assert read_license(architecture, config, repo="me/mine") is None
    assert find_pretrained_cfg("resnet50.mine") is None
    assert read_license("resnet50", {"tag": "mine", "license": "mit"}) == "mit"


def test_untrained_members_are_timms_initialization():
    written = provenance("random:test_vit")
    assert (written["license"], written["objective"]) == ("apache-2.0", "none (random weights)")


@pytest.mark.parametrize("license", [None, "cc-by-4.0"])
def test_networks_that_are_trained_here(license, tmp_path):
    images = Images(
        Settings(dataset="digits", limit=40, license=license, augmentation="none"),
        Pixels((3, 32, 32), (0.5,) * 3, (0.5,) * 3),
        with_test=False,
    )
    model = timm.create_model("test_resnet", num_classes=10)
    stated = {"source": f"{TRAINED_HERE[0]}pretrain_members.py"}
    saved = {"architecture": "test_resnet", "model_args": {}, "images": images, "provenance": stated, "identity": {}}
    save_network(model, tmp_path / "net", **saved)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["provenance"].get("license") == config["pretrained_cfg"].get("license") == license
    assert not config["pretrained_cfg"].keys() & set(ORIGIN) - {"license", "custom_load"}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert (loaded.pretrained_cfg.get("tag"), loaded.num_classes) == (None, 10)
    assert provenance(tmp_path / "net").get("license") == license
    config["pretrained_cfg"] |= {"license": "apache-2.0", "tag": "whatever"}  # as version 0.1 wrote
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    assert provenance(tmp_path / "net").get("license") == license
    ensemble = assemble([tmp_path / "net"])
    ensemble.save_pretrained(tmp_path / "cat")
    card = write_card(tmp_path / "cat").read_text()
    assert ("license_name: not-stated" in card) == (license is None) and "base_model" not in card


def test_the_card_of_a_fine_tuned_member_says_so(tmp_path):
    model = assemble(["random:test_vit"])
    tuned = {"fine_tuned": {"dataset": "uoft-cs/cifar100", "steps": 5}, "ensemble_recipe": "swav-cat5"}
    model.config.members[0]["provenance"] |= tuned | {"hub_id": "timm/test_vit.r160_in1k", "license": "cc-by-nc-4.0"}
    model.save_pretrained(tmp_path / "cat")
    card = write_card(tmp_path / "cat").read_text()
    assert "base_model_relation: finetune" in card and "- timm/test_vit.r160_in1k" in card
    assert "- uoft-cs/cifar100" in card and "license: cc-by-nc-4.0" in card
    assert "/tree/main), fine-tuned on uoft-cs/cifar100" in card.replace("\\", "")
    assert "swav-cat5" not in card, "it is not what this recipe gives"


def test_a_local_dataset_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    from concat_ensemble.training.saving import public_dataset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    assert public_dataset(Settings(dataset="data/flowers")) == "flowers"
    assert public_dataset(Settings(dataset="ylecun/mnist")) == "ylecun/mnist"
