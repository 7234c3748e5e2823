"""Every block of code in README and docs runs, and its commands are what a reader would type.

They run in order, a page after the other, in one folder and one process, with a Hub on loopback: its backbones have
random weights and see small images, and its datasets have a few images, so commands get a smaller `--limit`. What
takes long stands in `ELSEWHERE` with the test that runs it.
"""

import io
import itertools
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from timm.models import save_for_hf
from typer.testing import CliRunner

from concat_ensemble.commands.app import app
from concat_ensemble.data.dataset_recipes import dataset_recipe
from tests.clients import COMMAND, Client
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BACKBONES = [
    "resnet18.a1_in1k",
    "resnet18.tv_in1k",
    "efficientnet_b0.ra_in1k",
    "deit_tiny_patch16_224.fb_in1k",
]
# Run by the reader first, so that forward passes take seconds instead of minutes: the backbones see 48x48.
SIZE = (3, 48, 48)
SMALL_IMAGES = f"""
from timm.models import _registry

for name, cfg in _registry._model_pretrained_cfgs.items():
    if name.startswith(("resnet18", "efficientnet_b0", "deit_tiny", "vit_tiny_patch16_224")):
        cfg.input_size, cfg.test_input_size = {SIZE}, None
"""
ELSEWHERE = {
    "pip install .": "tests/test_wheel.py",
    "make test": "this run",
    "make demo": "tests/concat_ensemble/experiments/test_compare.py",
    "concat-ensemble reproduce all": "tests/concat_ensemble/experiments/test_reproduce.py",
    "concat-ensemble app two-resnets --dataset imagefolder:photos": "tests/concat_ensemble/inference/test_serving.py",
    "concat-ensemble mixture scattered_digits": "tests/concat_ensemble/experiments/test_mixture.py",
}
# Of datasets; what another page made is replaced.
SMALLER = {command: ["--limit", "12", "--overwrite"] for command in ("probe", "select", "compare")}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def png(rng: np.random.Generator, bright: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(rng.integers(bright, bright + 60, (24, 24, 3)).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def put(hub: HubServer, kind: str, name: str, revision: str, files: dict[str, bytes]) -> None:
    hub.create(kind, name, private=False)
    kept = {path: hub.store(content, lfs=True) for path, content in files.items()}
    for ref in ("refs/heads/main", revision):
        hub.write(kind, name, hub.repo(kind, name), ref, kept, "as it is there")


def parquet(labels: list[int], names: list[str], image: str, label: str, seed: int = 0) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    rows = [{"bytes": png(rng, 40 * (number % 4)), "path": None} for number in labels]
    features = Features({image: Image(), label: ClassLabel(names=names)})
    Dataset.from_dict({image: rows, label: labels}, features=features).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A process with the package, in a folder with some photos and the ensembles that the pages speak of."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        torch.manual_seed(0)
        for name in BACKBONES:
            folder = tmp_path_factory.mktemp(name)
            save_for_hf(timm.create_model(name, pretrained_cfg_overlay={"input_size": SIZE}), folder)
            put(hub, "models", f"timm/{name}", "main", {path.name: path.read_bytes() for path in folder.iterdir()})
        some = [parquet([0, 1, 2] * 6, ["apple", "bear", "can"], "img", "fine_label", seed) for seed in range(2)]
        put(
            hub,
            "datasets",
            "uoft-cs/cifar100",
            "main",
            {f"data/{split}-0.parquet": part for split, part in zip(("train", "test"), some, strict=True)},
        )
        for known in map(dataset_recipe, ("cifar10", "dtd")):
            counts = {known.train_split: 20 * known.num_classes, known.test_split: known.test_images}
            files = {
                f"data/{split}-0.parquet": parquet(
                    [k % known.num_classes for k in range(count)],
                    [f"class {k}" for k in range(known.num_classes)],
                    known.image_column,
                    known.label_column,
                    seed=len(split),
                )
                for split, count in counts.items()
            }
            put(hub, "datasets", known.name, known.revision or "main", files)
        home = tmp_path_factory.mktemp("reader") / "home"
        client = Client(hub, home, TOKEN, package=True)
        client(SMALL_IMAGES)
        rng = np.random.default_rng(1)
        shutil.copytree(ROOT / "model_cards", home / "model_cards")
        (home / "photo.jpg").write_bytes(png(rng, 0))
        for number, kind in enumerate(("cat", "dog", "owl")):
            (home / "photos" / kind).mkdir(parents=True)
            for k in range(10):
                (home / "photos" / kind / f"{k}.png").write_bytes(png(rng, 60 * number))
        client.commands = []
        lines = [line for page in PAGES for _, text in blocks(page) for line in text.splitlines()]
        for ensemble in ("two-resnets", "three-backbones"):
            words = shlex.split(next(line for line in lines if f"--output {ensemble}" in line))
            client(COMMAND.format(words=words[1:]))
            client.commands.append(words)
            probe = f"probe {ensemble} --dataset imagefolder:photos --limit 6 --controls none --quiet"
            client(COMMAND.format(words=probe.split()))
        yield client
        client.process.kill()
        client.process.wait()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, reader):
    for language, text in blocks(page):
        if language == "text":
            continue
        if language == "python":
            reader(text)
            continue
        assert language == "bash"
        for line in text.splitlines():
            program, *words = shlex.split(line)
            if line in ELSEWHERE or [program, *words] in reader.commands:
                continue
            if program == "accelerate":
                assert all((ROOT / word).is_file() for word in words if "/" in word)  # tests/training run it
                continue
            assert program == "concat-ensemble", line
            reader.commands.append([program, *words])  # a command that stands on two pages runs once
            if "--recipe" in words:  # on a copy, since verify probes what is on the card again
                shutil.copytree(reader.home / words[1], reader.home / "with-recipes", dirs_exist_ok=True)
                words[1] = "with-recipes"
                words += ["--controls", "none"]
            outputs = [word for option, word in itertools.pairwise(words) if option == "--output"]
            words += ["--overwrite"] * any((reader.home / output).exists() for output in outputs)
            words += SMALLER.get(words[0], []) + ["--repeats", "2"] * ("--repeats" in words)
            reader(COMMAND.format(words=words))


def test_each_mistake_gives_the_message_that_stands_beside_it(reader):
    rows = re.findall(
        r"^\| `(concat-ensemble .*?)` \| `(.*?)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 10
    for command, message in rows:
        _, said, code = reader.run(COMMAND.format(words=shlex.split(command)[1:]))
        wanted = re.escape(message).replace(re.escape("..."), ".*")
        assert code == 2 and re.search(wanted, " ".join(said.replace("│", " ").split())), (command, said)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_lead_somewhere():
    """Those to `../../actions` lead to the pages of a repository on GitHub."""
    for page in [*PAGES, "training/README.md", "examples/README.md", "model_cards/README.md"]:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?://|\.\./\.\./actions/)([^)#]*)(?:#[^)]*)?\)", text):
            assert not target or (ROOT / page).parent.joinpath(target).exists(), (page, target)


@pytest.mark.parametrize(
    "line", [line for _, text in blocks("training/README.md") for line in text.splitlines() if line]
)
def test_what_training_says_to_type_is_there(line):
    """ImageNet is not: its recipes' smoke runs are in tests/training."""
    program, *words = shlex.split(line)
    if program == "concat-ensemble":
        shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0 and all(word in shown.stdout for word in words if word.startswith("--"))
    else:
        assert program in ("accelerate", "sbatch", "python", ".venv/bin/python"), line
        assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml", ".sh")))


def test_the_list_of_files_is_current():
    written = runpy.run_path(str(ROOT / "docs/list_files.py"))
    assert (ROOT / "CONTRIBUTING.md").read_text() == written["contributing_page"]()
