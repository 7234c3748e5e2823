"""Every key of every file that a command reads, with values of another type or beyond all numbers: each is taken, and
then shown, or refused in one line that says where it stands.
"""

import copy
import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import save_file

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleForImageClassification, assemble
from concat_ensemble.data.dataset_recipes import DatasetRecipe
from concat_ensemble.experiments.desk import measure_once
from concat_ensemble.experiments.reproduce import format_section, load_finding
from concat_ensemble.inference.prediction import class_names
from concat_ensemble.reporting.card_metadata import benchmark_entries, card_metadata
from concat_ensemble.reporting.card_sections import split_metadata
from concat_ensemble.reporting.data_sentences import describe_data
from concat_ensemble.reporting.html_report import write_report
from concat_ensemble.reporting.model_card import check_card, write_card
from concat_ensemble.reporting.tables import headings, row_texts
from concat_ensemble.reporting.verdicts import against, describe_compute, notes, verdict
from concat_ensemble.studies.overlap_results import Overlap
from concat_ensemble.studies.provenance import members_sha256, training_cost
from concat_ensemble.studies.results import Results, pack_bits, pack_numbers
from concat_ensemble.studies.selection_results import Selection
from concat_ensemble.training.recipe import Recipe
from concat_ensemble.training.saving import read_state
from tests.clients import COMMAND, Client
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "tests/concat_ensemble/studies"
STEP = 11  # one variant of eleven, which gives each key another value or two; all of them in the slow tests
WRONG = [None, "x", "\x1b[31m", 5, -1, 1.5, 1e308, 10**400, float("nan"), True, [], [1], {}, {"a": 1}]
DEEP = "[" * 5_000 + "]" * 5_000


def places(value, path=()):
    """Where in a value of JSON something stands."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    if isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def variants(good):
    """A good value with each part of it replaced by each wrong value, and without it; and wrong values alone."""
    for *way, last in places(good):
        for wrong in [*WRONG, ...]:
            value = copy.deepcopy(good)
            parent = value
            for key in way:
                parent = parent[key]
            if wrong is ...:
                del parent[last]
            else:
                parent[last] = wrong
            yield value
    yield from WRONG


@pytest.fixture(params=[STEP, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def try_variants(request):
    """`try_variants(good, path, read)`: each variant of a good file is taken, or refused in one line. Both happen."""
    return partial(_try_variants, step=request.param)


def _try_variants(good, path, read, write=json.dumps, *, named=True, step):
    path.write_text(write(good))
    read(path)
    taken = refused = 0
    for value in itertools.islice(variants(good), 0, None, step):
        path.write_text(write(value))
        try:
            read(path)
            taken += 1
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
            assert len(message) < 1_000 and len(message.splitlines()) == 1, message
            assert not named or (path.name in message and "\x1b" not in message), message
    assert refused and (taken or step > 1), "a test that never refuses, or always, tries nothing"


# --- results, selections and comparisons ----------------------------------------------------------------------------

RUN = {
    "seed": 0,
    "metrics": {"top1": 0.5, "top5": 0.9, "mean_per_class": 0.5},
    "l2_strength": 0.1,
    "n_train": 9,
    "n_test": 9,
    "intervals": {"top1": [0.4, 0.6]},
    "resamples": [0.4, 0.5],
    "correct": pack_bits([True] * 5 + [False] * 4),
    "resampled": pack_numbers([0.4, 0.5, 0.6], "<f4"),
    "confusion": pack_numbers([[5, 0], [4, 0]], "<u4"),
    "at_edge": True,
    "converged": False,
}
COST = {"gflops": 1.0, "million_parameters": 2.0, "seconds": 0.1}
ROW = {"name": "pair", "kind": "ensemble", "num_features": 32, "num_members": 2, "steps": 5, "gflops": 1.0}
AUDIT = {
    "num_images": {"train": 9, "test": 9},
    "classes": {"a": {"train": 8, "test": 5}, "b": {"train": 1, "test": 4}},
    "majority_class": "a",
    "majority_share": 0.9,
    "imbalanced": True,
    "duplicates_within": {"train": 2},
    "duplicates_across": {"train/test": 1},
    "conflicting_labels": 1,
    "few_images": ["b"],
    "missing_classes": {"test": ["b"]},
    "removed_from_test": 1,
    "removed_from_validation": 0,
    "groups": {"train": 3, "test": 3},
    "groups_across": {"train/test": 1},
    "unreadable": {"test": 1},
}
DATASET = {
    "name": "me/digits",
    "config": "plain",
    "revision": "main",
    "image_column": "image",
    "label_column": "label",
    "group_column": "patient",
    "train_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "test_size": 0.5,
    "classes": [1, "cat"],
    "limit": 9,
    "shots": 4,
    "seed": 0,
    "use_folders": True,
    "recipe": "cifar100",
    "metric": "top1",
    "benchmark": "digits",
    "test_images": 9,
    "on_hub": True,
}
PROBE = {
    "kind": "linear",
    "metric": "top1",
    "l2_strengths": [1.0, 0.1],
    "selection": "top1 on validation rows",
    "num_resamples": 5,
    "class_weight": "balanced",
}
RESULTS = {
    "schema_version": 2,
    "protocol": "x",
    "ensemble": "pair",
    "dataset": DATASET,
    "probe": PROBE,
    "rows": [
        ROW | {"runs": [RUN], "cost": COST},
        ROW | {"name": "pair, member 0 alone", "kind": "member", "runs": [RUN | {"confusion": ""}], "cost": COST},
        ROW | {"name": "long", "kind": "baseline", "runs": [RUN | {"confusion": ""}], "cost": None},
        ROW | {"name": "raw pixels", "kind": "control", "runs": [RUN | {"confusion": ""}], "cost": None},
    ],
    "members_sha256": ["a"],
    "command": "concat-ensemble probe pair",
    "versions": {"torch": "2"},
    "seconds": {"total": 1.0},
    "hardware": "one CPU core",
    "controls": "all",
    "audit": AUDIT,
    "class_names": ["a", "b"],
}


def show_results(path):
    study = Results.load(path)
    headings(study.metric, "pair", [row_texts(study, row) for row in study.rows])
    texts = [verdict(study), against(study), describe_compute(study), *notes(study), *describe_data(study)]
    assert len(study.protocol) == 8 and all(isinstance(text, str) for text in texts)
    benchmark_entries(study)


def show_selection(path):
    selection = Selection.load(path)
    assert selection.verdict and selection.outlook and len(selection.protocol) == 8


def test_results(try_variants, tmp_path):
    try_variants(RESULTS, tmp_path / "digits.json", show_results)


def test_results_of_version_1(try_variants, tmp_path):
    old = json.loads((ROOT / "tests/golden/results-one-run.json").read_text())
    try_variants(old, tmp_path / "digits.json", show_results)


@pytest.mark.parametrize(
    ("name", "show"), [("selection", show_selection), ("overlap", lambda path: Overlap.load(path).verdict)]
)
def test_selections_and_comparisons(name, show, try_variants, tmp_path):
    old = json.loads((STUDIES / f"{name}-version-1.json").read_text())
    try_variants(old, tmp_path / "digits.json", show)


CHANGES = {
    "runs of different lengths": lambda results: results["rows"][1]["runs"].append(RUN),
    "test images of another number": lambda results: results["rows"][1].update(runs=[RUN | {"n_test": 10}]),
    "an interval that runs backwards": lambda results: results["rows"][0]["runs"][0]["intervals"].update(top1=[1, 0]),
    "too many rows": lambda results: results.update(rows=results["rows"] * 1_000),
    "too many runs": lambda results: [row.update(runs=[RUN] * 2_000) for row in results["rows"]],
    "too many class names": lambda results: results.update(class_names=["a"] * 10_000),
    "a split that there is not": lambda results: results["audit"].update(unreadable={"rest": 3}),
    "groups without those of the test split": lambda results: results["audit"].update(groups={"train": 3}),
    "a nested name": lambda results: results["dataset"].update(anything=json.loads(DEEP[4_950:5_050])),
    "a name without end": lambda results: results.update(ensemble="x" * 1_000_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_whose_values_do_not_go_together(change, tmp_path):
    results = copy.deepcopy(RESULTS)
    CHANGES[change](results)
    (tmp_path / "digits.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"digits\.json is not a results file") as error:
        Results.load(tmp_path / "digits.json")
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("text", [DEEP, '{"rows": [', '{"a": 1}}', "", "\x00", '"\\ud800"', "{'a': 1}", "NaN"])
def test_results_that_are_no_json(text, tmp_path):
    (tmp_path / "digits.json").write_text(text)
    for kind in (Results, Selection, Overlap):
        with pytest.raises(ValueError, match=r"digits\.json is not a"):
            kind.load(tmp_path / "digits.json")


def test_the_message_names_key_value_and_type(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["rows"][0]["runs"][0]["seed"] = "1; rm"
    (tmp_path / "digits.json").write_text(json.dumps(results))
    said = (
        r"digits\.json is not a results file \(rows\[0\]\.runs\[0\]\.seed='1; rm' must be int, got str\); probe again"
    )
    with pytest.raises(ValueError, match=said):
        Results.load(tmp_path / "digits.json")
    (tmp_path / "digits.json").write_text(json.dumps(RESULTS | {"dataset": {"limit": "x"}}))
    with pytest.raises(ValueError, match=r"dataset\.limit='x' must be int \| null, got str"):
        Results.load(tmp_path / "digits.json")


def test_what_is_taken_can_be_drawn(folder):
    """The largest and the smallest numbers that the schema takes, on a card and on a page, with their figures."""
    results = copy.deepcopy(RESULTS) | {"members_sha256": members_sha256(ConcatEnsembleConfig.from_pretrained(folder))}
    for row, amount in zip(results["rows"], (1e30, 5e-324, 0.0, 10**18), strict=True):
        row |= {"gflops": amount, "num_features": 10**18, "steps": 10**18}
        row["cost"] = dict.fromkeys(COST, amount)
    (folder / "results/digits.json").write_text(json.dumps(results))
    write_card(folder)
    check_card(folder)
    write_report([folder], folder.parent / "report.html")


# --- cards ----------------------------------------------------------------------------------------------------------

FRONT_MATTER = {
    "language": "en",
    "tags": ["cats"],
    "license": "mit",
    "model_name": "pair",
    "model-index": [{"name": "pair", "results": [{"task": {"type": "image-classification"}}]}],
    "datasets": ["me/digits"],
    "base_model": "me/base",
    "widget": [{"text": "x"}],
    "date": "2020-01-01",
}


@pytest.fixture(scope="module")
def made_with_card(made, tmp_path_factory):
    folder = shutil.copytree(made, tmp_path_factory.mktemp("card") / "pair")
    write_card(folder)
    return folder


@pytest.fixture
def drawn(made_with_card, world):
    """An ensemble's folder with a card and its figures."""
    return shutil.copytree(made_with_card, world / "pair")


def check_again(folder):
    """Render the card; that it differs from the one on disk is no mistake here."""
    try:
        check_card(folder)
    except ValueError as error:
        if "where config and results give" not in str(error):
            raise


def test_front_matter(try_variants, made, tmp_path):
    """What is taken is what the Hub's client can load from the next card."""
    config = ConcatEnsembleConfig.from_pretrained(made)

    def read(path):
        metadata, _ = split_metadata(path.read_text(), path)
        ModelCard(f"---\n{card_metadata('pair', config, {}, metadata).to_yaml()}\n---\n")

    try_variants(FRONT_MATTER, tmp_path / "README.md", read, lambda value: f"---\n{yaml.safe_dump(value)}---\ntext\n")


KEPT = {"a date": "released: 2020-01-01\n", "numbers below": "widget:\n- {1: 2}\n", "a set": "about: !!set {a, b}\n"}
REFUSED = {
    "self": "self: 1\n",
    "eval_results": "eval_results: 5\n",
    "an argument": "ignore_metadata_errors: yes\n",
    "a method": "to_dict: x\n",
    "a private one": "__class__: x\n",
    "a number as a key": "5: x\n",
    "a date as a key": "2020-01-01: x\n",
    "nothing as a key": "~: x\n",
    "a list as a key": "? [a]\n: x\n",
    "nesting": f"a: {DEEP}\n",
    "an alias": "a: &a [x]\nb: *a\n",
    "a tag": "a: !!python/object/apply:os.system [x]\n",
    "a list": "- a\n",
    "a text": "abc\n",
    "tags that are a text": "tags: cats\n",
    "tags that are numbers": "tags: [1]\n",
    "a name that is a list": "model_name: [x]\n",
    "a language that is a date": "language: 2020-01-01\n",
    "a number without end": f"a: {'9' * 6_000}\n",
    "length": f"a: {'x' * 600_000}\n",
    "a bad date": "a: 2020-99-99\n",
    "broken": "a: [\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_front_matter_that_is_refused(name, drawn, refused):
    text = (drawn / "README.md").read_text().split("---\n", 2)[2]
    (drawn / "README.md").write_text(f"---\n{REFUSED[name]}---\n{text}")
    refused("card", drawn, said="README.md: its metadata are not those of a model card")


@pytest.mark.parametrize("name", KEPT)
def test_front_matter_that_is_kept(name, drawn):
    text = (drawn / "README.md").read_text().split("---\n", 2)[2]
    (drawn / "README.md").write_text(f"---\n{KEPT[name]}---\n{text}")
    write_card(drawn, redraw=False)
    check_card(drawn)
    assert KEPT[name].split(":")[0] in ModelCard.load(drawn / "README.md").data.to_dict()


# --- provenance and configs -----------------------------------------------------------------------------------------

PROVENANCE = {
    "source": "hf-hub:me/member",
    "hub_id": "me/member",
    "revision": "main",
    "license": "mit",
    "pretraining_data": "digits",
    "objective": "classification",
    "steps": 400,
    "seed": 1,
    "compute": {"gflops": 1.5, "images": 100},
    "command": "concat-ensemble build",
    "ensemble_recipe": "swav-cat2",
    "recipe": {"dataset": "me/digits"},
    "weights": "EMA",
    "weights_sha256": "abc",
    "label_names": ["a"],
}


def test_provenance(try_variants, drawn):
    (drawn / "results/digits.json").unlink()
    whole = json.loads((drawn / "config.json").read_text())

    def write(provenance):
        members = [member | {"provenance": provenance} for member in whole["members"]]
        return json.dumps(whole | {"members": members})

    def read(path):
        config = ConcatEnsembleConfig.from_pretrained(path.parent)
        assert len(members_sha256(config)) == 2
        training_cost(SimpleNamespace(config=config))
        check_again(path.parent)

    try_variants(PROVENANCE, drawn / "config.json", read, write, named=False)


@pytest.mark.parametrize("change", [{"steps": "many"}, {"compute": "x"}, {"compute": {"gflops": "1"}}, {"seed": [1]}])
@pytest.mark.parametrize("words", [["card", "pair"], ["card", "pair", "--check"], ["verify", "pair"]])
def test_provenance_of_another_type(change, words, folder, refused):
    config = json.loads((folder / "config.json").read_text())
    config["members"][0]["provenance"] |= change
    [key] = change
    (folder / "config.json").write_text(json.dumps(config))
    refused(*words, said=f"members[0].provenance.{key}")


DTYPES = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2", "int8", "bool", "complex64", "qint8", "auto", "Tensor"]


@pytest.mark.parametrize("dtype", [*DTYPES, "torch.float32", "", 5, True, 1.5, [], ["float32"], {}, {"": "float32"}])
def test_a_dtype_in_which_no_network_computes(dtype, folder, refused):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"dtype": dtype}, {"torch_dtype": dtype}, {"dtype": "float32", "torch_dtype": dtype}):
        kept = {key: value for key, value in config.items() if key != "dtype"}
        (folder / "config.json").write_text(json.dumps(kept | change))
        refused("card", "pair", said="dtype")


def test_config(try_variants, folder):
    whole = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "a"}, "label2id": {"a": 0}}
    whole["torch_dtype"] = "float16"
    try_variants(whole, folder / "config.json", lambda path: ConcatEnsembleConfig.from_pretrained(folder), named=False)


NETWORK = {
    "architecture": "resnet10t",
    "num_classes": 0,
    "model_args": {"in_chans": 1, "channels": [8, 8, 16, 16], "stem_width": 8},
    "pretrained_cfg": {
        "input_size": [1, 32, 32],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5],
        "std": [0.5],
        "first_conv": "conv1.0",
        "license": "mit",
    },
    "provenance": {"steps": 5, "compute": {"gflops": 1.0}},
    "label_names": ["a"],
    "model_type": "timm",
}


def test_the_config_of_a_network(try_variants, backbone, world):
    folder = world / "member"
    folder.mkdir()
    save_file(backbone.state_dict(), folder / "model.safetensors")
    try_variants(NETWORK, folder / "config.json", lambda path: training_cost(assemble(folder)), named=False)


@pytest.fixture
def hub_repo(world, backbone, request):
    """A timm repo in the Hub's cache, as if it had been downloaded."""
    name = f"evil/{abs(hash(request.node.nodeid))}"
    commit = "c0ffee" + 34 * "0"
    repo = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    (folder / "config.json").write_text(json.dumps(NETWORK))
    save_file(backbone.state_dict(), folder / "model.safetensors")
    return name, folder


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HEADER = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)) * 10,
    "a page": b"<html><script>alert(1)</script></html>",
    "a header without end": (2**60).to_bytes(8, "little") + HEADER,
    "half a file": len(HEADER).to_bytes(8, "little") + HEADER + bytes(3),
    "other weights": len(HEADER).to_bytes(8, "little") + HEADER + bytes(8),
    "a pickle": b"\x80\x04\x95.",
    "a header of a list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_for_the_weights_of_a_timm_repo(name, file, hub_repo, refused):
    repo, folder = hub_repo
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(GARBAGE[name])
    refused("build", f"hf-hub:{repo}", "--output", "out", said=repo)


@pytest.mark.parametrize("key", [key for key in NETWORK if key != "architecture"])
def test_the_config_of_a_timm_repo(key, hub_repo, world):
    """Members that are built from it can be saved and shown."""
    repo, folder = hub_repo
    for wrong in ("x", [1], 10**400):
        (folder / "config.json").write_text(json.dumps(NETWORK | {key: wrong}))
        try:
            training_cost(assemble(f"hf-hub:{repo}"))
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1


# --- recipes and states of trainings and experiments ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "read"),
    [
        (ROOT / "training/recipes/scattered_digits_timecat.yaml", Recipe.from_file),
        (ROOT / "concat_ensemble/data/recipes/cifar100.yaml", DatasetRecipe.read),
    ],
)
def test_recipes(path, read, try_variants, tmp_path):
    try_variants(yaml.safe_load(path.read_text()), tmp_path / "mine.yaml", read, yaml.safe_dump, named=False)


FINDING = {
    "title": "T",
    "setting": "S",
    "paper": "P",
    "table": "| |",
    "conclusions": [{"claim": "c", "found": "f", "verdict": "holds"}],
    "asked": {"repeats": 4, "smoke": False},
    "minutes": 3,
}
OTHERS = {
    "training.json": (
        {"identity": {"a": 1}, "step": 3, "seconds": 1.5},
        lambda path: read_state(path.parent).step + read_state(path.parent).seconds,
    ),
    "seed-0.json": (
        {"asked": ["digits", 0], "top1": {"unseen": {"cat1": 0.5}}},
        lambda path: measure_once(path, {"asked": ["digits", 0]}, dict),
    ),
    "figure_1.json": (FINDING, lambda path: format_section("figure_1", load_finding(path), "x")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_states_and_measurements(name, try_variants, tmp_path):
    good, read = OTHERS[name]
    try_variants(good, tmp_path / name, read)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text", [DEEP, "[]", "5", "NaN", '"x"', "{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": [1]}}']
)
def test_a_push_of_json_of_another_kind(name, text, folder, refused):
    (folder / name).write_text(text)
    refused("push", "pair", "me/pair", said="ensemble")


@pytest.mark.slow
def test_garbage_from_the_hub_itself(backbone, tmp_path):
    """The same by the network, with files of timm's two formats and configs of wrong types."""
    with HubServer(tmp_path / "hub") as hub:
        client = Client(hub, tmp_path / "home", TOKEN, package=True)
        try:
            client("from huggingface_hub import HfApi")
            cases = [*((weights, json.dumps(NETWORK)) for weights in GARBAGE.values()), (b"x", "{}"), (b"x", DEEP)]
            for number, ((weights, config), name) in enumerate(itertools.product(cases, WEIGHTS)):
                folder = tmp_path / f"repo-{number}"
                folder.mkdir()
                (folder / "config.json").write_text(config)
                (folder / name).write_bytes(weights or b" ")
                client(f"HfApi().create_repo('me/{folder.name}')")
                client(f"HfApi().upload_folder(repo_id='me/{folder.name}', folder_path='{folder}')")
                words = ["build", f"hf-hub:me/{folder.name}", "--output", f"{tmp_path}/out"]
                _, err, failed = client.run(COMMAND.format(words=words))
                assert failed == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
        finally:
            client.process.kill()
            client.process.wait()


HEADS = {"gaps": {"0": "a", "5": "b"}, "numbers": {"0": 1, "1": 2}, "lists": {"0": [1], "1": {}}}


@pytest.mark.parametrize("names", HEADS)
def test_class_names_of_other_types(names, made):
    config = ConcatEnsembleConfig.from_pretrained(made, id2label=HEADS[names])
    assert all(isinstance(name, str) for name in class_names(ConcatEnsembleForImageClassification(config)))


@pytest.mark.parametrize("key", ["limit", "recipe", "seed", "classes", "test_size", "on_hub", "name"])
@pytest.mark.parametrize("words", [["card", "pair"], ["report", "pair"], ["verify", "pair"], ["card", ".", "--index"]])
def test_commands_that_read_results(words, key, drawn, refused):
    path = drawn / "results/digits.json"
    results = json.loads(path.read_text())
    results["dataset"][key] = {"a": 1}
    path.write_text(json.dumps(results))
    refused(*words, said=f"digits.json is not a results file (dataset.{key}=")


def test_a_probe_that_reads_old_results(drawn, refused):
    (drawn / "results/digits.json").write_text('{"rows": 5, "probe": {}, "rows": "x"}')
    refused("probe", "pair", "--dataset", "digits", "-q", said="digits.json is not a results file")


def test_a_pipe_in_place_of_results(drawn, refused):
    (drawn / "results/digits.json").unlink()
    os.mkfifo(drawn / "results/digits.json")
    with pytest.raises(OSError, match=r"digits\.json is not a regular file; remove it"):
        write_card(drawn)
