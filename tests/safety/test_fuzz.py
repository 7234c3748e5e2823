"""Garbage and near-misses as configs, recipes and results raise ValueError or OSError, or nothing."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.data.dataset_recipes import DatasetRecipe
from concat_ensemble.reporting.tables import row_texts
from concat_ensemble.reporting.verdicts import verdict
from concat_ensemble.studies.results import Results
from concat_ensemble.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
FEW, MANY = 150, 25_000  # of each of the four readers: 600, and 100,000
SIGNS = st.sampled_from(
    [
        float("nan"),
        float("inf"),
        -1,
        0,
        1,
        2**31,
        10**400,
        1e308,
        "",
        "../x",
        "https://x",
        "\x00",
        "os.system",
        [],
        {},
        [[]],
        True,
        None,
    ]
)
ANYTHING = st.recursive(
    SIGNS | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value, path=()):
    """Where in a JSON value something stands."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


@st.composite
def near(draw, good):
    """A good value with up to three things in it replaced, removed, added, or moved under another key."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(value) if place] or [(None,)]))
        parent = value
        for key in way:
            parent = parent[key]
        if last is None:
            break
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = copy.deepcopy(draw(ANYTHING))
        else:
            parent[last] = copy.deepcopy(draw(ANYTHING))
    return value


KEYS = sorted(
    set(dir(ConcatEnsembleConfig)) | {"num_labels", "torch_dtype", "attn_implementation", "quantization_config"}
)
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
DATASET_RECIPES = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / "concat_ensemble/data/recipes").glob("*.yaml"))[:5]
]
TRAINING_RECIPES = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / "training/recipes").glob("*timecat.yaml"))
]


def as_json(value):
    return json.dumps(value, default=str)


def as_yaml(value):
    return yaml.safe_dump(value, default_flow_style=None)


def texts(good, write):
    """Mostly near misses; anything at all; and a good file with its bytes cut, doubled and changed."""
    written = st.builds(write, st.one_of(*[near(one) for one in good]) | ANYTHING)
    cut = st.builds(
        lambda text, at, put: text[:at] + put + text[at + len(put) :],
        st.sampled_from([write(one) for one in good]),
        st.integers(0, 400),
        st.text(st.characters(codec="utf-8"), max_size=4),
    )
    return written | cut


def read_config(path):
    ConcatEnsembleConfig.from_pretrained(path)


def read_results(path):
    results = Results.load(path)
    for row in results.rows:  # what could be read can be shown
        row_texts(results, row)
    verdict(results)
    assert len(results.protocol) == 8


READERS = {
    "config": (read_config, texts([CONFIG], as_json)),
    "results": (read_results, texts([RESULTS], as_json)),
    "dataset recipe": (DatasetRecipe.read, texts(DATASET_RECIPES, as_yaml)),
    "training recipe": (Recipe.from_file, texts(TRAINING_RECIPES, as_yaml)),
}
COUNTED = {}


def fuzz(reader, folder, examples):
    read, inputs = READERS[reader]
    path = folder / "x.json"
    COUNTED[reader] = refused = 0

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    @given(text=inputs)
    def only_documented_errors(text):
        nonlocal refused
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        COUNTED[reader] += 1
        try:
            read(path)
        except (ValueError, OSError):
            refused += 1

    only_documented_errors()
    assert 0 < refused < COUNTED[reader], "a fuzz that never refuses, or always, tries nothing"


@pytest.mark.parametrize("reader", READERS)
def test_only_documented_errors(reader, tmp_path):
    fuzz(reader, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_only_documented_errors_in_a_hundred_thousand(reader, tmp_path):
    fuzz(reader, tmp_path, MANY)
    assert COUNTED[reader] >= MANY
