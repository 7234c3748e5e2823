"""Loading a folder as from the Hub: without this package, with it, and in both pipelines."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from concat_ensemble import ConcatEnsembleForImageClassification

# One geometry in color, one in gray, and several with both.
ENSEMBLES = {
    "rgb": ("resnet18", "resnet50"),
    "grey": ("grey", "grey"),
    "mixed": ("resnet18", "coat", "grey", "swin", "eva02"),
}
LABELS = {0: "temple", 1: "flower", 2: "neither"}

# The code of a user without the package. `expected` was computed with the package.
VISITOR = """
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("concat_ensemble", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import PIL.Image
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers import AutoProcessor

torch.set_num_threads(1)
torch.set_grad_enabled(False)
remote = {"trust_remote_code": True}

def check(folder, expected, images):
    assert AutoConfig.from_pretrained(folder, **remote).model_type == "concat_ensemble"
    pixels = AutoImageProcessor.from_pretrained(folder, **remote)(images)["pixel_values"]
    assert torch.equal(pixels, expected["pixels"]), "pixels"
    bare = AutoModel.from_pretrained(folder, **remote)
    assert type(bare).__module__.startswith("transformers_modules."), type(bare)
    assert torch.equal(bare(pixels).pooler_output, expected["pooled"]), "pooler_output"
    part = AutoModel.from_pretrained(folder, active_members=[1], **remote)
    width = bare.config.members[1]["num_features"]
    start = bare.config.members[0]["num_features"]
    assert torch.equal(part(pixels).pooler_output, expected["pooled"][:, start:start + width]), "active_members"
    features = pipeline("image-feature-extraction", model=folder, pool=True, **remote)(images[0])
    torch.testing.assert_close(torch.tensor(features), expected["pooled"][:1], atol=1e-5, rtol=0)
    if "logits" not in expected:
        new = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, **remote)
        assert new(pixels).logits.isfinite().all() and new.classifier.weight.std() < 0.1, "a new head"
        return bare
    headed = AutoModelForImageClassification.from_pretrained(folder, **remote)
    output = headed(pixels)
    assert torch.equal(output.logits, expected["logits"]), "logits"
    assert torch.equal(output.pooler_output, expected["pooled"]), "pooler_output with a head"
    best = pipeline("image-classification", model=folder, **remote)(images[0])[0]
    assert best["label"] == headed.config.id2label[expected["logits"][0].argmax().item()]
    return headed

root = Path(sys.argv[1])
images = [PIL.Image.open(path) for path in sorted(root.glob("*.png"))]
for folder in sorted(path.parent for path in root.glob("*/config.json")):
    expected = load_file(root / f"{folder.name}.expected")
    model = check(str(folder), expected, images)
    again = root / "again" / folder.name
    model.save_pretrained(again)  # a copy that such a user saves loads as well
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}, sorted(again.iterdir())
    check(str(again), expected, images)
    print("checked", folder.name)
    for load in (AutoImageProcessor.from_pretrained, AutoProcessor.from_pretrained):
        alone = load(root / "alone" / folder.name, **remote)
        assert type(alone).__module__.startswith("transformers_modules."), type(alone)
        assert torch.equal(alone(images)["pixel_values"], expected["pixels"]), "a processor alone"
        alone.save_pretrained(root / "alone" / "again")
        alone = load(root / "alone" / "again", **remote)
        assert torch.equal(alone(images)["pixel_values"], expected["pixels"]), "its copy"
assert not any(name.split(".")[0] == "concat_ensemble" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def root(photos, tmp_path_factory):
    """A folder with two photographs, to which `made` adds six ensembles."""
    root = tmp_path_factory.mktemp("visitor")
    for n, photo in enumerate(photos[:2]):
        photo.save(root / f"{n}.png")
    return root


@torch.no_grad()
def make(build, root, name, photos, head):
    labels = {"cls": ConcatEnsembleForImageClassification, "id2label": LABELS, "standardize": True} if head else {}
    folder = root / (f"{name}-head" if head else name)
    build(*ENSEMBLES[name], **labels)[0].save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    processor.save_pretrained(root / "alone" / folder.name)
    pixels = processor(photos)["pixel_values"]
    expected = {"pixels": pixels, "pooled": AutoModel.from_pretrained(folder)(pixels).pooler_output}
    if head:
        expected["logits"] = AutoModelForImageClassification.from_pretrained(folder)(pixels).logits
    save_file(expected, root / f"{folder.name}.expected")
    return folder, expected


@pytest.fixture(scope="module")
def made(build, photos, root):
    """Each ensemble with and without a head: its folder, and its outputs for the two photographs."""
    return {(name, head): make(build, root, name, photos[:2], head) for name in ENSEMBLES for head in (False, True)}


def test_a_process_without_the_package_loads_and_saves_the_same(made, root, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "visitor.py").write_text(VISITOR)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "visitor.py"), str(root)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[:-1] == [f"checked {name}" for name in sorted(f.name for f, _ in made.values())]


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_with_the_package_trust_remote_code_is_not_needed(made, photos, name, head):
    # Without `trust_remote_code`, remote code would need an answer on the terminal, which fails here.
    folder, expected = made[name, head]
    pixels = AutoImageProcessor.from_pretrained(folder)(photos[:2])["pixel_values"]
    assert torch.equal(pixels, expected["pixels"])
    assert type(AutoConfig.from_pretrained(folder)).__module__.startswith("concat_ensemble.")
    if head:
        logits = AutoModelForImageClassification.from_pretrained(folder)(pixels).logits
        assert torch.equal(logits, expected["logits"])
    for flag in ({}, {"trust_remote_code": True}):
        model = AutoModel.from_pretrained(folder, **flag)
        assert type(model).__module__.startswith("concat_ensemble.")  # the installed class is preferred
        assert torch.equal(model(pixels).pooler_output, expected["pooled"])


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_feature_extraction_pipeline_takes_images_paths_lists_and_batches(made, root, photos, name, head):
    folder, expected = made[name, head]
    extract = pipeline("image-feature-extraction", model=str(folder))
    files = [str(root / "0.png"), str(root / "1.png")]
    for actual, rows in (
        (extract(photos[0]), [0]),
        (extract(files[1], pool=True), [1]),
        (extract(photos[:2]), [0, 1]),
        (extract(files, batch_size=2), [0, 1]),
        (extract([photos[1], photos[0], photos[1]], batch_size=2, pool=True), [1, 0, 1]),
    ):
        actual = torch.tensor(actual).reshape(len(rows), -1)
        torch.testing.assert_close(actual, expected["pooled"][rows], atol=1e-5, rtol=0)
    assert torch.equal(extract(photos[0], return_tensors=True), extract(files[0], return_tensors=True))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_classification_pipeline_takes_images_paths_lists_and_batches(made, root, photos, name):
    folder, expected = made[name, True]
    classify = pipeline("image-classification", model=str(folder))
    files = [str(root / "0.png"), str(root / "1.png")]
    probabilities = expected["logits"].softmax(1)
    for actual, rows in (
        ([classify(photos[0], top_k=3)], [0]),
        ([classify(files[1], top_k=3)], [1]),
        (classify(files, top_k=3), [0, 1]),
        (classify([photos[1], photos[0], photos[1]], top_k=3, batch_size=2), [1, 0, 1]),
    ):
        for scores, row in zip(actual, rows, strict=True):
            by_label = {score["label"]: score["score"] for score in scores}
            assert by_label == pytest.approx({LABELS[n]: p.item() for n, p in enumerate(probabilities[row])}, abs=1e-5)
