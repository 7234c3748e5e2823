"""The recipes on datasets with the structure of ImageNet, iNaturalist and CIFAR, from local files and from a Hub."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image

from concat_ensemble.data.dataset_recipes import dataset_recipe
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import read_labels
from concat_ensemble.data.loading import load_data, load_stream
from concat_ensemble.training import distillation, finetuning, pretraining
from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.images import Images
from concat_ensemble.training.options import read_options
from concat_ensemble.training.recipe import Recipe, Settings
from tests.clients import Client
from tests.hub_server import HubServer
from tests.stand_ins import IMAGENET_CLASSES, SPECIES, encode, write_cifar100, write_imagenet, write_inaturalist
from tests.training.test_recipes_smoke import IMAGENET, RECIPES, run

TINY = ["--architecture", "resnet10t", "--model-args", "{channels: [8, 8, 8, 8], stem_width: 8}"]
TINY += ["--input-size", "[3, 32, 32]"]
SMOKE = ["--smoke", "--cpu", "--mixed-precision", "no"]
WRITERS = {"imagenet": write_imagenet, "inaturalist": write_inaturalist, "cifar100": write_cifar100}
CLASSES = {"imagenet": IMAGENET_CLASSES, "inaturalist": SPECIES, "cifar100": 100}
COLOR = Pixels((3, 32, 32), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of parquet files by the names of the datasets."""
    datasets.disable_progress_bars()
    return {name: write(tmp_path_factory.mktemp("data") / name) for name, write in WRITERS.items()}


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` waits 5 s each time a stream of parquet files ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def member(data, tmp_path_factory):
    """An ensemble of one member of tiny color images."""
    output = tmp_path_factory.mktemp("runs")
    recipe = RECIPES[0].parent / "imagenet_resnet50_cat1.yaml"
    run(pretraining, recipe, *SMOKE, *TINY, "--dataset", data["imagenet"], "--evaluate-every", 8, "--output", output)
    return output / "cat1"


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_every_imagenet_recipe_reads_its_images(path, data):
    recipe, _ = read_options(Recipe, "", [str(path), "--smoke", "--dataset", data["imagenet"]])
    assert yaml.safe_load(path.read_text())["dataset"] == "ILSVRC/imagenet-1k"
    images = Images(recipe, COLOR, with_test=False)
    assert images.size == len(images.class_names) == IMAGENET_CLASSES and set(images.data) == {"train"}
    assert next(images.batches([0])).views[0][0].shape == (16, 3, 32, 32)


def test_every_kind_of_image_is_read(data):
    """Gray, CMYK, rotated and tiny ones, among others."""
    images = Images(Settings(dataset=data["imagenet"], batch_size=1_000), COLOR, with_test=False)
    assert next(images.batches([0])).views[0][0].shape == (1_000, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_every_imagenet_recipe_trains(path, data, tmp_path):
    run(pretraining, path, *SMOKE, *TINY, "--dataset", data["imagenet"], "--output", tmp_path)
    assert (tmp_path / f"cat{yaml.safe_load(path.read_text())['members'][0]}" / "config.json").is_file()


@pytest.mark.parametrize("name", WRITERS)
def test_pretraining_never_sees_images_that_later_tests_may_use(name, data):
    hidden = {"train": 1_000} if name == "imagenet" else {"train": 8_322} if name == "inaturalist" else {"train": 200}
    source = {split: len(rows) for split, rows in datasets.load_dataset("parquet", data_dir=data[name]).items()}
    images = Images(Settings(dataset=data[name]), COLOR, with_test=False)
    assert images.size == hidden["train"] == source["train"] and len(images.class_names) == CLASSES[name]
    watched = Images(Settings(dataset=data[name], evaluate_every=5), COLOR, with_test=False)
    if "validation" in source:
        assert watched.size == source["train"] and len(watched.labels("validation")) == source["validation"]
    else:  # CIFAR: one in a hundred of the training images
        assert (watched.size, len(watched.labels("validation"))) == (198, 2)


def test_nothing_is_left_out_of_a_dataset_without_a_test_split_unless_the_recipe_says_so(data):
    train = f"parquet:{data['cifar100']}/train.parquet"
    assert Images(Settings(dataset=train), COLOR, with_test=False).size == 200
    assert Images(Settings(dataset=train, test_size=0.3), COLOR, with_test=False).size == 140
    assert Images(Settings(dataset=train), COLOR).size == 140, "fine-tuning tests on the others"


def test_an_empty_test_split_and_a_hidden_validation_split_are_no_business_of_pretraining(data):
    """Competitions hide both."""
    source = datasets.load_dataset("parquet", data_dir=data["imagenet"])
    splits = DatasetDict(train=source["train"], validation=source["test"], test=source["train"].select([]))
    assert set(load_data(splits, for_training=True, hold_out=False)) == {"train"}
    with pytest.raises(ValueError, match=r"the validation split's labels are hidden \(-1\)"):
        load_data(splits, for_training=True)


@pytest.mark.parametrize(
    "name", ["imagenet", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WRITERS)[1:])]
)
def test_fine_tuning_and_distillation_start(name, data, member, tmp_path, capsys):
    finetune = [RECIPES[0].parent / "scattered_digits_finetune.yaml", *SMOKE, "--classes", "null", "--model", member]
    finetune += ["--dataset", data[name], "--output", tmp_path / "tuned"]
    if name != "cifar100":
        with pytest.raises(SystemExit):
            run(finetuning, *finetune)
        assert "labels are hidden (-1); name a split that has them, such as test_split='val" in capsys.readouterr().err
        finetune += ["--test-split", "validation"]
    run(finetuning, *finetune)
    assert (tmp_path / "tuned" / "two-stage" / "config.json").is_file()
    distill = [RECIPES[0].parent / "scattered_digits_distill.yaml", *SMOKE, *TINY, "--augmentation", "timm"]
    distill += ["--classes", "null", "--teachers", f"[{member}]", "--dataset", data[name]]
    run(distillation, *distill, "--output", tmp_path / "distilled")
    assert (tmp_path / "distilled" / "distilled" / "config.json").is_file()


@pytest.mark.parametrize("name", ["imagenet", pytest.param("cifar100", marks=pytest.mark.slow)])
def test_a_stream_is_the_training_split_alone(name, data, tmp_path):
    stream = load_stream(data[name])
    assert sum(1 for _ in stream) == (1_000 if name == "imagenet" else 200)
    recipe = RECIPES[0].parent / "imagenet_resnet50_cat1.yaml"
    words = [*SMOKE, *TINY, "--dataset", data[name], "--streaming", "true", "--output", tmp_path]
    run(pretraining, recipe, *words)
    assert (tmp_path / "cat1" / "config.json").is_file()


def test_hidden_labels_of_a_stream_are_named_before_they_reach_a_network(data):
    settings = Settings(dataset=data["imagenet"], streaming=True, train_split="test", batch_size=4)
    with pytest.raises(ValueError, match=r"the label of image \d+ of the stream is hidden"):
        next(Images(settings, COLOR).batches([0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_corrupt_image_is_named_in_one_line(workers, data, tmp_path, capsys):
    """A process that reads images gives its whole traceback."""
    train = load_data(data["cifar100"], for_training=True, hold_out=False)["train"].cast_column("image", Image(False))
    rows = train.to_dict()
    rows["image"][77] = {"bytes": encode(1, size=(32, 32))[:300], "path": "n77.JPEG"}
    Dataset.from_dict(rows, train.features).to_parquet(tmp_path / "train.parquet")
    words = ["--cpu", "--mixed-precision", "no", *TINY, "--num-workers", workers, "--dataset", tmp_path]
    with pytest.raises(SystemExit) as stop:
        run(pretraining, RECIPES[0], *words, "--batch-size", "200", "--output", tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line == "error: image 76 (n77.JPEG) cannot be read: image file is truncated; remove or repair it."


@pytest.mark.parametrize(
    ("name", "stand_in"), [("imagenet1k", "imagenet"), ("cifar100", "cifar100"), ("inaturalist2018", "tree")]
)
def test_dataset_recipes_read_local_copies(name, stand_in, data, tmp_path):
    recipe = dataset_recipe(name)
    source = data.get(stand_in) or write_species_tree(tmp_path / "inaturalist-2018")
    loaded = load_data(**recipe.load_arguments | {"name": source})
    assert set(loaded) == {"train", "validation", "test"}
    test = {"imagenet1k": 40, "cifar100": 200, "inaturalist2018": 3}[name]
    assert len(loaded["test"]) == test and (read_labels(loaded["test"]) >= 0).all()
    assert read_image(loaded["test"], 0).size in ((12, 10), (32, 32), (6, 5))


def write_species_tree(folder) -> str:
    """iNaturalist's folders: a small copy of the training split beside it, classes of one image, a hidden test."""
    files = [f"{split}/{k:04}/{image}.png" for split in ("train", "train_mini") for k in range(9) for image in (0, 1)]
    files += [f"val/{k:04}/0.png" for k in range(3)] + ["train/0009/0.png", "test/0.png", "test/1.png"]
    for number, file in enumerate(files):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number, size=(6, 5)))
    return f"imagefolder:{folder}"


def test_folders_of_species_and_a_split_of_a_longer_name(tmp_path):
    source = write_species_tree(tmp_path)
    images = Images(Settings(dataset=source), COLOR, with_test=False)
    assert images.size == 19 and len(images.class_names) == 10, "train_mini is a part of train"
    mini = Images(Settings(dataset=source, train_split="train_mini"), COLOR, with_test=False)
    assert mini.size == 18
    both = load_data(DatasetDict(train_mini=mini.split, val=mini.data["train"]), for_training=True)
    assert (len(both["train"]), len(both["validation"])) == (18, 18)


def test_a_million_images_are_split_without_reading_them():
    """As many as ImageNet has, with bytes that are no images: it takes 1.6 s on a slow core, and none is decoded."""
    count = 1_281_167
    features = Features(image=Image(), label=ClassLabel(num_classes=1_000))
    binary = pa.array([b"x"], pa.binary()).take(pa.array([0] * count))
    column = pa.StructArray.from_arrays([binary, pa.nulls(count, pa.string())], ["bytes", "path"])
    labels = pa.array(range(count)).cast(pa.int64())
    labels = pa.compute.subtract(labels, pa.compute.multiply(pa.compute.divide(labels, 1_000), 1_000))
    split = Dataset(
        pa.table({"image": column, "label": labels}, features.arrow_schema), DatasetInfo(features=features)
    )
    loaded = load_data(DatasetDict(train=split), for_training=True, validation_size=0.01, test_size=None)
    assert {kind: len(part) for kind, part in loaded.items()} == {"train": 1_268_355, "validation": 12_812}
    assert set(read_labels(loaded["validation"])) == set(range(1_000)), "stratified"


def place(hub: HubServer, name: str, folder, revision: str | None = None) -> None:
    """Put a folder's parquet files on the Hub."""
    hub.create("datasets", name, False)
    files = {
        str(path.relative_to(folder)): hub.store(path.read_bytes(), lfs=True) for path in folder.rglob("*.parquet")
    }
    for ref in filter(None, ("refs/heads/main", revision)):
        hub.write("datasets", name, hub.repo("datasets", name), ref, files, "data")


@pytest.mark.slow
def test_the_recipes_read_the_hub_by_their_own_names(data, tmp_path):
    """One process for all, since it has to start with the address of the Hub."""
    recipes = {name: dataset_recipe(name) for name in ("imagenet1k", "cifar100")}
    with HubServer(tmp_path / "hub") as hub:
        for name, recipe in recipes.items():
            place(hub, recipe.name, Path(data[name.removesuffix("1k")]), recipe.revision)
        client = Client(hub, tmp_path / "home", None, True)
        client("import datasets; datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0")
        client("import torch; torch.set_num_threads(1)")
        client("from concat_ensemble.data.dataset_recipes import dataset_recipe")
        client("from concat_ensemble.data.loading import load_data")
        client("from concat_ensemble.training import pretraining")
        for name in recipes:
            client(f"data = load_data(**dataset_recipe({name!r}).load_arguments)")
            assert client.ask("len(data['test'])") == (200 if name == "cifar100" else 40)
        for number, streaming in enumerate(("false", "true")):
            words = [IMAGENET[0], *SMOKE, *TINY, "--streaming", streaming, "--output", tmp_path / str(number)]
            client(f"pretraining.main({list(map(str, words))!r})")
            assert (tmp_path / str(number) / "cat1" / "config.json").is_file()
        client.process.kill()


@pytest.mark.parametrize("limit", [20, 100_000])
def test_a_limit_is_that_of_the_images_that_are_trained_on(limit):
    train = load_data("digits", limit=limit, validation_size=0.3, test_size=None, for_training=True, hold_out=False)
    assert len(train["train"]) == min(limit, 1_797)
