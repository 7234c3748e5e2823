"""Fine-tuning on tiny ensembles and real digits: where it begins, what it writes, and that it can be cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.optim.swa_utils import update_bn
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import LinearProbe, assemble, extract_features, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.studies.results import Results
from finetune import FineTuning, main, parameter_groups, run

RECIPE = str(Path(__file__).parents[2] / "training" / "recipes" / "scattered_digits_finetune.yaml")
SETTINGS = {
    "dataset": "scattered:digits",
    "classes": [5, 6, 7],
    "test_size": 0.5,
    "validation_size": 0.2,
    "limit": 120,
    "augmentation": "none",
    "batch_size": 16,
    "steps": 6,
    "warmup": 0.0,
}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> Path:
    """A small ResNet and a small ViT of 32 x 32 grey pixels."""
    torch.manual_seed(0)
    pixels = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bicubic"}
    resnet = timm.create_model(
        "resnet10t", in_chans=1, channels=(8, 8, 16, 16), stem_width=8, pretrained_cfg_overlay=pixels
    )
    seen = load_data("scattered:digits", limit=120)["train"]
    images = torch.stack([pil_to_tensor(read_image(seen, number)) for number in range(120)])
    update_bn([images / 127.5 - 1], resnet)  # as training leaves it
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, pretrained_cfg_overlay=pixels)  # fmt: skip
    folder = tmp_path_factory.mktemp("ensemble") / "pair"
    assemble([resnet, vit]).save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(ensemble, tmp_path):
    """`tuned(**changes)`: fine-tune into the temporary folder."""

    def tuned(output="out", **changes) -> Path:
        settings = SETTINGS | {"model": str(ensemble), "output": str(tmp_path / output)} | changes
        run(FineTuning(**settings), cpu=True)
        return tmp_path / output

    return tuned


def probed(ensemble, members=None) -> tuple[LinearProbe, dict]:
    asked = {key: SETTINGS[key] for key in ("classes", "test_size", "validation_size", "limit")}
    model = assemble(ensemble)
    table = extract_features(model, load_data("scattered:digits", **asked))
    table = table if members is None else table.members(members)
    return LinearProbe().fit(table["train"], validation=table["validation"]), table


def result_of(folder: Path) -> Results:
    return Results.load(folder / "results" / "fine-tuned.json")


def test_it_begins_with_the_probe(ensemble, tuned):
    """A step that moves nothing leaves the probe's predictions, image by image."""
    folder = tuned(stages="one", steps=1, learning_rate=1e-12)
    probe, table = probed(ensemble)
    (run_,) = result_of(folder / "whole").rows[0].runs
    wanted = probe.predict(table["test"]) == table["test"].labels
    assert run_.n_test == len(wanted) and np.mean(run_.correct_images != wanted) < 0.1, "BatchNorm saw one batch"


def test_at_once_a_classifier_comes_out(ensemble, tuned):
    folder = tuned(stages="one") / "whole"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["5", "6", "7"]
    before = assemble(ensemble)
    for k, spec in enumerate(model.config.members):
        found = weights_sha256(model.members[str(k)].state_dict())
        assert (
            spec["provenance"]["weights_sha256"] == found != before.config.members[k]["provenance"]["weights_sha256"]
        )
        assert spec["provenance"]["fine_tuned"]["steps"] == 6
    assert result_of(folder).probe["kind"] == "fine-tuning" and (folder / "README.md").is_file()


def test_two_stages_give_an_ensemble_of_the_tuned_members(tuned):
    folder = tuned(stages="two")
    together = AutoModel.from_pretrained(folder / "two-stage")
    for k in range(2):
        alone = AutoModelForImageClassification.from_pretrained(folder / f"member-{k}")
        for key, tensor in alone.members["0"].state_dict().items():
            assert torch.equal(tensor, together.members[str(k)].state_dict()[key])
        spec = together.config.members[k]
        assert spec["provenance"]["weights_sha256"] == weights_sha256(together.members[str(k)].state_dict())


def test_training_fits(tuned):
    """More steps fit the training images better: what is watched here is that gradients reach the members."""
    accuracies = [
        result_of(tuned(output=str(n), stages="one", head="zero", steps=n, learning_rate=0.003) / "whole").rows[0].mean
        for n in (1, 60)
    ]
    assert accuracies[1] > accuracies[0] + 0.1


@pytest.mark.parametrize("stages", ["one", "two"])
def test_a_second_run_skips_what_is_finished(stages, tuned, capsys):
    folder = tuned(stages=stages)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "two-stage" not in str(path)}
    capsys.readouterr()
    tuned(stages=stages)
    assert capsys.readouterr().out.count("is finished, skipped") == (1 if stages == "one" else 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_training_in_its_place_is_refused(tuned):
    tuned(stages="one")
    with pytest.raises(ValueError, match=r"whole is of another training: its learning_rate is"):
        tuned(stages="one", learning_rate=0.5)


def test_different_pixels_are_for_two_stages(tmp_path):
    other = {"input_size": (1, 40, 40), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    sizes = [timm.create_model("resnet10t", in_chans=1, channels=(4, 4, 8, 8), stem_width=4, pretrained_cfg_overlay=other | {"input_size": (1, s, s)}) for s in (32, 40)]  # fmt: skip
    assemble(sizes).save_pretrained(tmp_path / "mixed")
    settings = SETTINGS | {"model": str(tmp_path / "mixed"), "output": str(tmp_path / "out"), "steps": 1}
    with pytest.raises(ValueError, match=r"images of different sizes or crops; fine-tune with stages=two"):
        run(FineTuning(**settings, stages="one"), cpu=True)
    run(FineTuning(**settings, stages="two"), cpu=True)
    assert len(json.loads((tmp_path / "out" / "two-stage" / "config.json").read_text())["members"]) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree_adamw"])
def test_lower_layers_learn_slower(ensemble, optimizer, tuned):
    model = assemble(ensemble)
    model.classifier = torch.nn.Linear(model.config.num_features, 3)
    settings = FineTuning(**SETTINGS | {"model": str(ensemble), "layer_decay": 0.5})
    groups = parameter_groups(settings)(model)
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["members.0.conv1.0.weight"])] < scale[id(named["members.0.layer4.0.conv1.weight"])] < 1.01
    assert (
        scale[id(named["members.1.patch_embed.proj.weight"])] < scale[id(named["members.1.blocks.1.attn.qkv.weight"])]
    )
    assert scale[id(named["classifier.weight"])] == 1.0 and set(scale) == {id(p) for p in named.values()}
    tuned(stages="one", steps=2, optimizer=optimizer, layer_decay=0.5)


def test_the_command_is_the_same(ensemble, tmp_path, capsys):
    words = [RECIPE, "--cpu", "--smoke", "--model", str(ensemble), "--output", str(tmp_path / "out"), "--steps", "2"]
    main(words)
    assert "two-stage: 2 members; probe it with" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words[:-2], "--stages", "three"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: stages='three' must be one of one, two")
