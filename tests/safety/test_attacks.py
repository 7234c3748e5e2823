"""What a stranger can hand over, made for real and given to what a user would type. Around each, `world` sees that
nothing is executed, written outside, lost, or takes a gigabyte.
"""

import io
import json
import os
import pickle
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleModel, load_data
from concat_ensemble.data.dataset_recipes import DatasetRecipe
from concat_ensemble.data.images import read_image
from concat_ensemble.data.options import DatasetOptions
from concat_ensemble.modeling.configuration_concat_ensemble import PAYLOAD_FILES
from concat_ensemble.reporting.model_card import NOTE, write_card
from concat_ensemble.studies.results import Results
from concat_ensemble.training.recipe import Recipe

INDEX, SHARD = "model.safetensors.index.json", "member-00.safetensors"
SCRIPT = '<script src="//evil.example/x.js"></script>'
DEEP = "[" * 100_000


class Evil:
    """Whoever unpickles it makes the canary beside the world."""

    def __reduce__(self):
        return exec, ("from pathlib import Path; Path('../canary').touch()",)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def raw_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# --- weights that are programs --------------------------------------------------------------------------------------


def torch_zip(path, padding=0):
    torch.save({"state_dict": {"conv1.weight": torch.ones(1 + padding)}, "extra": Evil()}, path)


def torch_legacy(path):
    torch.save({"conv1.weight": Evil()}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


def tar_of_pickles(path):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Evil())
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def zip_of_pickles(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive/data.pkl", "../canary", "archive/version"):
            archive.writestr(name, pickle.dumps(Evil()))


class Reduced:
    """Pickled as a call of `function` with `arguments`, and then `state`."""

    def __init__(self, function, arguments, *state):
        self.reduced = function, arguments, *state

    def __reduce__(self):
        return self.reduced


def save_beside_weights(path, value):
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "args": value, "metric": value}, path)


def numpys_objects(path):
    """A scalar whose bytes are a pickle. Today's numpy refuses its dtype, and here numpy is not even asked."""
    save_beside_weights(path, Reduced(np._core.multiarray.scalar, (np.dtype("O"), pickle.dumps(Evil()))))


def numpys_objects_by_the_old_name(path):
    numpys_objects(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def numpys_array_of_objects(path):
    save_beside_weights(path, np.array([pickle.dumps(Evil()), None], dtype=object))


def numpys_dtype_of_a_strange_state(path):
    save_beside_weights(path, Reduced(np.dtype, ("V8",), (3, "|", None, ("x",), {"x": 1}, -1, 1 << 40, 0)))


def namespace_of_a_program(path):
    save_beside_weights(path, Namespace(model="resnet10t", callback=Evil()))


def namespace_of_another_state(path):
    save_beside_weights(path, Reduced(Namespace, (), ({"model": 1}, {"__class__": torch.Tensor, "__dict__": {}})))


def namespace_of_arguments(path):
    save_beside_weights(path, Reduced(Namespace, (1, 2, 3)))


def default_of_a_program(path):
    save_beside_weights(path, Reduced(defaultdict, (exec,)))


def called_builtin(path):
    save_beside_weights(path, Reduced(list, (Reduced(str, (Evil(),)),)))


def weights_in_themselves(path):
    content: dict = {"conv1.weight": "none"}
    content["model"] = content["state_dict"] = content["ema"] = content
    torch.save(content, path)


def torchscript(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def objects_in_npz(path):
    np.savez(path, embedding=np.array([Evil()], dtype=object))


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "archive/data/0", "embedding.npy"):
            with archive.open(name, "w") as file:
                for _ in range(16):
                    file.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (torch_zip, "resnet10t.pth", "holds more than tensors"),
        (torch_zip, "resnet10t.bin", "holds more than tensors"),
        (torch_zip, "resnet10t.pt", "holds more than tensors"),
        (torch_legacy, "resnet10t.pth", "holds more than tensors, such as exec,"),
        (torch_zip, "last.ckpt", "holds more than tensors, such as exec,"),
        (numpys_objects, "resnet10t.pth", "does not hold the weights"),
        (numpys_objects_by_the_old_name, "resnet10t.pth", "does not hold the weights"),
        (numpys_array_of_objects, "resnet10t.pth", "does not hold the weights"),
        (numpys_dtype_of_a_strange_state, "resnet10t.pth", "does not hold the weights"),
        (namespace_of_a_program, "last.pth.tar", "holds more than tensors, such as exec,"),
        (namespace_of_another_state, "resnet10t.pth", "holds more than tensors"),
        (namespace_of_arguments, "resnet10t.pth", "not a whole PyTorch checkpoint"),
        (default_of_a_program, "resnet10t.ckpt", "holds more than tensors, such as exec,"),
        (called_builtin, "resnet10t.ckpt", "holds more than tensors, such as exec,"),
        (weights_in_themselves, "resnet10t.ckpt", "holds no state dict"),
        (bare_pickle, "resnet10t.pth.tar", "holds more than tensors"),
        (bare_pickle, "resnet10t.safetensors", "not a whole safetensors file"),
        (bare_pickle, "vit_tiny_patch16_224.npz", "does not hold the weights"),
        (tar_of_pickles, "resnet10t.tar", "resnet10t.tar"),
        (zip_of_pickles, "resnet10t.torch", "resnet10t.torch"),
        (torchscript, "resnet10t.pt", "not a whole PyTorch checkpoint"),
        (objects_in_npz, "vit_tiny_patch16_224.npz", "does not hold the weights"),
        (zip_bomb, "resnet10t.pth", "would unpack to"),
        (zip_bomb, "vit_tiny_patch16_224.npz", "would unpack to"),
    ],
)
def test_a_checkpoint_that_is_a_program_or_a_bomb(make, name, said, world, refused):
    make(world / name)
    refused("build", name, "--output", "out", said=said)


def test_the_programs_would_run_where_nobody_takes_care(world):
    for make in (torch_zip, torch_legacy):
        make(world / "x")
        torch.load(world / "x", weights_only=False)
        (world / "../canary").unlink()


def test_what_the_process_allows_elsewhere_is_not_allowed_here(world, refused):
    torch_zip(world / "resnet10t.pth")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([exec, Namespace]):
        torch.load(world / "resnet10t.pth", weights_only=True)
        (world / "../canary").unlink()
        refused("build", "resnet10t.pth", "--output", "out", said="holds more than tensors, such as exec,")
        assert {exec, Namespace} <= set(torch.serialization.get_safe_globals()), "it stays allowed"
    assert set(torch.serialization.get_safe_globals()) == before


def test_pickled_weights_in_place_of_an_ensembles(folder):
    (folder / INDEX).unlink()
    torch_zip(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(folder)
    # Whoever asks for pickles gets tensors or nothing; this one is too small for the weights.
    with pytest.raises(ValueError, match="do not fit its config: 180 missing"):
        AutoModel.from_pretrained(folder, use_safetensors=False)
    torch_zip(folder / "pytorch_model.bin", padding=200_000)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AutoModel.from_pretrained(folder, use_safetensors=False)


def test_pickled_weights_named_by_an_index(folder):
    (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")
    edit(
        folder / "pytorch_model.bin.index.json", lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "x.bin"))
    )
    torch_zip(folder / "x.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(folder)


def test_an_adapter_of_pickles_or_of_no_ensemble(folder):
    model = AutoModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["conv2"]))
    adapter = folder.with_name("adapter")
    model.save_pretrained(adapter)
    AutoModel.from_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch_zip(adapter / "adapter_model.bin")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        AutoModel.from_pretrained(adapter)
    edit(adapter / "adapter_config.json", lambda config: config.update(base_model_name_or_path="/etc"))
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(adapter)


# --- code beside the weights ----------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath('../canary').touch()\nclass Evil: pass\n"


@pytest.mark.parametrize("reference", ["evil.Evil", "evil/repo--modeling.Evil", "../outside/evil.Evil", "os.system"])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_an_auto_map_to_other_code(reference, trust, folder):
    (folder / "evil.py").write_text(CODE)
    for name in PAYLOAD_FILES:
        (folder / name).write_text(CODE)
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor")
    for name in ("config.json", "preprocessor_config.json"):
        edit(folder / name, lambda content: content.update(auto_map=dict.fromkeys(classes, reference)))
    model = AutoModel.from_pretrained(folder, **trust)  # the package's own classes, whatever the folder says
    assert type(model) is ConcatEnsembleModel
    assert type(AutoImageProcessor.from_pretrained(folder, **trust)).__module__.startswith("concat_ensemble.")
    model.save_pretrained("again")
    assert "Evil" not in "".join(path.read_text() for path in Path("again").glob("*.json"))
    assert not [path for path in Path("again").glob("*.py") if path.read_text() == CODE]


# --- configs --------------------------------------------------------------------------------------------------------


def member(**changes):
    return lambda config: config["members"][0].update(changes)


def args(**changes):
    return lambda config: config["members"][0]["model_args"].update(changes)


def sees(**changes):
    return lambda config: config["members"][0]["preprocessing"].update(changes)


def key(**changes):
    return lambda config: config.update(changes)


CONFIGS = {
    "code of kernels": (key(attn_implementation="evil/kernel"), "attn_implementation"),
    "the same, privately": (key(_attn_implementation="evil/kernel"), "_attn_implementation"),
    "a quantizer": (key(quantization_config={"quant_method": "evil"}), "quantization_config"),
    "weights elsewhere": (key(transformers_weights="../outside/x.safetensors"), "transformers_weights"),
    "a method": (key(save_pretrained="x"), "save_pretrained"),
    "a property": (key(built_members=[]), "built_members"),
    "a function for a dtype": (key(dtype="load"), "dtype"),
    "a list for a dtype": (key(dtype=[]), "dtype"),
    "a dtype among labels": (key(label2id={"dtype": []}), "label2id"),
    "code of pipelines": (key(custom_pipelines={"x": {"impl": "evil.Evil"}}), "custom_pipelines"),
    "members no list": (key(members={"0": 1}), "members"),
    "members a number": (key(members=5), "members"),
    "a member a string": (key(members=["resnet18"]), "members[0]"),
    "endless members": (lambda config: config.update(members=config["members"] * 10_000), "members"),
    "negative active members": (key(active_members=[-1]), "active_members=[-1]"),
    "active members of another kind": (key(active_members={"0": True}), "active_members"),
    "endless labels": (key(num_labels=10**12), "num_labels"),
    "labels no dict": (key(id2label=[1, 2]), "id2label"),
    "a projection of a billion columns": (key(projection_dim=10**9), "projection_dim"),
    "a wide projection that no file holds": (key(projection_dim=60_000), "do not fit"),
    "a million features": (member(num_features=10**6), "num_features=1000000"),
    "not a number": (key(initializer_range=float("nan")), "initializer_range"),
    "an address for an architecture": (member(architecture="hf-hub:evil/repo"), "hf-hub:evil/repo"),
    "a path for an architecture": (member(architecture="local-dir:../outside"), "local-dir:../outside"),
    "a list for an architecture": (member(architecture=["resnet18"]), "architecture"),
    "a checkpoint's path": (args(checkpoint_path="/etc/passwd"), "checkpoint_path"),
    "timm's weights": (args(pretrained=True), "pretrained"),
    "an address": (args(act_layer="https://evil.example/x"), "https://evil.example/x"),
    "a path": (args(norm_layer="../outside/x"), "../outside/x"),
    "a function by name": (args(act_layer="os.system"), "os.system"),
    "a class by name": (args(block="subprocess.Popen"), "timm cannot build"),
    "a device": (args(device="cpu"), "device"),
    "a million-wide layer": (args(channels=[10**6] * 4), "1000000"),
    "wide layers that no file holds": (args(channels=[3_000] * 4), "do not fit"),
    "wider layers than any network's": (args(channels=[65_536] * 4), "more than"),
    "endless layers": (args(layers=[60_000] * 4), "layers"),
    "layers below zero": (args(stem_width=-8), "timm cannot build"),
    "division by zero": (args(cardinality=0, block_args={"rd_ratio": 0}), "timm cannot build"),
    "a key that is a sentence": (args(**{"x`; rm -rf /": 1}), "no argument's name"),
    "infinite": (args(drop_rate=float("inf")), "inf"),
    "nested deeply": (args(block_args=json.loads("[" * 100 + "]" * 100)), "plain JSON"),
    "a picture as wide as the sea": (sees(input_size=[1, 10**6, 10**6]), "input_size"),
    "a crop that enlarges endlessly": (sees(crop_pct=1e-300), "crop_pct"),
    "a mean beyond floats": (sees(mean=[10**400]), "mean"),
    "a provenance that is no dict": (member(provenance=[1]), "provenance"),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_a_config_that_asks_for_more_than_an_ensemble(attack, folder):
    change, said = CONFIGS[attack]
    edit(folder / "config.json", change)
    with pytest.raises(ValueError) as error:
        AutoModel.from_pretrained(folder)
    assert said in str(error.value) and len(str(error.value)) < 1000


def test_a_config_with_a_key_twice_is_checked_as_it_is_read(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-2] + ', "members": [{"architecture": "hf-hub:evil/repo"}]}')
    with pytest.raises(ValueError, match=r"members\[0\]"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, "results/digits.json"])
@pytest.mark.parametrize("text", [DEEP, "5", "[]", "null", "\x00", "{"])
def test_json_that_is_nothing_of_ours(name, text, folder, refused):
    (folder / name).write_text(text)
    if name == INDEX:
        with pytest.raises((OSError, ValueError), match=r"index|holds no weights"):
            AutoModel.from_pretrained(folder)
    else:
        refused("card", "pair", said="")


def test_a_head_of_more_weights_than_memory(folder):
    edit(folder / "config.json", lambda config: [m.update(num_features=65_536) for m in config["members"]])
    with pytest.raises(ValueError, match="a head has up to"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=60_000)


@pytest.mark.parametrize(
    "change",
    [
        {"geometries": [{"interpolation": "evil"}]},
        {"geometries": "../outside"},
        {"geometries": [{"is_training": True, "auto_augment": "x"}]},
        {"geometries": []},
    ],
)
def test_an_image_processor_that_asks_for_more(change, folder):
    edit(folder / "preprocessor_config.json", lambda content: content.update(change))
    with pytest.raises(ValueError, match="geometries"):
        AutoImageProcessor.from_pretrained(folder)


# --- weights that lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["../outside/precious.txt", "/etc/passwd", "..\\x", "a/b.safetensors", "", 5, None, ["x"]]
)
def test_an_index_that_points_elsewhere(shard, folder):
    edit(folder / INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], shard)))
    with pytest.raises(OSError, match="index"):
        AutoModel.from_pretrained(folder)


def test_a_shard_that_is_a_link_to_something_else(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="not a whole safetensors file") as error:
        AutoModel.from_pretrained(folder)
    assert "root:" not in str(error.value)  # nothing of it is told


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "beyond the file": ({"w": W | {"shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8), None),
    "overlapping": ({"v": W, "w": W}, bytes(8), None),
    "backwards": ({"w": W | {"data_offsets": [8, 0]}}, bytes(8), None),
    "shape and size differ": ({"w": W | {"shape": [2**31, 2**31]}}, bytes(8), None),
    "shape overflows": ({"w": W | {"shape": [2**63, 2**63, 2**63]}}, bytes(8), None),
    "negative": ({"w": W | {"shape": [-2]}}, bytes(8), None),
    "unknown dtype": ({"w": W | {"dtype": "PICKLE"}}, bytes(8), None),
    "header longer than the file": ({"w": W}, bytes(8), 2**62),
    "header of no JSON": (b"\x80\x04pickle", bytes(8), None),
    "nested header": (DEEP.encode(), b"", None),
    "bytes that nobody names": ({"w": W}, bytes(800), None),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("lie", HEADERS)
def test_a_safetensors_header_that_lies(lie, single, folder):
    header, data, length = HEADERS[lie]
    raw_header(folder / ("model.safetensors" if single else SHARD), header, data, length)
    with pytest.raises(OSError, match="not a whole safetensors file"):
        AutoModel.from_pretrained(folder)


def test_weights_of_other_shapes_are_refused_not_left_random(folder):
    tensors = load_file(folder / SHARD)
    save_file({name: torch.zeros(0) for name in tensors} | {"members.9.x": torch.ones(1)}, folder / SHARD)
    with pytest.raises(ValueError, match="do not fit"):
        AutoModel.from_pretrained(folder)


def test_a_tensor_that_says_it_is_endless(world, refused):
    torch.save({"conv1.0.weight": torch.ones(1).expand(10**6, 10**6)}, world / "resnet10t.pth")
    refused("build", "resnet10t.pth", "--output", "out", said="would unpack to 4,000,000,000,000 bytes")


# --- members from folders and from the Hub --------------------------------------------------------------------------

TIMM = {
    "a path": ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
    "an address": ({"model_args": {"act_layer": "https://evil.example"}}, "https://evil.example"),
    "a million-wide layer": ({"model_args": {"channels": [10**6] * 4}}, "1000000"),
    "wide layers that no file holds": ({"model_args": {"channels": [12_000] * 4}}, "does not hold the weights"),
    "wider layers than any network's": ({"model_args": {"channels": [60_000] * 4}}, "more than"),
    "an architecture elsewhere": ({"architecture": "hf-hub:evil/repo"}, "hf-hub:evil/repo"),
    "a picture as wide as the sea": ({"pretrained_cfg": {"input_size": [1, 10**6, 10**6]}}, "input_size"),
    "pixels of nothing": ({"pretrained_cfg": {"input_size": 5, "mean": None}}, "pretrained_cfg"),
    "no dict": ({"pretrained_cfg": "x"}, "not a model's config"),
}


@pytest.mark.parametrize("attack", TIMM)
def test_a_timm_folder_from_a_stranger(attack, backbone, world, refused):
    change, said = TIMM[attack]
    (world / "member").mkdir()
    save_file(backbone.state_dict(), world / "member/model.safetensors")
    config = {"architecture": "resnet10t", "model_args": {"in_chans": 1, "channels": [8, 8, 16, 16], "stem_width": 8}}
    (world / "member/config.json").write_text(json.dumps(config | change))
    refused("build", "member", "--output", "out", said=said)


def test_a_timm_folder_of_pickles(world, refused):
    (world / "member").mkdir()
    torch_zip(world / "member/pytorch_model.bin")
    (world / "member/config.json").write_text('{"architecture": "resnet10t"}')
    refused("build", "member", "--output", "out", said="pytorch_model.bin")


@pytest.mark.parametrize("name", ["a path", "an address", "wider layers than any network's"])
def test_a_timm_repo_from_a_stranger(name, world, refused):
    commit = "c0ffee" + 34 * "0"
    repo = Path(HF_HUB_CACHE) / f"models--evil--x{len(name)}"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text(json.dumps({"architecture": "resnet10t"} | TIMM[name][0]))
    refused("build", f"hf-hub:evil/x{len(name)}", "--output", "out", said=TIMM[name][1])


# --- links and names in folders that are written --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "figures", "results", "figures/digits.png", "notes.tmp"])
@pytest.mark.parametrize("target", ["precious.txt", "new.txt"])
def test_a_link_where_the_card_would_be_written(name, target, folder, refused):
    (folder / "figures").mkdir()
    path = folder / name
    if path.is_dir():
        path.rename(folder.parent / "aside")
    path.symlink_to(folder.parent.parent / "outside" / ("" if "." not in name else target))
    refused("card", "pair", said="is a link to")


@pytest.mark.parametrize(
    "name", ["config.json", "modeling_concat_ensemble.py", f"{SHARD}.tmp", "preprocessor_config.json"]
)
def test_a_link_where_a_model_would_be_saved(name, folder):
    model = AutoModel.from_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent.parent / "outside/precious.txt")
    with pytest.raises(OSError, match="is a link to"):
        model.save_pretrained(folder)


def test_a_link_where_results_are_written_aside(made, world):
    for name in (".x.json.tmp", f".x.json.{os.getpid()}-{threading.get_native_id()}.tmp"):
        (world / name).symlink_to(world.parent / "outside/precious.txt")
    Results.load(made / "results/digits.json").save(world / "x.json")
    assert Results.load(world / "x.json")["pair"].mean == 0.5


def test_an_output_that_is_a_link_leaves_what_it_points_to(folder, world):
    (world / "link").symlink_to(folder)
    with pytest.raises(OSError, match="is a file"):
        AutoModel.from_pretrained(folder).save_pretrained(folder / "config.json")
    assert (folder / INDEX).is_file() and (world / "link").is_symlink()


@pytest.mark.parametrize(
    "study", ["../../outside/precious", "/etc/passwd", "a\x00b", "-rf", ".." * 500, "x\ny", "~/.ssh/id"]
)
def test_a_dataset_named_like_a_path_is_a_name_of_results(study):
    name = DatasetOptions(name=study).file_stem
    assert name.replace("-", "a").isalnum() and not name.startswith("-")


def test_a_recipe_that_is_a_path(world, refused):
    (world / "evil.yaml").write_text("members: {}")
    refused("build", "--recipe", "../world/evil", "--output", "out", said="no recipe '../world/evil'")


# --- the card -------------------------------------------------------------------------------------------------------

TEXTS = {
    "script": SCRIPT,
    "handler": "<img src=x onerror=alert(1)>",
    "link": "[click](javascript:alert(1))",
    "picture": "![](https://evil.example/track.png)",
    "table": "x | y |\n|---|\n# Heading",
    "YAML": "x\n---\nlicense: mit\n---\n",
    "code": "```\n" + SCRIPT,
    "span": f"`{SCRIPT}`",
    "formula": r"$\frac{1}{$ $x^$",
    "template": "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "entity": "&lt;script&gt;",
    "terminal": "[red]\x1b]0;evil\x07[/red]",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_would_be_more_than_text_on_the_card(name, folder):
    text = TEXTS[name]

    def poison(results):
        results["dataset"]["name"] = results["ensemble"] = results["rows"][0]["name"] = results["command"] = text
        results["versions"] = {text: text}

    edit(folder / "results/digits.json", poison)
    stated = dict.fromkeys(("source", "license", "pretraining_data", "ensemble_recipe"), text)
    stated |= {"hub_id": text, "revision": text}
    edit(folder / "config.json", lambda config: config["members"][0]["provenance"].update(stated))
    content = write_card(folder).read_text()
    card = ModelCard(content)
    assert (card.data.library_name, card.data.license) == ("transformers", "other")
    prose = "".join(part for part in card.text.replace(NOTE, "").split("```")[::2])
    told = re.sub(r"`[^`\n]*`|\\[\\`*\[\]<>|]", "", prose)  # without inline code, and what a backslash makes plain
    for sign in ("<", "](javascript", "](https://evil", "\n# Heading"):
        assert sign not in told, sign
    assert "\x1b" not in content
    assert card.text.count("```") == 6, "a fence was opened or closed"
    assert "49" not in prose and "root:" not in content


# --- recipes --------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64)) + "name: *a63\n"
YAMLS = {
    "billion laughs": LAUGHS,
    "an alias to itself": "name: &a [*a]\n",
    "an object": "name: !!python/object/apply:os.system ['touch ../canary']\n",
    "a module": "name: !!python/module:os\n",
    "a name": "name: !!python/name:os.system\n",
    "a new object": "!!python/object/new:subprocess.Popen [['touch', '../canary']]\n",
    "a merge": "a: &a {name: x}\nb:\n  <<: *a\n",
    "nested": DEEP[:5000],
    "nested mappings": "{a: " * 3000,
    "long": "name: " + "x" * 2_000_000,
    "a number beyond numbers": "num_classes: " + "9" * 6000,
    "a bad date": "name: 2001-99-99\n",
    "a bad timestamp": "name: !!timestamp x\n",
    "bytes": "\x00\x01",
    "no keys": "- 1\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "several": "name: x\n---\nname: y\n",
}


@pytest.mark.parametrize("attack", YAMLS)
@pytest.mark.parametrize("read", [DatasetRecipe.read, Recipe.from_file])
def test_a_recipe_that_is_more_than_a_recipe(attack, read, world):
    (world / "x.yaml").write_text(YAMLS[attack])
    with pytest.raises(ValueError, match=r"x\.yaml") as error:
        read(world / "x.yaml")
    assert len(str(error.value)) < 110_000


# --- datasets -------------------------------------------------------------------------------------------------------


def png(width, height, data=b""):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    sums = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sums)


def shortened():
    buffer = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()[:700]


def chatty():
    text = zlib.compress(bytes(100 << 20))
    body = b"zTXt" + b"Comment\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png(8, 8)[:33] + chunk + png(8, 8)[33:]


IMAGES = {
    "a bomb of pixels": png(60_000, 60_000),
    "a truncated photograph": shortened(),
    "a picture without pixels": png(64, 64),
    "a comment that is a bomb": chatty(),
    "a page": b"<html>" + SCRIPT.encode(),
    "a program": pickle.dumps(Evil()),
    "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../canary) (w) file closefile\n",
    "nothing": b"",
}


@pytest.fixture(scope="module")
def processor(made):
    return AutoImageProcessor.from_pretrained(made)


@pytest.mark.parametrize("attack", IMAGES)
def test_an_image_that_is_none(attack, processor, world):
    for label in "ab":
        (world / "data" / label).mkdir(parents=True)
        for n in range(5):
            PIL.Image.effect_noise((8, 8), 50).save(world / "data" / label / f"{n}.png")
    bad = world / "data/a/0.png"
    bad.write_bytes(IMAGES[attack])
    data = load_data(world / "data")
    split, index = next((s, n) for s in data.values() for n in range(len(s)) if s[n]["image"]["path"] == str(bad))
    with pytest.raises(ValueError, match=r"0\.png.* cannot be read"):
        read_image(split, index)
    with pytest.raises(ValueError, match="image 0 of the batch"):
        processor(str(bad))


DATASETS = {
    "a script": {"data.py": CODE, "dataset_infos.json": "{}"},
    "a saved dataset elsewhere": {
        "state.json": '{"_data_files": [{"filename": "../../outside/precious.txt"}], "_split": null}',
        "dataset_info.json": "{}",
    },
    "a saved dataset of pickles": {"state.json": pickle.dumps(Evil()), "dataset_info.json": "{}"},
    "metadata that points outside": {"metadata.csv": "file_name,label\n../outside/precious.txt,a\n"},
    "a table of another kind": {"train.parquet": pickle.dumps(Evil())},
    "a table with addresses": {
        "train.json": "".join(
            json.dumps({"image": "https://evil.example/x.png", "label": n % 2}) + "\n" for n in range(20)
        )
    },
}


@pytest.mark.parametrize("attack", DATASETS)
def test_a_dataset_that_is_a_program_or_elsewhere(attack, world):
    (world / "data").mkdir()
    for name, content in DATASETS[attack].items():
        (world / "data" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((OSError, ValueError), match=r"data|cannot|addresses"):
        data = load_data("json:data" if "train.json" in DATASETS[attack] else world / "data")
        read_image(data["train"], 0)


# --- results --------------------------------------------------------------------------------------------------------


def run0(**changes):
    return lambda results: results["rows"][0]["runs"][0].update(changes)


RESULTS = {
    "an endless test split": run0(n_test=10**15, correct="AA=="),
    "no test images": run0(n_test=0),
    "correct images in no base64": run0(correct="<script>"),
    "an accuracy above one": run0(metrics={"top1": 1e308}),
    "an accuracy that is none": run0(metrics={"top1": float("nan")}),
    "no accuracy": run0(metrics={}),
    "text for a number": run0(seed="1; rm"),
    "no rows": lambda results: results.update(rows=[]),
    "no runs": lambda results: [row.update(runs=[]) for row in results["rows"]],
    "a kind of its own": lambda results: results["rows"][0].update(kind=SCRIPT),
    "a name that is none": lambda results: results["rows"][0].update(name=None),
    "a dataset that is a list": lambda results: results.update(dataset=[1]),
    "classes that are a number": lambda results: results["dataset"].update(classes=5),
    "other weights": lambda results: results.update(members_sha256=["0" * 64]),
    "an unknown key": lambda results: results.update(__class__="os"),
}


@pytest.mark.parametrize("attack", RESULTS)
def test_results_that_no_probe_wrote(attack, folder, refused):
    edit(folder / "results/digits.json", RESULTS[attack])
    refused("card", "pair", said="digits.json")
