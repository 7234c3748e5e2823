"""Distillation of tiny networks on real digits."""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel

from concat_ensemble import assemble
from concat_ensemble.training import pretraining
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.distillation import Distillation, Student, Teachers, main, run
from concat_ensemble.training.images import Images

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
RECIPE, TIMECAT = (str(RECIPES / f"scattered_digits_{name}.yaml") for name in ("distill", "timecat"))
SMALL = {"in_chans": 1, "channels": [4, 4, 8, 8], "stem_width": 4}
SETTINGS = {
    "dataset": "digits",
    "classes": [0, 1, 2],
    "limit": 100,
    "augmentation": "scatter",
    "architecture": "resnet10t",
    "model_args": SMALL,
    "input_size": [1, 32, 32],
    "steps": 6,
    "batch_size": 16,
    "warmup": 0.0,
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[str]:
    """Two trained networks of three classes, in timm's layout with their heads."""
    folder = tmp_path_factory.mktemp("teachers")
    data = ["--dataset", "digits", "--classes", "[0, 1, 2]", "--limit", "100", "--model-args", str(SMALL)]
    members = [
        "--members",
        "[2]",
        "--snapshots",
        "0",
        "--wide-model-args",
        "{}",
        "--wide-steps",
        "0",
        "--total-steps",
        "400",
    ]
    pretraining.main([TIMECAT, "--cpu", *data, *members, "--output", str(folder)])
    return [str(folder / "members" / f"cat2-{k}") for k in range(2)]


@pytest.fixture
def distilled(teachers, tmp_path):
    def distilled(output="out", **changes) -> Path:
        run(Distillation(**SETTINGS | {"teachers": teachers, "output": str(tmp_path / output)} | changes), cpu=True)
        return tmp_path / output

    return distilled


@pytest.mark.parametrize("target", ["features", "predictions"])
def test_a_student_comes_out_as_an_ensemble_of_one(target, distilled):
    model = AutoModel.from_pretrained(distilled(target=target) / "distilled")
    assert len(model.members) == 1 and model.config.num_features == 8
    provenance = model.config.members[0]["provenance"]
    assert provenance["steps"] == 6 and provenance["objective"] == f"distillation of 2 networks' {target}"
    assert provenance["compute"]["images"] == 96
    assert "license" not in provenance and provenance["dataset"] == "digits"
    assert len({teacher["weights_sha256"] for teacher in provenance["teachers"]}) == 2
    assert all("license" not in teacher and teacher["source"] for teacher in provenance["teachers"])


@pytest.mark.parametrize("target", ["features", "predictions"])
def test_the_student_learns_the_outputs_of_the_teachers(target, teachers, distilled):
    """On other images, a linear layer explains more of the teachers' outputs from the features of the trained student
    than from those of the untrained one.
    """
    settings = Distillation(**SETTINGS | {"teachers": teachers, "target": target})
    images = Images(settings, Pixels.from_settings(settings))
    teaching = Teachers(settings)
    held_out = next(images.batches([99])).views[0][0]
    batches = [batch.views[0][0] for batch in itertools.islice(images.batches([98]), 10)]
    if target == "features":
        teaching.standardize(batches, Accelerator(cpu=True))
    targets = torch.cat([torch.cat(teaching(batch), 1) for batch in batches])
    held_out_targets = torch.cat(teaching(held_out), 1)
    unexplained = {}
    for steps in (1, 120):
        folder = distilled(output=f"{target}-{steps}", target=target, steps=steps, learning_rate=0.003)
        backbone = next(iter(assemble(folder / "distilled").members.values()))
        with torch.no_grad():
            features, held_out_features = (
                nn.functional.pad(backbone(pixels), (0, 1), value=1.0) for pixels in (torch.cat(batches), held_out)
            )
        residual = held_out_targets - held_out_features @ torch.linalg.lstsq(features, targets).solution
        unexplained[steps] = float((residual.var(0) / held_out_targets.var(0)).median())
    assert unexplained[120] < unexplained[1]


def test_an_ensemble_can_teach_its_features_but_not_classes(teachers, distilled, tmp_path):
    assemble(teachers).save_pretrained(tmp_path / "pair")
    distilled(teachers=[str(tmp_path / "pair")])
    with pytest.raises(ValueError, match=r"teachers: .*pair is not a network with a head .*target=features"):
        distilled(output="other", teachers=[str(tmp_path / "pair")], target="predictions")


def test_a_second_run_skips_and_another_distillation_is_refused(distilled, capsys):
    distilled()
    distilled()
    assert "is finished, skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"is of another training: its learning_rate is 0.002, here 0.003"):
        distilled(learning_rate=0.003)


def test_a_student_has_one_output_for_each_of_the_teachers():
    assert Student(torch.nn.Identity(), 4, 6)(torch.zeros(2, 4)).shape == (2, 6)


def test_the_command_line_does_the_same(teachers, tmp_path, capsys):
    words = [RECIPE, "--cpu", "--smoke", "--output", str(tmp_path / "out"), "--steps", "2"]
    main([*words, "--teachers", f"[{', '.join(teachers)}]"])
    assert "2 networks in one, 64 features" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "lacks teachers" in capsys.readouterr().err


@pytest.mark.slow
def test_mixed_images_and_slower_layers_reach_the_student(distilled):
    def weights(name: str, **changes) -> dict:
        return AutoModel.from_pretrained(distilled(output=name, steps=2, **changes) / "distilled").state_dict()

    plain = weights("plain")
    for name, changes in {"mixed": {"mixup": 0.8}, "slower": {"layer_decay": 0.5}}.items():
        changed = weights(name, **changes)
        assert any(not torch.equal(changed[key], plain[key]) for key in plain), name
