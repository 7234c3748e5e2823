"""Garbage, near misses and names of strangers raise ValueError or OSError of one line, or nothing; and what can be
read can be shown, without anything that a terminal or a browser would take for more than text.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import traceback
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import numpy as np
import PIL.Image
import pytest
import yaml
from markdown_it import MarkdownIt

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleImageProcessor, assemble, load_data
from concat_ensemble.commands import app, predict, probe
from concat_ensemble.console import out
from concat_ensemble.data.dataset_recipes import DatasetRecipe
from concat_ensemble.inference.image_sources import open_images
from concat_ensemble.inference.prediction import Prediction
from concat_ensemble.inference.prediction_file import write_predictions
from concat_ensemble.reporting.html_report import write_report
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.reporting.tables import row_texts
from concat_ensemble.reporting.verdicts import verdict
from concat_ensemble.studies.results import Results
from concat_ensemble.training.recipe import Recipe
from tests.safety.mutations import any_name, any_text, as_json, as_yaml, change, damage, near

ROOT = Path(__file__).parents[2]
FEW, MANY = 40, 12_500  # of each of the eight kinds: 320, and 100,000
# Characters that move a cursor, turn the direction of text, or are none.
CONTROLS = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029", "\ufeff", "\u061c"} - {"\n", "\t"}
CONTROLS |= {*map(chr, range(0x200E, 0x2010)), *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}

# --- good files -----------------------------------------------------------------------------------------------------

PIXELS = {
    "input_size": [3, 32, 32],
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "image_mode": "RGB",
}
CONFIG = {
    "members": [
        {
            "architecture": "resnet10t",
            "model_args": {"channels": [8, 8, 16, 16], "act_layer": "gelu"},
            "num_features": 16,
            "preprocessing": PIXELS,
            "provenance": {"license": "mit"},
        }
    ],
    "active_members": [0],
    "standardize": False,
    "dtype": "float32",
    "id2label": {"0": "a", "1": "b"},
    "initializer_range": 0.02,
    "architectures": ["ConcatEnsembleModel"],
    "problem_type": None,
    "return_dict": True,
}
ROW = {
    "name": "pair",
    "kind": "ensemble",
    "width": 32,
    "num_members": 2,
    "steps": 5,
    "gflops": 1.0,
    "runs": [
        {
            "seed": 0,
            "metrics": {"top1": 0.5},
            "l2_strength": 0.1,
            "n_train": 9,
            "n_test": 9,
            "right": "AAA=",
            "draws": [0.5, 0.6],
            "intervals": {"top1": [0.4, 0.6]},
        }
    ],
}
RESULTS = {
    "protocol": "x",
    "ensemble": "pair",
    "dataset": {"name": "digits", "classes": [1], "test_images": 9},
    "probe": {"kind": "linear"},
    "rows": [ROW, ROW | {"name": "raw pixels", "kind": "control"}],
    "versions": {"torch": "2"},
    "seconds": {"total": 1.0},
}
FOUR = {
    "input_size": [4, 16, 16],
    "mean": [0.5] * 4,
    "std": [0.5] * 4,
    "image_mode": "channels",
    "channels": [0, 1, 2, 5],
}
PROCESSORS = [
    {"image_processor_type": "ConcatEnsembleImageProcessor", "geometries": geometries}
    for geometries in (
        [PIXELS],
        [PIXELS, PIXELS | {"input_size": [3, 24, 48], "crop_mode": "border"}],
        [PIXELS | FOUR],
    )
]

FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
CARDS = [FRONT_MATTER.match(path.read_text())[1] for path in sorted(ROOT.glob("model_cards/*/README.md"))]
FRONT_MATTERS = [yaml.load(text, yaml.CSafeLoader) for text in CARDS]  # the fast one
for metadata in FRONT_MATTERS:  # a few evaluations are enough, and faster
    metadata["model-index"][0]["results"] = metadata["model-index"][0]["results"][:1]
USERS_KEYS = (
    "model_name",
    "eval_results",
    "self",
    "ignore_metadata_errors",
    "tags",
    "language",
    "widget",
    "inference",
)
USERS_KEYS += (
    "license",
    "base_model",
    "datasets",
    "model-index",
    "library_name",
    "users",
    "kwargs",
    1,
    None,
    True,
    1.5,
)
PROVENANCES = [
    member["provenance"]
    for path in sorted(ROOT.glob("model_cards/*/config.json"))
    for member in json.loads(path.read_text())["members"][:2]
]
PROVENANCE_KEYS = ("hub_id", "revision", "ensemble_recipe", "weights", "label_names", "taken_from", "train_args")
PROVENANCE_KEYS += tuple(PROVENANCES[0])
DATASET_RECIPES = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / "concat_ensemble/data/recipes").glob("*.yaml"))[:5]
]
TRAINING_RECIPES = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / "training/recipes").glob("*timecat.yaml"))
]
CONFIG_KEYS = sorted(
    set(dir(ConcatEnsembleConfig)) | {"num_labels", "torch_dtype", "attn_implementation", "quantization_config"}
)
PROCESSOR_KEYS = (
    "size",
    "do_resize",
    "do_rescale",
    "image_mean",
    "resample",
    "crop_size",
    "self",
    "preprocess",
    "backend",
)
PROCESSOR_KEYS += (
    "auto_map",
    "processor_class",
    "feature_extractor_type",
    "_transforms",
    "model_input_names",
    "channels",
)

# --- what is shown --------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The names of a page's elements, and what their attributes point to."""

    def __init__(self, html: str):
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("href", "src") or name.startswith("on")]


def check_text(text: str, where: str) -> None:
    """Raise AssertionError for a character that is more than text."""
    controls = sorted({character for character in text if character in CONTROLS or 0xD800 <= ord(character) < 0xE000})
    assert not controls, f"{where} holds {controls}"


def check_line(text: str) -> None:
    check_text(text, "the error")
    assert "\n" not in text, f"the error has {len(text.splitlines())} lines"
    assert len(text) < 110_000, f"the error has {len(text):,} characters"  # a recipe is no longer


def check_card(path: Path) -> None:
    """A card shows text of strangers as text, and its metadata can be read."""
    text = path.read_text()
    body = text.split("\n---\n", 1)[1]
    check_text(body, "the card")
    tags = Tags(MarkdownIt("commonmark").enable("table").render(body))
    assert not tags.names & {"script", "iframe", "object", "form", "style"}, f"the card has {sorted(tags.names)}"
    targets = [target for target in tags.targets if "evil.example" in target or "javascript" in target]
    assert not targets, f"the card points to {targets}"


def check_report(path: Path) -> None:
    """A page has its own script alone, and nothing points elsewhere."""
    text = path.read_text()
    check_text(text, "the page")
    tags = Tags(text)
    assert text.count("<script") == 1, "the page has another script"
    assert not [target for target in tags.targets if "evil.example" in target or "javascript" in target]


def shown_by(show, *arguments, **options) -> str:
    """What is printed where there is no terminal."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogatepass")
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        show(*arguments, **options)
    stdout.flush()
    stderr.flush()
    return stdout.buffer.getvalue().decode("utf-8", "surrogatepass") + stderr.buffer.getvalue().decode()


def print_error(error: Exception) -> None:
    """As a command does."""

    def fail(**options):
        raise error

    command, app.app = app.app, fail
    try:
        app.main()
    except SystemExit as stop:
        assert stop.code == 2
    finally:
        app.app = command


# --- readers, of a file's content and in a copy of an ensemble ------------------------------------------------------


def read_config(content: bytes, folder: Path) -> None:
    (folder / "x.json").write_bytes(content)
    ConcatEnsembleConfig.from_pretrained(folder / "x.json")


def read_results(content: bytes, folder: Path) -> None:
    (folder / "x.json").write_bytes(content)
    results = Results.load(folder / "x.json")
    for row in results.rows:  # what could be read can be shown
        row_texts(results, row)
    verdict(results)
    assert len(results.protocol) == 8
    check_text(shown_by(probe.print_results, results), "the table")


def read_dataset_recipe(content: bytes, folder: Path) -> None:
    (folder / "x.json").write_bytes(content)
    DatasetRecipe.read(folder / "x.json")


def read_training_recipe(content: bytes, folder: Path) -> None:
    (folder / "x.json").write_bytes(content)
    Recipe.from_file(folder / "x.json")


def read_front_matter(content: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(content)
    write_card(folder, redraw=False)
    assert yaml.safe_load(FRONT_MATTER.match((folder / "README.md").read_text())[1])["library_name"] == "transformers"


def read_processor(content: bytes, folder: Path) -> None:
    (folder / "preprocessor_config.json").write_bytes(content)
    processor = ConcatEnsembleImageProcessor.from_pretrained(folder)
    sides = [side / geometry["crop_pct"] for geometry in processor.geometries for side in geometry["input_size"]]
    if max(sides) < 512:  # sizes.py has the large ones
        processor(np.zeros((6, 9, 7), np.uint8), input_data_format="channels_first") if any(
            "channels" in geometry for geometry in processor.geometries
        ) else processor(PIL.Image.new("RGB", (9, 7)))


def read_provenance(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    write_card(folder, redraw=False)
    check_card(folder / "README.md")


def make_provenance(config: dict):
    """How to make a config whose members come from anywhere, with the same weights."""

    def make(random: Random) -> bytes:
        members = []
        for member in config["members"]:
            provenance = change(random.choice(PROVENANCES), random, PROVENANCE_KEYS)
            weights = member["provenance"]["weights_sha256"]
            kept = {"weights_sha256": weights} if random.random() < 0.95 and isinstance(provenance, dict) else {}
            members.append(member | {"provenance": provenance | kept if kept else provenance})
        content = as_json(config | {"members": members}).encode("utf-8", "surrogatepass")
        return damage(content, random) if random.random() < 0.1 else content

    return make


def make_front_matter(random: Random) -> bytes:
    metadata = near(FRONT_MATTERS, as_yaml, USERS_KEYS)(random)
    title = any_text(random) if random.random() < 0.2 else "Pair"
    return b"---\n%s\n---\n\n# %s\n\n## Mine\n\ntext\n" % (metadata, title.encode("utf-8", "surrogatepass"))


# --- names ----------------------------------------------------------------------------------------------------------

GOOD_NAMES = {
    "results": "digits",
    "row": "pair, member 0 alone",
    "title": "pair",
    "image": "photo 1",
    "checkpoint": "resnet10t",
    "class": "cat",
    "dataset": "uoft-cs/cifar100",
    "member": "random:resnet10t",
}
NAMES_OFTEN = [*GOOD_NAMES, "results", "row", "title", "image"]  # the others take longer


def make_name(random: Random) -> bytes:
    kind = random.choice(NAMES_OFTEN)
    return f"{kind}\n{any_name(random, GOOD_NAMES[kind])}".encode("utf-8", "surrogatepass")


def can_be_a_file(name: str) -> bool:
    try:
        return 0 < len(os.fsencode(name)) < 200 and not set(name) & {"/", "\0"} and name.strip(".") != ""
    except UnicodeEncodeError:
        return False


def read_name(content: bytes, folder: Path) -> None:
    kind, name = content.decode("utf-8", "surrogatepass").split("\n", 1)
    if can_be_a_file(name) or kind in ("row", "title", "dataset", "member"):
        NAMES[kind](name, folder)


def name_results(name: str, folder: Path) -> None:
    path = (folder / "results/digits.json").rename(folder / "results" / f"{name}.json")
    figure = folder / "figures" / f"{name}.png"
    figure.write_bytes(b"")  # newer than the results: it is not drawn
    try:
        check_card(write_card(folder, redraw=False))
    finally:
        figure.unlink()
        path.rename(folder / "results/digits.json")


def name_row(name: str, folder: Path) -> None:
    path = folder / "results/digits.json"
    before = path.read_bytes()
    content = json.loads(before)
    content |= {"ensemble": name, "dataset": {"name": name}, "class_names": [name], "hardware": name, "command": name}
    content["rows"][0]["name"], content["rows"][1]["name"] = name, f"{name}, member 0 alone"
    path.write_text(json.dumps(content))
    os.utime(path, (0, 0))
    try:
        results = Results.load(path)
        check_text(shown_by(probe.print_results, results, wide=len(name) % 2 == 0), "the table")
        check_card(write_card(folder, redraw=False))
        if len(name) % 8 == 0:  # which takes longer
            check_report(write_report([folder], folder / "report.html"))
    finally:
        path.write_bytes(before)
        os.utime(path, (0, 0))


def name_title(name: str, folder: Path) -> None:
    check_card(write_card(folder, name, redraw=False))


def name_image(name: str, folder: Path) -> None:
    images = folder / "images"
    files = [images / f"{name}.png", images / name]
    images.mkdir(exist_ok=True)
    for file in files:
        file.write_bytes(b"x")
    try:
        source = open_images(images)
        problem = source.describe(0)
        predictions = [Prediction(source.names[0], np.ones(2) / 2), Prediction(source.names[0], None, problem)]
        path = folder / "x.csv"
        summary = write_predictions(path, source.heading, [name, f"{name}."], predictions, top=1)
        check_text(shown_by(predict.print_left_out, source, summary), "the list of files")
        check_text(shown_by(out.print, predict.describe_summary(path, summary), markup=False), "the summary")
        with path.open(newline="", encoding="utf-8") as file:
            assert len(list(csv.reader(file))) == 3
    finally:
        for file in files:
            file.unlink()


def name_checkpoint(name: str, folder: Path) -> None:
    for ending in (".safetensors", ".pth", ".npz"):
        file = folder / f"{name}{ending}"
        file.write_bytes(b"x")
        try:
            assemble(file)
        except (ValueError, OSError) as error:
            check_line(shown_by(print_error, error).strip())
        finally:
            file.unlink()


def name_class(name: str, folder: Path) -> None:
    images = folder / "data"
    for number in range(4):
        for label in (name, "other"):
            (images / label).mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (4, 4), 60 * number + 5).save(images / label / f"{number}.png")
    try:
        load_data(images)
    finally:
        for path in sorted(images.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def name_dataset(name: str, folder: Path) -> None:
    load_data(name)


def name_member(name: str, folder: Path) -> None:
    assemble(name)


NAMES = {
    "results": name_results,
    "row": name_row,
    "title": name_title,
    "image": name_image,
    "checkpoint": name_checkpoint,
    "class": name_class,
    "dataset": name_dataset,
    "member": name_member,
}

# --- the run --------------------------------------------------------------------------------------------------------

READERS = {
    "config": (near([CONFIG], as_json, CONFIG_KEYS), read_config),
    "results": (near([RESULTS], as_json, [*RESULTS, *ROW, *ROW["runs"][0]]), read_results),
    "dataset recipe": (near(DATASET_RECIPES, as_yaml, list(DATASET_RECIPES[0])), read_dataset_recipe),
    "training recipe": (near(TRAINING_RECIPES, as_yaml, list(TRAINING_RECIPES[0])), read_training_recipe),
    "front matter": (make_front_matter, read_front_matter),
    "processor file": (near(PROCESSORS, as_json, PROCESSOR_KEYS), read_processor),
    "provenance": (None, read_provenance),  # of the ensemble's own config
    "file name": (make_name, read_name),
}


def describe_fault(error: Exception) -> str:
    """Its kind, and the last of our lines in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "site-packages" not in frame.filename]
    said = str(error).split(" holds [")[0] if isinstance(error, AssertionError) else ""  # other characters, same fault
    return f"{type(error).__name__} at {' < '.join(ours[:-4:-1])} {said}"


def fuzz(reader: str, folder: Path, count: int, record_property) -> None:
    make, read = READERS[reader]
    config = (folder / "config.json").read_bytes()
    make = make or make_provenance(json.loads(config))
    refused, faults = 0, defaultdict(list)
    for seed in range(count):
        content = make(Random(f"{reader} {seed}"))
        try:
            read(content, folder)
        except (ValueError, OSError) as error:
            refused += 1
            try:
                check_line(shown_by(print_error, error).strip())
                assert reader == "file name" or "\n" not in str(error), "the error has several lines"
            except AssertionError as problem:
                faults[f"{describe_fault(error)}, but {str(problem).split(' [')[0]}"].append((content, seed, error))
        except Exception as error:
            faults[describe_fault(error)].append((content, seed, error))
    record_property("inputs", f"{reader}: {count:,} inputs, of which {refused:,} were refused")
    (folder / "config.json").write_bytes(config)
    listed = []
    for fault, cases in sorted(faults.items(), key=lambda item: -len(item[1])):
        content, seed, error = min(cases, key=lambda case: len(case[0]))
        listed.append(f"{len(cases)} times {fault}\n    {str(error)[:300]!r}\n    seed {seed}: {content[:400]!r}")
    if faults:
        total = sum(map(len, faults.values()))
        pytest.fail(f"{total} faults of {len(faults)} kinds in {count:,} inputs:\n" + "\n".join(listed), pytrace=False)
    assert refused > 0, "a fuzz that never refuses tries nothing"
    assert refused < count or count == FEW, "a fuzz that always refuses tries nothing"


@pytest.fixture
def ensemble(folder):
    """A copy of the ensemble with a card, whose figures are newer than its results."""
    os.utime(folder / "results/digits.json", (0, 0))
    write_card(folder)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_only_documented_errors(reader, ensemble, record_property):
    fuzz(reader, ensemble, FEW, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_only_documented_errors_in_a_hundred_thousand(reader, made, tmp_path, record_property):
    folder = shutil.copytree(made, tmp_path / "pair")
    os.utime(folder / "results/digits.json", (0, 0))
    write_card(folder)
    assert MANY * len(READERS) >= 100_000
    fuzz(reader, folder, MANY, record_property)
