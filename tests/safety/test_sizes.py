"""Files of a few bytes that name networks of gigabytes, or networks that are built for hours: refused before anything
takes memory. `world` sees that nothing takes a gigabyte or more than seconds."""

import faulthandler
import io
import json
import struct
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import save, save_file
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import assemble
from concat_ensemble.modeling import modeling_concat_ensemble as modeling
from concat_ensemble.modeling.modeling_concat_ensemble import create_backbone

INDEX, SHARD = "model.safetensors.index.json", "member-00.safetensors"
LARGE = "regnety_2560"  # 5 GB, and soon built without memory
W = torch.ones(1)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def raw_header(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def expanded(architecture):
    """Tensors of a network's names and shapes, each of one number in memory."""
    return {key: torch.ones(()).expand(tensor.shape) for key, tensor in without_memory(architecture).items()}


def without_memory(architecture):
    with torch.device("meta"):
        return create_backbone(architecture).state_dict()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CHECKPOINTS = {
    "its metadata": ("x.safetensors", lambda: save({"w": W}, {"architecture": LARGE}), "does not hold"),
    "its name": (f"{LARGE}.safetensors", lambda: save({"w": W}), "does not hold"),
    "a pickle's name": (f"{LARGE}.pth", lambda: pickled({"w": W}), "does not hold"),
    "a pickle's arguments": ("x.pth.tar", lambda: pickled({"state_dict": {"w": W}, "arch": LARGE}), "does not hold"),
    "a key of Google's": (f"{LARGE}.npz", lambda: npz(embedding=np.ones(9)), "does not hold"),
    "one number for all": (f"{LARGE}.pth", lambda: pickled(expanded(LARGE)), "would unpack to"),
    "no number at all": (f"{LARGE}.pth", lambda: pickled(without_memory(LARGE)), "would unpack to"),
    "zeros that nobody stores": (
        "resnet10t.pth",
        lambda: pickled({"conv1.0.weight": torch.sparse_coo_tensor(size=(2**20, 2**20))}),
        "would unpack to",
    ),
    "few weights without memory": ("resnet10t.pth", lambda: pickled({"w": torch.ones(9, device="meta")}), "sparse"),
}


@pytest.mark.parametrize("attack", CHECKPOINTS)
def test_a_checkpoint_of_a_few_bytes_for_a_network_of_gigabytes(attack, world, refused):
    name, content, said = CHECKPOINTS[attack]
    (world / name).write_bytes(content())
    refused("build", name, "--output", "out", said=said)


def test_the_checkpoint_of_124_bytes(world, refused):
    architecture = "vit_7b_patch16_dinov3"  # 27 GB
    (world / "x.safetensors").write_bytes(save({"w": W}, {"architecture": architecture}))
    assert (world / "x.safetensors").stat().st_size < 150
    refused("build", "x.safetensors", "--output", "out", said=f"does not hold the weights of {architecture}")


@pytest.mark.parametrize("kind", ["timm", "timm_wrapper"])
@pytest.mark.parametrize("weights", [None, "model.safetensors"])
def test_a_folder_of_a_config_for_a_network_of_gigabytes(kind, weights, world, refused):
    (world / "member").mkdir()
    config = {"architecture": LARGE} | ({"model_type": kind} if kind != "timm" else {})
    (world / "member/config.json").write_text(json.dumps(config))
    if weights:
        save_file({"w": W}, world / "member" / weights)
    refused("build", "member", "--output", "out", said="does not hold" if weights else "no checkpoint file")


def cached_repo(name, files):
    """A repo in the cache, as if it had been downloaded."""
    commit = "c0ffee" + 34 * "0"
    repo = Path(HF_HUB_CACHE) / f"models--evil--{name}"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    for file, content in files.items():
        (repo / "snapshots" / commit / file).write_bytes(content)


REPOS = {
    "nothing": (LARGE, {}, {}, "has no weights"),
    "one-number": (LARGE, {}, {"model.safetensors": save({"w": W})}, "does not hold"),
    "one-pickled": (LARGE, {}, {"pytorch_model.bin": pickled({"w": W})}, "does not hold"),
    "garbage": ("resnet10t", {}, {"model.safetensors": b"garbage"}, "not a whole safetensors file"),
    "another-file": (LARGE, {"hf_hub_filename": "x.bin"}, {"x.safetensors": save({"w": W})}, "does not hold"),
    "endless-table": (
        "vit_tiny_patch16_224",
        {},
        {"pytorch_model.bin": pickled({"pos_embed": torch.ones(1).expand(1, 10**9, 192)})},
        "would unpack to",
    ),
}


@pytest.mark.parametrize("name", REPOS)
def test_a_timm_repo_that_does_not_hold_what_it_names(name, world, refused):
    architecture, pretrained_cfg, files, said = REPOS[name]
    config = {"architecture": architecture, "pretrained_cfg": pretrained_cfg}
    cached_repo(name, files | {"config.json": json.dumps(config).encode()})
    refused("build", f"hf-hub:evil/{name}", "--output", "out", said=said)


def ask_for(folder, architecture, copies=1, **model_args):
    def change(config):
        member = config["members"][0]
        size = [3, 224, 224]
        member["preprocessing"] |= {"input_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "image_mode": "RGB"}
        config["members"] = [member | {"architecture": architecture, "model_args": model_args}] * copies

    edit(folder / "config.json", change)


def test_a_few_pickled_numbers_for_an_ensemble_of_gigabytes(folder):
    ask_for(folder, LARGE)
    (folder / INDEX).unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(folder)
    torch.save(expanded(LARGE), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="do not fit"):
        AutoModel.from_pretrained(folder, use_safetensors=False)
    (folder / "pytorch_model.bin").rename(folder / "member.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"members.0.norm.weight": "member.bin"}}')
    with pytest.raises(ValueError, match="do not fit"):
        AutoModel.from_pretrained(folder, use_safetensors=False)


UNSAVED = {  # architecture and arguments of networks with small weights and large buffers that are not saved
    "attention biases": ("levit_128s", {"img_size": 2048}),
    "their indices": ("efficientvit_m0", {"img_size": 2048, "window_size": [100, 100, 100]}),
    "relative positions": ("beit_base_patch16_224", {"img_size": 2048}),
    "relative positions of windows": ("swinv2_tiny_window8_256", {"img_size": 4096, "window_size": 256}),
    "a mask of windows": ("swin_tiny_patch4_window7_224", {"img_size": 60_000}),
    "rotations": ("vit_base_patch16_rope_224", {"img_size": 32_768}),
    "a table that is computed by another": ("vit_relpos_small_patch16_224", {"img_size": 2048}),
    "patches": ("vit_tiny_patch16_224", {"img_size": 65_536, "patch_size": 1}),
    "windows of all of an image": ("tiny_vit_5m_224", {"window_sizes": [7, 14, 700, 7]}),
}


@pytest.mark.parametrize("attack", UNSAVED)
def test_buffers_that_no_file_holds_count(attack, folder):
    architecture, model_args = UNSAVED[attack]
    ask_for(folder, architecture, **model_args)
    with pytest.raises(ValueError, match=r"its buffers take|more than .* weights"):
        AutoModel.from_pretrained(folder)


def test_buffers_of_all_members_count_together(folder):
    large = {"img_size": 4096}  # 303 MB of masks each
    with torch.device("meta"):
        create_backbone("swin_tiny_patch4_window7_224", **large)
    ask_for(folder, "swin_tiny_patch4_window7_224", copies=4, **large)
    with pytest.raises(ValueError, match=r"members\[\d\]: .* its buffers take"):
        AutoModel.from_pretrained(folder)


LOOPS = {
    "Python's": ("tiny_vit_5m_224", {"window_sizes": [7, 7, 60, 7]}),
    "tensors": ("maxvit_tiny_tf_224", {"img_size": 4096}),
    "layers": ("convnext_atto", {"depths": [60_000, 1, 1, 1]}),
}


@pytest.mark.parametrize("attack", LOOPS)
def test_a_constructor_that_loops_for_long_is_stopped(attack, folder, monkeypatch):
    monkeypatch.setattr(modeling, "MAX_SECONDS", 0.5)
    architecture, model_args = LOOPS[attack]
    ask_for(folder, architecture, **model_args)
    started = time.process_time()
    with pytest.raises(ValueError, match="takes more than"):
        AutoModel.from_pretrained(folder)
    assert time.process_time() - started < 10


def test_a_constructor_is_stopped_whose_error_would_be_taken_for_another(folder, monkeypatch):
    monkeypatch.setattr(modeling, "MAX_SECONDS", 0.5)
    ask_for(folder, "tiny_vit_5m_224", window_sizes=[7, 7, 60, 7])
    edit(folder / "config.json", lambda config: config.update(dynamic_img_size=True))
    with pytest.raises(ValueError, match="takes more than"):
        AutoModel.from_pretrained(folder)


def test_nothing_is_stopped_afterwards(monkeypatch):
    monkeypatch.setattr(modeling, "MAX_SECONDS", 0.5)
    create_backbone("resnet10t", channels=[8, 8, 16, 16])
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        pass


@pytest.mark.parametrize("watch", [sys.setprofile, sys.settrace], ids=["profiler", "debugger"])
def test_networks_can_be_built_under(watch):
    faulthandler.dump_traceback_later(120, exit=True)  # an interpreter that hangs there answers no signal
    watch(lambda *_: None)
    try:
        for _ in range(2):
            create_backbone("resnet10t", channels=[8, 8, 16, 16])
    finally:
        watch(None)
        faulthandler.cancel_dump_traceback_later()


ARGUMENTS = {
    "a long list": {"depths": [1] * 10_000},
    "large numbers together": {"depths": [65_536] * 1_000},
    "nothing, a thousand times": {"depths": [[]] * 10_000},
    "many arguments": {f"x{n}": 1 for n in range(2_000)},
}


@pytest.mark.parametrize("attack", ARGUMENTS)
def test_arguments_without_an_end(attack, folder):
    ask_for(folder, "convnext_atto", **ARGUMENTS[attack])
    with pytest.raises(ValueError, match="model_args") as error:
        AutoModel.from_pretrained(folder)
    assert len(str(error.value)) < 300


HEADERS = {
    "a long header": lambda path: raw_header(path, b"{" + b" " * 2**24 + b"}"),
    "a long name": lambda path: save_file({"x." * 251: W}, path),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_names_without_an_end(attack, folder, refused):
    HEADERS[attack](folder / SHARD)
    with pytest.raises(OSError, match="not a whole safetensors file"):
        AutoModel.from_pretrained(folder)
    HEADERS[attack](folder.parent / "resnet10t.safetensors")
    refused("build", "resnet10t.safetensors", "--output", "out", said="not a whole safetensors file")


PICKLED_NAMES = {
    "long": ({"." * 10**6: W}, "names of more than"),
    "many": (dict.fromkeys(map(str, range(100_001)), W), "100,000 tensors"),
    "networks": ({f"{n}.conv1.0.weight": W for n in range(1_000)}, "1,000 networks"),
}


@pytest.mark.parametrize("attack", PICKLED_NAMES)
def test_pickled_names_without_an_end(attack, world, refused):
    tensors, said = PICKLED_NAMES[attack]
    torch.save(tensors, world / "resnet10t.pth")
    refused("build", "resnet10t.pth", "--output", "out", said=said)


def test_an_index_without_an_end(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}) + " " * 2**24)
    with pytest.raises(OSError, match=r"index\.json has 16,777,234 bytes, more than 16,777,216; save it again"):
        AutoModel.from_pretrained(folder)


def test_an_image_of_gigabytes_is_not_run_to_measure_a_network(backbone, world):
    (world / "member").mkdir()
    save_file(backbone.state_dict(), world / "member/model.safetensors")
    config = {"architecture": "resnet10t", "model_args": {"in_chans": 1, "channels": [8, 8, 16, 16], "stem_width": 8}}
    config["pretrained_cfg"] = {"input_size": [1, 4096, 4096]}
    (world / "member/config.json").write_text(json.dumps(config))
    assert assemble(world / "member").config.num_features == 16


@pytest.mark.parametrize("change", [{"num_labels": 20_000}, {"projection_dim": 60_000}])
def test_a_new_layer_of_gigabytes(change, folder):
    edit(folder / "config.json", lambda config: [m.update(num_features=65_536) for m in config["members"]])
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match="has up to"):
        AutoModelForImageClassification.from_pretrained(folder, **{"num_labels": 2} | change)


def test_a_lying_archive(world, refused):
    """Entries that say they are longer than the file."""
    path = world / f"{LARGE}.npz"
    path.write_bytes(npz(**{f"x{n}": np.ones(9) for n in range(50)}))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 50
    data = path.read_bytes()
    size = (9 * 8 + 128).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (2**31).to_bytes(4, "little")))
    refused("build", path.name, "--output", "out", said="would unpack to")


def count_bytes(device, create):
    """Bytes of all tensors that are created."""
    with torch.device(device), modeling._Limits(1) as limits:
        create()
    return sum(size for _, size in limits.alive)


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (2, 2, 2, 2)}),
        ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48}),
        ("levit_128s", {}),
        ("eva02_tiny_patch14_224", {"depth": 2}),
        ("resnet10t", {}),
    ],
)
def test_a_network_takes_no_more_than_was_estimated(architecture, model_args):
    create = partial(timm.create_model, architecture, num_classes=0, **model_args)
    assert count_bytes("cpu", create) <= count_bytes("meta", create)


@pytest.mark.parametrize("architecture", ["regnety_2560", "beit_large_patch16_512", "ghostnetv3_100"])
def test_the_largest_networks_are_not_refused(architecture):
    with torch.device("meta"):
        create_backbone(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", timm.list_models())
def test_no_network_of_timm_is_refused(architecture):
    with torch.device("meta"):
        create_backbone(architecture)
