"""The script, launched as a user would, on a few steps; what only needs its functions calls them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleForImageClassification
from pretrain_members import main, networks_of
from recipe import Recipe

SCRIPT = "training/pretrain_members.py"
RECIPE = "training/recipes/scattered_digits_timecat.yaml"
SMOKE = [SCRIPT, RECIPE, "--smoke", "--cpu", "--members", "[1, 2]"]
MEMBERS = {"cat1-0": 18, "cat2-0": 8, "cat2-1": 8, "w2-0": 4}  # steps: 16 in all, an eighth more for CAT1, four for W2


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    script(sys.executable, *SMOKE, "--output", folder)
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def hashes(folder) -> dict[str, list[str]]:
    """The sha256 of every member's weights, by ensemble."""
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("cat1", "cat2", "w2")}
    return {name: [m["provenance"]["weights_sha256"] for m in config["members"]] for name, config in configs.items()}


def written(folder) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_members_lie_in_timms_layout_and_load_in_timm(trained):
    assert {path.name for path in (trained / "members").iterdir()} == set(MEMBERS)
    for name, steps in MEMBERS.items():
        folder = trained / "members" / name
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == "resnet10t" and config["label_names"] == ["0", "1", "2", "3", "4"]
        assert config["pretrained_cfg"]["input_size"] == [1, 32, 32] and config["pretrained_cfg"]["mean"] == [0.5]
        assert config["provenance"]["steps"] == steps and config["provenance"]["recipe"]["total_steps"] == 16
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        assert model.num_classes == 5 and model.bn1.num_batches_tracked == steps, "so many batches it has seen"


def test_ensembles_load_with_automodel_and_hold_these_members(trained):
    for name, count, width in (("cat1", 1, 64), ("cat2", 2, 128), ("w2", 1, 128)):
        model = AutoModel.from_pretrained(trained / name)
        assert len(model.members) == count and model.config.num_features == width
        for k, member in model.members.items():
            weights = load_file(trained / "members" / f"{name}-{k}" / "model.safetensors")
            assert all(torch.equal(tensor, weights[key]) for key, tensor in member.state_dict().items())
            assert model.config.members[int(k)]["preprocessing"]["input_size"] == [1, 32, 32]


def test_every_network_has_its_own_seed_and_weights(trained):
    found = hashes(trained)
    assert len({digest for group in found.values() for digest in group}) == 4
    provenances = [
        json.loads((trained / "members" / name / "config.json").read_text())["provenance"] for name in MEMBERS
    ]
    assert len({provenance["seed"] for provenance in provenances}) == 4
    assert {p["pretraining_data"] for p in provenances} == {"digits, classes 0, 1, 2, 3, 4 (scattered)"}
    assert all(p["command"].startswith("accelerate launch training/pretrain_members.py") for p in provenances)


def test_a_second_run_trains_what_is_missing_and_leaves_the_rest(script, copied):
    """One member was lost, another was cut off while it was being written; the ensemble cat1 has got a head meanwhile."""
    before = hashes(copied)
    shutil.rmtree(copied / "members" / "cat2-1")
    (copied / "members" / ".cat2-1.tmp").mkdir()
    (copied / "members" / ".cat2-1.tmp" / "model.safetensors").write_bytes(b"half")
    config = AutoModel.from_pretrained(copied / "cat1").config
    config.num_labels = 3
    ConcatEnsembleForImageClassification(config).save_pretrained(copied / "cat1")
    untouched = {
        name: content for name, content in written(copied).items() if not name.startswith(("members/.cat2-1", "cat2/"))
    }
    printed = script(sys.executable, *SMOKE, "--output", copied)
    assert printed.count("is finished, skipped") == 3 and "cat2-1 is finished" not in printed
    assert hashes(copied) == before, "the lost one has come back as it was"
    assert not (copied / "members" / ".cat2-1.tmp").exists()
    after = written(copied)
    assert [name for name, content in untouched.items() if after.get(name) != content] == []
    assert (
        type(AutoModelForImageClassification.from_pretrained(copied / "cat1")).__name__
        == "ConcatEnsembleForImageClassification"
    )


def test_another_recipe_trains_again(script, copied):
    before = hashes(copied)
    printed = script(sys.executable, *SMOKE, "--output", copied, "--learning-rate", "0.01")
    assert "skipped" not in printed
    after = hashes(copied)
    assert not {d for group in before.values() for d in group} & {d for group in after.values() for d in group}
    config = json.loads((copied / "members" / "cat1-0" / "config.json").read_text())
    assert config["provenance"]["recipe"]["learning_rate"] == 0.01


def test_accelerate_launch_gives_the_same_weights(script, trained, tmp_path):
    launch = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script(*launch, *SMOKE, "--output", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(trained)


def plan(**changes):
    given = yaml.safe_load(Path(__file__).parents[2].joinpath(RECIPE).read_text())
    return networks_of(Recipe(**given | changes))


def test_the_plan_spends_equal_steps():
    networks = plan()
    assert [(network.folder, network.steps) for network in networks] == [
        ("members/cat1-0", 1800),
        ("members/cat2-0", 800),
        ("members/cat2-1", 800),
        *[(f"members/cat4-{k}", 400) for k in range(4)],
        ("members/w2-0", 400),
    ]
    assert networks[-1].model_args == {"in_chans": 1, "channels": [16, 32, 64, 128], "stem_width": 16}
    assert {network.seed for network in networks} == set(range(8))


def test_seeds_of_two_runs_do_not_meet():
    assert not {n.seed for n in plan(seed=0)} & {n.seed for n in plan(seed=1)}
    assert [n.seed for n in plan(seed=1)] == [n.seed for n in plan(seed=1)]


def test_no_wide_network_where_none_is_asked_for():
    assert [network.name for network in plan(wide_steps=0, members=[2])] == ["cat2", "cat2"]


# Words after the recipe, and what the one line must say. In-process: importing takes seconds.
BAD = {
    "unknown field in the file": (["{typo}"], ["typo.yaml", "no field 'leraning_rate'; did you mean learning_rate?"]),
    "wrong type on the command line": (["--total-steps", "many"], ["total_steps='many' must be int"]),
    "broken YAML on the command line": (["--members", "[1, 2"], ["--members"]),
    "missing recipe": (["{none}"], ["none.yaml"]),
    "unknown architecture": (["--architecture", "resnet9000"], ["resnet9000"]),
    "unknown argument of the architecture": (["--model-args", "{in_chans: 1, colour: red}"], ["colour"]),
    "architecture for other channels": (["--model-args", "{channels: [8, 8, 8, 8]}"], ["channels"]),
    "unknown dataset": (["--dataset", "nonesuch"], ["no dataset 'nonesuch'"]),
    "unknown class": (["--classes", "[0, 11]"], ["classes=[11]"]),
    "one class": (["--classes", "[3]"], ["one class '3'"]),
    "output that is a file": (["--output", "{file}"], ["file", "name a folder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_run_ends_with_2_and_one_line(case, tmp_path, capsys):
    words, said = BAD[case]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "typo.yaml").write_text("leraning_rate: 1\n")
    places = {"{file}": tmp_path / "file", "{typo}": tmp_path / "typo.yaml", "{none}": tmp_path / "none.yaml"}
    words = [str(places.get(word, word)) for word in words]
    recipe = [] if words[0].endswith(".yaml") else [str(Path(__file__).parents[2] / RECIPE)]
    output = [] if "--output" in words else ["--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        main([*recipe, *words, "--cpu", "--smoke", *output])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert all(text in err.splitlines()[-1] for text in said), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "typo.yaml"], "something was written"
