"""Recipe files, and `probe --recipe` on folders whose paths are the Hub ids of the recipes."""

import inspect
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from concat_ensemble.data.dataset_recipes import DATASETS, LOAD_ARGUMENTS, METRICS, DatasetRecipe, dataset_recipe
from concat_ensemble.data.loading import load_data
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.recipe_files import recipe_names
from concat_ensemble.studies.results import Results

EXPECTED = "imagenet1k inaturalist2018 cifar10 cifar100 camelyon17 flowers102 oxford-pets dtd food101 stanford-cars"
EXPECTED += " fgvc-aircraft caltech101 eurosat svhn mnist stl10"


# --- the files -------------------------------------------------------------------------------------------------------


def test_every_usual_dataset_has_a_recipe():
    assert recipe_names(DATASETS) == sorted(EXPECTED.split())


@pytest.mark.parametrize("name", recipe_names(DATASETS))
def test_a_recipe_is_valid_and_opens_with_its_command(name):
    recipe = dataset_recipe(name)
    assert recipe.recipe == name and recipe.train_split and recipe.test_split and recipe.image_column
    assert recipe.test_split != recipe.validation_split and recipe.num_classes >= 2 and recipe.license
    text = (Path(inspect.getfile(DatasetRecipe)).parent / "recipes" / f"{name}.yaml").read_text()
    comment = text.partition("\nname:")[0].splitlines()
    assert comment[0].startswith(f"# concat-ensemble probe ENSEMBLE --recipe {name}")
    assert all(line.startswith("# ") for line in comment) and max(map(len, text.splitlines())) <= 120
    assert f"{recipe.test_images:,}" in text


def test_load_arguments_and_metrics_exist():
    assert set(LOAD_ARGUMENTS) <= set(inspect.signature(load_data).parameters)
    measured = ProbeMetrics().compute(predictions=np.eye(6), references=list(range(6)), metrics=METRICS)
    assert {name: measured[name] for name in METRICS} == dict.fromkeys(METRICS, 1.0)


def test_the_message_about_an_unknown_recipe_lists_similar_names_and_all_names():
    with pytest.raises(
        ValueError, match=r"no recipe 'cifar-100'; did you mean cifar100 or cifar10\?.*caltech101, .*svhn"
    ):
        dataset_recipe("cifar-100")
    with pytest.raises(ValueError, match=r"no recipe 'list'.*caltech101"):
        dataset_recipe("list")


GOOD = {"name": "me/mine", "num_classes": 2, "test_images": 5, "metric": "top1", "license": "MIT"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_colum": "y"}, "no field 'label_colum'; did you mean label_column"),
        ({"num_classes": "2"}, "num_classes='2' must be int"),
        ({"num_classes": True}, "num_classes=True must be int"),
        ({"config": 3}, r"config=3 must be str \| null"),
        ({"metric": "top5"}, "metric='top5' must be one of top1, mean_per_class, macro_f1"),
        ({"license": None}, "license=None must be str"),
    ],
)
def test_a_bad_recipe_is_refused(change, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=f"mine.yaml: {message}"):
        DatasetRecipe.read(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("", "holds NoneType; write one 'field: value'"),
        ("name: x\nlicense: MIT", "lacks num_classes"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"mine.yaml {message}"):
        DatasetRecipe.read(tmp_path / "mine.yaml")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_hub(tmp_path):
    """`on_hub(recipe, classes=..., **images per class of a split)`: a folder that has what the recipe's Hub id has."""

    def place(name, classes=None, **splits):
        recipe, rng = dataset_recipe(name), np.random.default_rng(0)
        columns = {recipe.image_column: Image(), recipe.label_column: ClassLabel(classes or recipe.num_classes)}
        if name == "cifar100":
            columns["coarse_label"] = ClassLabel(20)
        folder = tmp_path / recipe.name
        folder.mkdir(parents=True)
        for split, per_class in splits.items():
            labels = np.repeat(np.arange(classes or recipe.num_classes), per_class)
            pixels = np.clip(rng.integers(0, 60, (len(labels), 8, 8)) + labels[:, None, None], 0, 255).astype(np.uint8)
            values = {recipe.image_column: [PILImage.fromarray(p) for p in pixels], recipe.label_column: labels}
            values |= {"coarse_label": labels % 20} if name == "cifar100" else {}
            datasets.disable_progress_bars()
            Dataset.from_dict(values, features=Features(columns)).to_parquet(folder / f"{split}.parquet")
        return recipe

    return place


def probed(folder, name) -> Results:
    return Results.load(folder / "results" / f"{name}.json")


def test_one_recipe_is_probed_as_its_dataset_would_be(run, refused, folder, on_hub):
    on_hub("cifar100", train=2, test=2)
    words = ["probe", "pair", "--recipe", "cifar100", "--limit", "200", "--seed", "2"]
    code, out, err = run(*words)
    assert (
        code == 0
        and "Traceback" not in err
        and "results: pair/results/cifar100-limit-200.json" in out
        and "raw pixels" in out
    )
    results = probed(folder, "cifar100-limit-200")
    by_hand = {"name": "uoft-cs/cifar100", "label_column": "fine_label", "limit": 200, "seed": 2}
    assert by_hand.items() <= results.dataset.items() and results.dataset["recipe"] == "cifar100"
    assert run(*words, "--json", "--quiet") == (0, (folder / "results" / "cifar100-limit-200.json").read_text(), "")
    refused(["probe", "pair", "--recipe", "cifar100"], "200 test images where recipe cifar100 expects 10,000")


def test_several_recipes_give_one_table_and_one_that_fails_loses_none(run, folder, on_hub):
    on_hub("cifar10", train=20, test=20)
    on_hub("oxford-pets", train=3, test=6)
    on_hub("svhn", classes=3, train=5, test=5)
    names = [word for name in ("cifar10", "mnist", "oxford-pets", "svhn") for word in ("--recipe", name)]
    code, out, err = run("probe", "pair", *names, "--limit", "200", "--quiet")
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: 2 of 4 recipes failed: mnist: no dataset 'ylecun/mnist'")
    assert "svhn: ufldl-stanford/svhn has 3 classes where recipe svhn expects 10" in err
    for name in ("cifar10", "oxford-pets"):
        assert f"results: pair/results/{name}-limit-200.json" in out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in table][:2] == ["pair", "its best member, by test"]
    assert {"untrained members", "raw pixels"} < {row[0] for row in table}
    cifar10, pets = (probed(folder, f"{name}-limit-200") for name in ("cifar10", "oxford-pets"))
    best = max((row for row in cifar10.rows if row.kind == "member"), key=lambda row: row.mean)
    (run_on_pets,) = pets.rows[0].runs
    for cell, share, (low, high) in (
        (table[1][1], best.mean, best.interval),
        (table[0][2], run_on_pets.metrics["mean_per_class"], run_on_pets.intervals["mean_per_class"]),
    ):
        assert cell == f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert run_on_pets.metrics["mean_per_class"] != run_on_pets.metrics["top1"]

    written = (folder / "results" / "cifar10-limit-200.json").stat().st_mtime_ns
    code, again, err = run("probe", "pair", "--recipe", "oxford-pets", "--recipe", "cifar10", "--limit", "200")
    assert code == 0 and err.count("is there already") == 2 and "[" in again
    assert (folder / "results" / "cifar10-limit-200.json").stat().st_mtime_ns == written
    _, out, _ = run(
        "probe", "pair", "--recipe", "cifar10", "--recipe", "oxford-pets", "--limit", "200", "--json", "-q"
    )
    assert [study["dataset"]["recipe"] for study in json.loads(out)] == ["cifar10", "oxford-pets"]


def test_the_test_split_of_a_recipe_is_never_trained_or_chosen_on(tmp_path, monkeypatch, on_hub):
    """Food-101 calls it `validation`, and it must not be used as a validation split by that name."""
    monkeypatch.chdir(tmp_path)
    data = on_hub("food101", train=5, validation=1).load(limit=101)
    shown = {kind: {image["bytes"] for image in split["image"]} for kind, split in data.items()}
    assert len(shown["test"]) == 101 and not shown["test"] & (shown["validation"] | shown["train"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "cifar9"], ["no recipe 'cifar9'", "did you mean cifar10", "stl10"]),
        (["--recipe", "cifar10", "--dataset", "digits"], ["--recipe cifar10 does not go with --dataset"]),
        (["--recipe", "cifar10", "--test-split", "a", "--test-size", "0.5"], ["with --test-split and --test-size"]),
        (["--recipe", "cifar10", "--recipe", "mnist", "--output", "x.json"], ["more than one --recipe", "--output"]),
        (["--recipe", "cifar10", "--recipe", "mnist", "--save-head"], ["more than one --recipe", "--save-head"]),
        (["--recipe", "mnist"], ["no dataset 'ylecun/mnist'"]),
    ],
)
def test_probe_refuses(words, message, refused, folder):
    refused(["probe", "pair", *words], *message)
