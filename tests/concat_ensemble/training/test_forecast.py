"""`--plan`, on a machine without the images and without the devices that it plans for."""

import re
from pathlib import Path

import pytest
import torch

from concat_ensemble.training.forecast import GIB, Devices, choose_sharing
from concat_ensemble.training.options import exit_on_error
from concat_ensemble.training.pretraining import main
from concat_ensemble.training.recipe import Recipe

RECIPES = Path(__file__).parents[3] / "training" / "recipes"


def plan(capsys, recipe: str, *words: str) -> str:
    main([str(RECIPES / f"{recipe}.yaml"), "--plan", "--cpu", *words])
    return capsys.readouterr().out


def rows(printed: str) -> dict[tuple[str, str], list[str]]:
    """The rows of the last table by devices and parallelism."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {(cells[0], cells[1]): cells[2:] for cells in lines if cells[0].isdigit()}


def test_the_papers_networks_on_one_four_and_eight_devices(capsys):
    printed = plan(capsys, "imagenet_resnet50_cat5", "--devices", "1", "4", "8", "--memory", "80", "--teraflops", "25")
    assert "Assumed: 1,000 classes and at least 1,024 images, since the dataset is not here" in printed
    table = rows(printed)
    networks, hours, images, memory = zip(*table.values(), strict=True)
    assert [*table] == [("1", "data")] + [(n, p) for n in ("4", "8") for p in ("data", "members", "auto")]
    assert [float(hour) for hour in hours] == pytest.approx([111.7, 27.9, 44.7, 27.9, 14.0, 22.3, 14.0], rel=0.01)
    assert networks[-1] == "1 on all, then 4 on teams of 4 x 2"
    assert images == ("1,024", "256", "1,024", "1,024", "128", "1,024", "512")
    assert 40 < float(memory[0]) < 50 and float(memory[0]) > float(memory[-1]) > float(memory[4])


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    with pytest.raises(SystemExit) as stop:
        plan(capsys, "imagenet_resnet50w2", "--devices", "1", "8", "--memory", "80", "--teraflops", "25")
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and "(too much)" in rows(printed)["1", "data"][-1]
    assert "(too much)" not in rows(printed)["8", "data"][-1]
    assert re.search("1 device: batch_size=1024 with gradient_accumulation=1 needs about 8[0-9.]+ GiB", error)
    assert "80.0; set gradient_accumulation=2 or gradient_checkpointing=true." in error
    words = ["--devices", "1", "--memory", "80", "--teraflops", "25", "--gradient-accumulation", "2"]
    assert "(too much)" not in plan(capsys, "imagenet_resnet50w2", *words)


def test_auto_takes_only_what_fits():
    recipe = Recipe.from_file(RECIPES / "imagenet_resnet50_cat4.yaml")
    assert str(choose_sharing(recipe, "auto", Devices(4, 80 * GIB))) == "4 on teams of 4 x 1"
    assert str(choose_sharing(recipe, "auto", Devices(4, 20 * GIB))) == "4 on all"
    for parallelism in ("data", "members", "auto"):
        with pytest.raises(ValueError, match=r"gradient_accumulation=.* or gradient_checkpointing=true"):
            choose_sharing(recipe, parallelism, Devices(4, 8 * GIB))


def test_a_machine_is_measured_on_random_images(capsys, tmp_path):
    words = ["--devices", "2", "--smoke", "--members", "[2, 4]", "--wide-steps", "0"]
    words += ["--snapshots", "0", "--output", str(tmp_path / "no")]
    printed = plan(capsys, "scattered_digits_timecat", *words)
    assert re.search(r"Measured: cat2, [0-9,.]+ images per second, .* on the CPU with 16", printed)
    assert "Equal compute" in printed
    assert "Assumed" not in printed, "the digits are here"
    assert not (tmp_path / "no").exists(), "a plan writes nothing"


def test_batches_that_cannot_be_divided_are_named(capsys):
    printed = plan(capsys, "scattered_digits_timecat", "--devices", "3", "--teraflops", "0.01")
    assert "3 devices, parallelism=data is not possible: batch_size=64 must be a multiple of 3 processes" in printed
    assert [*rows(printed)] == [("3", "members"), ("3", "auto")]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--devices", "8"], "devices=[8] describes a plan; add --plan."),
        (["--memory", "80"], "memory=80.0 describes a plan; add --plan."),
        (["--plan", "--devices", "0"], "devices=[0] must be above 0."),
        (["--plan", "--teraflops", "nan"], "teraflops=nan must be above 0."),
        (["--efficiency", "-1"], "efficiency=-1.0 must be above 0."),
    ],
)
def test_options_of_a_plan_are_not_ignored(words, error, capsys):
    with pytest.raises(SystemExit):
        main([str(RECIPES / "scattered_digits_timecat.yaml"), "--cpu", *words])
    assert error in capsys.readouterr().err


def test_a_full_gpu_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "gradient_accumulation" in error and "gradient_checkpointing" in error and "bf16" in error
