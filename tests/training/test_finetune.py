"""Fine-tuning of tiny ensembles on real digits: where it starts, what it writes, and what a second run does."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import update_bn
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import LinearProbe, assemble, extract_features, load_data
from concat_ensemble.data.images import read_image
from concat_ensemble.members.checkpoints import weights_sha256
from concat_ensemble.studies.results import Results
from concat_ensemble.training.evaluation import predict_logits
from concat_ensemble.training.finetuning import (
    FineTuning,
    create_classifier,
    describe_fine_tuning,
    main,
    parameter_groups,
    read_pixels,
    run,
    save_classifier,
)
from concat_ensemble.training.images import Images

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
    update_bn([images / 127.5 - 1], resnet)  # as after training
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, pretrained_cfg_overlay=pixels, **shape)
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
    options = {key: SETTINGS[key] for key in ("classes", "test_size", "validation_size", "limit")}
    model = assemble(ensemble)
    table = extract_features(model, load_data("scattered:digits", **options))
    table = table if members is None else table.members(members)
    return LinearProbe().fit(table["train"], validation=table["validation"]), table


def result_of(folder: Path) -> Results:
    return Results.load(folder / "results" / "fine-tuned.json")


def test_training_starts_from_the_probe(ensemble, tuned):
    """A step that moves nothing leaves the probe's predictions, image by image."""
    folder = tuned(stages="one", steps=1, learning_rate=1e-12)
    probe, table = probed(ensemble)
    (run_,) = result_of(folder / "whole").rows[0].runs
    expected = probe.predict(table["test"]) == table["test"].labels
    assert run_.n_test == len(expected) and np.mean(run_.correct_images != expected) < 0.1, "BatchNorm saw one batch"


def test_one_stage_gives_a_classifier(ensemble, tuned):
    folder = tuned(stages="one") / "whole"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["5", "6", "7"]
    before = assemble(ensemble)
    for k, spec in enumerate(model.config.members):
        digest = weights_sha256(model.members[str(k)].state_dict())
        assert (
            spec["provenance"]["weights_sha256"] == digest != before.config.members[k]["provenance"]["weights_sha256"]
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


@pytest.mark.parametrize(
    ("changes", "learns"),
    [({"stages": "two"}, False), ({"stages": "one"}, True), ({"stages": "one", "evaluate_every": 2}, False)],
)
def test_two_stages_leave_the_images_that_choose_the_l2_strength(changes, learns, ensemble):
    """Those of `probe` with the same options; else its strength is chosen on images that the members have learned."""
    settings = FineTuning(**SETTINGS | {"model": str(ensemble)} | changes)
    images = Images(settings, read_pixels(assemble(ensemble).config))
    options = {key: SETTINGS[key] for key in ("classes", "test_size", "validation_size", "limit")}
    probed = load_data("scattered:digits", **options)
    learned = {read_image(images.split, number).tobytes() for number in range(images.size)}
    chosen_on, tested_on = (
        {read_image(probed[name], number).tobytes() for number in range(len(probed[name]))}
        for name in ("validation", "test")
    )
    assert len(chosen_on) > 20 and not learned & tested_on
    assert chosen_on <= learned if learns else not chosen_on & learned


@pytest.mark.parametrize("stages", ["one", "two"])
def test_the_initial_head_has_seen_what_the_training_learns_and_no_other_image(stages, ensemble):
    settings = FineTuning(**SETTINGS | {"model": str(ensemble), "stages": stages})
    model = assemble(ensemble)
    images = Images(settings, read_pixels(model.config))
    logits = predict_logits(create_classifier(model, images, settings), images, "test", Accelerator(cpu=True))
    probe, table = probed(ensemble)
    if stages == "two":
        probe = LinearProbe().fit(table["train"])
    assert np.mean(logits.argmax(1) == probe.predict(table["test"])) > 0.99


def test_more_steps_fit_better(tuned):
    """Gradients reach the members."""
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


def test_the_folder_of_another_training_is_refused(tuned):
    tuned(stages="one")
    with pytest.raises(ValueError, match=r"whole is of another training: its learning_rate is"):
        tuned(stages="one", learning_rate=0.5)


def test_different_image_sizes_need_two_stages(tmp_path):
    shape = {"in_chans": 1, "channels": (4, 4, 8, 8), "stem_width": 4}
    members = []
    for size in (32, 40):
        pixels = {"input_size": (1, size, size), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
        members.append(timm.create_model("resnet10t", pretrained_cfg_overlay=pixels, **shape))
    assemble(members).save_pretrained(tmp_path / "mixed")
    settings = SETTINGS | {"model": str(tmp_path / "mixed"), "output": str(tmp_path / "out"), "steps": 1}
    with pytest.raises(ValueError, match=r"stages=one needs .*; fine-tune with stages=two"):
        run(FineTuning(**settings, stages="one"), cpu=True)
    run(FineTuning(**settings, stages="two"), cpu=True)
    assert len(json.loads((tmp_path / "out" / "two-stage" / "config.json").read_text())["members"]) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree_adamw"])
def test_lower_layers_learn_slower(ensemble, optimizer, tuned):
    model = assemble(ensemble)
    model.classifier = torch.nn.Linear(model.config.num_features, 3)
    settings = FineTuning(**SETTINGS | {"model": str(ensemble), "layer_decay": 0.5})
    groups = parameter_groups(model, settings)
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["members.0.conv1.0.weight"])] < scale[id(named["members.0.layer4.0.conv1.weight"])] < 1.01
    assert (
        scale[id(named["members.1.patch_embed.proj.weight"])] < scale[id(named["members.1.blocks.1.attn.qkv.weight"])]
    )
    assert scale[id(named["classifier.weight"])] == 1.0 and set(scale) == {id(p) for p in named.values()}
    tuned(stages="one", steps=2, optimizer=optimizer, layer_decay=0.5)


def test_the_command_line_does_the_same(ensemble, tmp_path, capsys):
    words = [RECIPE, "--cpu", "--smoke", "--model", str(ensemble), "--output", str(tmp_path / "out"), "--steps", "2"]
    main(words)
    assert "two-stage: 2 members; probe it with" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words[:-2], "--stages", "three"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: stages='three' must be one of one, two")


def test_saving_twice_gives_the_same_files(ensemble, tmp_path):
    """Saving builds a new config, so a second call must not count the cost of the training again."""
    settings = FineTuning(**SETTINGS | {"model": str(ensemble), "stages": "one"})
    model = assemble(ensemble)
    model.config.members[0]["provenance"] |= {"steps": 10, "compute": {"images": 160, "gflops": 1.0}}
    images = Images(settings, read_pixels(model.config))
    classifier = create_classifier(model, images, settings)
    before = copy.deepcopy(classifier.config.to_dict())
    logits = np.random.default_rng(0).normal(size=(len(images.labels("test")), 3))
    for parent in ("first", "second"):
        save_classifier(
            classifier, tmp_path / parent / "whole", logits, settings, images=images, identity={}, seconds=1
        )
    assert classifier.config.to_dict() == before
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "first", tmp_path / "second")
    ]
    assert files[0] == files[1]
    provenance = json.loads((tmp_path / "second" / "whole" / "config.json").read_text())["members"][0]["provenance"]
    assert provenance["steps"] == 16 and provenance["compute"]["images"] == 160 + 6 * 16


@pytest.mark.parametrize(
    ("initial", "license", "expected"),
    [("cc-by-nc-4.0", "mit", "cc-by-nc-4.0"), (None, "mit", "mit"), (None, None, None)],
)
def test_what_is_tuned_is_under_the_licence_of_its_initial_weights(initial, license, expected, ensemble):
    """The recipe's own is for those that state none. Weights that were an average are another thing now."""
    settings = FineTuning(**SETTINGS | {"model": str(ensemble), "license": license})
    model = assemble(ensemble)
    stated = {"license": initial, "hub_id": "timm/resnet18.a1_in1k", "weights": "EMA"}
    model.config.members[0]["provenance"] |= {key: value for key, value in stated.items() if value}
    images = Images(settings, read_pixels(model.config))
    tuned = describe_fine_tuning(model, settings, images).members[0]["provenance"]
    assert tuned.get("license") == expected and tuned["fine_tuned"]["dataset"] == "scattered:digits"
    assert tuned["hub_id"] == "timm/resnet18.a1_in1k" and "weights" not in tuned


def test_members_that_name_their_channels_are_refused():
    model = assemble("random:resnet10t", channels=[2, 1, 0])
    with pytest.raises(ValueError, match=r"a member sees channels \[2, 1, 0\]; fine-tuning takes gray or RGB images"):
        read_pixels(model.config)


@pytest.mark.slow
def test_mixed_images_repeated_views_and_each_loss_reach_the_training(tuned):
    def weights(name: str, **changes) -> dict:
        folder = tuned(output=name, stages="one", steps=2, warmup=0.5, **changes)
        return AutoModelForImageClassification.from_pretrained(folder / "whole").state_dict()

    plain = weights("plain")
    for name, changes in {
        "mixed": {"cutmix": 1.0, "mixup_mode": "elem"},
        "repeated": {"aug_repeats": 2},
        "binary": {"bce_loss": True},
        "smoothed": {"label_smoothing": 0.3},
        "first rate": {"warmup_lr": 1e-4},
    }.items():
        changed = weights(name, **changes)
        assert not torch.equal(changed["classifier.weight"], plain["classifier.weight"]), name
