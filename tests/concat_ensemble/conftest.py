"""Tiny networks with random weights, and tiny datasets whose every pixel is known."""

# ruff: noqa: E402 (the environment comes before the imports that read it)

import atexit
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib

# Before anything of Hugging Face is imported: no network, and no traces in the user's own cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="concat-ensemble-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import datasets
import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from threadpoolctl import threadpool_limits
from torch import nn

from concat_ensemble import (
    ConcatEnsembleConfig,
    ConcatEnsembleForImageClassification,
    assemble,
    extract_features,
    load_data,
)
from concat_ensemble.commands.app import main
from concat_ensemble.studies.results import Results, Row, Run, pack_bits

CONTROLS = ("untrained members", "raw pixels", "majority class")
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds after each pass over a stream; 5 by default
torch.set_num_threads(1)
threadpool_limits(1)  # threads that wait for each other make tiny problems ten times slower on a busy machine


@pytest.fixture(scope="session")
def backbone():
    """`backbone(seed)`: a grey resnet10t, as timm makes it, of 16 features that sees 32x32 pixels; with other
    `model_args` if wanted.
    """

    def make(seed: int = 0, architecture: str = "resnet10t", pixels: dict | None = None, **model_args):
        grey = {"in_chans": 1, "channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 0}
        sees = {"input_size": (1, 32, 32), "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model(architecture, pretrained_cfg_overlay=sees | (pixels or {}), **grey | model_args)
            for tensor in model.state_dict().values():
                if tensor.ndim == 1:  # fresh norms are all alike, which would hide a lost tensor
                    tensor += 0.2 * torch.rand_like(tensor)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def ensemble(backbone):
    """Two members of 16 features each."""
    return assemble([backbone(0), backbone(1)])


@pytest.fixture
def folder(ensemble, tmp_path):
    """The same, saved."""
    ensemble.save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture(scope="session")
def make_classifier(ensemble):
    """`make_classifier(names)`: the pair with a random head."""

    def make(names, **settings):
        settings = {"members": ensemble.config.members, "standardize": True, **settings}
        config = ConcatEnsembleConfig(**settings, id2label=dict(enumerate(names)))
        model = ConcatEnsembleForImageClassification(config).eval()
        model.members.load_state_dict(ensemble.members.state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(model.classifier.weight)
        return model

    return make


@pytest.fixture(scope="session")
def saved(make_classifier, tmp_path_factory):
    """A folder of the pair with a head of three classes."""
    folder = tmp_path_factory.mktemp("saved") / "headed"
    make_classifier(["cat", "dog", "emu"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images():
    """`images(labels)`: one noisy 8x8 grey image per label, brighter the later the label comes in the alphabet."""

    def make(labels, image="image", label="label", seed=0):
        rng = np.random.default_rng(seed)
        levels = {name: 30 + 60 * n for n, name in enumerate(sorted(set(labels)))}
        pixels = [rng.integers(-20, 20, (8, 8)) + levels[name] for name in labels]
        columns = {image: [PILImage.fromarray(p.astype(np.uint8)) for p in pixels], label: list(labels)}
        return Dataset.from_dict(columns).cast_column(image, Image())

    return make


def _encoded(image, file_format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _bomb() -> bytes:
    """A PNG of a few hundred bytes whose header claims 60,000 x 60,000 pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in {"IHDR": struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0), "IDAT": bytes(100)}.items():
        chunk = name.encode() + data
        content += struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


@pytest.fixture(scope="session")
def bad_images():
    """Images that cannot be used, by what is wrong with them, as `datasets` stores them."""
    noise = PILImage.effect_noise((32, 32), 50)
    nan = PILImage.fromarray(np.full((8, 8), np.nan, np.float32))
    contents = {
        "cut.jpg": _encoded(noise, "JPEG")[:500],
        "text.png": b"only text",
        "empty.png": b"",
        "bomb.png": _bomb(),
        "dot.png": _encoded(PILImage.new("L", (1, 1)), "PNG"),
        "nan.tif": _encoded(nan, "TIFF"),
    }
    encoded = {name: {"bytes": content, "path": name} for name, content in contents.items()}
    return encoded | {"null": None, "missing": {"bytes": None, "path": "/nonesuch/missing.png"}}


@pytest.fixture(scope="session")
def damaged(images, bad_images):
    """`damaged(train=[...], test=[...])`: 32 training, 8 validation and 10 test images of two classes, with groups; in
    each split, the bad images with these names take the places from row 3 on.
    """

    def make(**names) -> DatasetDict:
        data = load_data(DatasetDict(train=images(["a", "b"] * 20), test=images(["a", "b"] * 5, seed=1)))
        for split, rows in data.items():
            encoded, labels = list(rows["image"]), rows["label"][:]
            for row, name in enumerate(names.get(split, []), start=3):
                encoded[row] = bad_images[name]
            columns = {"image": encoded, "label": labels, "group": [f"{split} {row}" for row in range(len(rows))]}
            data[split] = Dataset.from_dict(columns, features=Features(rows.features | {"group": Value("string")}))
        return data

    return make


@pytest.fixture(scope="session")
def digits():
    return load_data("digits", classes=[0, 1, 2], limit=30)


@pytest.fixture(scope="session")
def table(ensemble, digits):
    return extract_features(ensemble, digits, quiet=True)


@pytest.fixture
def study():
    """`study(name=[top-1 of each repeat], ...)`: results by hand on 100 test images; the first is the ensemble, of two
    members.
    """

    def make(dataset: dict | None = None, hashes=("a" * 64, "b" * 64), **top1) -> Results:
        rows = []
        for n, (name, shares) in enumerate(top1.items()):
            kind = "ensemble" if n == 0 else "control" if name in CONTROLS else "baseline"
            runs = []
            for seed, share in enumerate(shares):
                right = np.random.default_rng(n).permutation(100) < round(100 * share)
                runs.append(Run(seed, {"top1": share, "macro_f1": share / 2}, 0.1, 50, 100, correct=pack_bits(right)))
            rows.append(Row(name, kind, num_features=32, num_members=2 if n == 0 else 1, steps=20, runs=runs))
        dataset = {"name": "digits", "classes": [5, 6], "test_images": 100, "seed": 0} | (dataset or {})
        return Results(
            "pair",
            dataset,
            {"kind": "linear", "l2_strengths": [1.0, 0.1]},
            rows,
            list(hashes),
            "concat-ensemble probe pair",
        )

    return make


@pytest.fixture(scope="session")
def splits(images):
    """Both splits named; the classes a and b in each."""
    return DatasetDict(train=images(["b", "a"] * 20), test=images(["b", "a"] * 10, seed=1))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run(*words)`: exit code, stdout and stderr of the command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def contents():
    """`contents(folder)`: every file below and its bytes; a folder without any has None."""

    def contents(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))
        }

    return contents


@pytest.fixture
def refused(run, contents, tmp_path):
    """Run a command that must exit with 2, print one line with all of `said`, after those on its stages, and leave
    every file as it was.
    """

    def refused(words, *said):
        before = contents(tmp_path)
        code, out, err = run(*words)
        assert code == 2, err
        *stages, last = err.strip().splitlines()
        assert last.startswith("error: ") and all(re.match(r"[a-z ]+: [\d,]+ ", line) for line in stages), err
        assert not [text for text in said if text not in err], err
        assert out == "" and "Traceback" not in err
        assert contents(tmp_path) == before, "something was written"

    return refused
