import datetime
import fractions
import hashlib
import os
import pickle
import types
from argparse import Namespace
from collections import defaultdict
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from concat_ensemble.members.checkpoints import load_backbone, read_checkpoint, weights_sha256


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def zeros(state):
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


# Contents of checkpoint files, made from the state dict `s` of a network with a classifier `fc`.
WRAPPINGS = {
    "as it is": lambda s: s,
    "DistributedDataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "compiled and distributed": lambda s: prefixed(s, "module._orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "backbone of a detector": lambda s: {"state_dict": prefixed(s, "backbone.") | {"neck.weight": torch.ones(1)}},
    "the paper's code": lambda s: {"state_dict": prefixed(s, "module.model0."), "arch": "resnet50", "best_acc1": 76.0},
    "torchvision": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}, "epoch": 90},
    "timm, averaged too": lambda s: {"state_dict": zeros(s), "state_dict_ema": s},
    "averaged, distributed": lambda s: {
        "model": zeros(s),
        "model_ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(7)},
    },
    "Lightning, another name": lambda s: {
        "state_dict": prefixed(s, "net.") | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": defaultdict(list, path=PosixPath("data"), lr=np.float64(0.1), args=Namespace(x=[1])),
        "pytorch-lightning_version": "2.5.0",
    },
    "Lightning, nested": lambda s: {"state_dict": prefixed(s, "learner.online_encoder._orig_mod.")},
    "a part for each network": lambda s: {"generator": {"w": torch.ones(2)}, "critic": s, "optimizer": {"state": {}}},
    "no average": lambda s: {"state_dict": s, "state_dict_ema": None},
    "an empty average": lambda s: {"state_dict": s, "model_ema": {}, "ema": {"decay": torch.tensor(0.9)}},
    "an average beside it": lambda s: {"state_dict": prefixed(zeros(s), "model.") | prefixed(s, "ema_model.module.")},
    "average, one deeper": lambda s: {"model": zeros(s), "ema": {"module": s, "decay": torch.tensor([0.9])}},
    "average, diffusion": lambda s: {"model": zeros(s), "ema_model_state_dict": prefixed(s, "module.")},
    "average, capitals": lambda s: {"state_dict": zeros(s), "EMA": prefixed(s, "shadow.")},
    "average of a net": lambda s: {"net": zeros(s), "net_ema": s, "acc": torch.tensor(0.5)},
    "average of a callback": lambda s: {
        "state_dict": prefixed(zeros(s), "model."),
        "callbacks": {"EMA{'decay': 0.99}": {"weights": prefixed(s, "model.")}, "ModelCheckpoint": {"best": None}},
    },
    "stochastic average": lambda s: {
        "model": zeros(s),
        "swa_state_dict": prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
    },
    "averaged model": lambda s: {"model": zeros(s), "averaged_model": prefixed(s, "module.")},
    "average of losses": lambda s: {"state_dict": s, "loss_ema": {"value": torch.ones(3)}, "ema_loss": torch.ones(1)},
    "teacher alone": lambda s: {"teacher": prefixed(s, "backbone.")},
    "a net and a number": lambda s: {"net": s, "acc": torch.tensor(71.5), "epoch": 3},
    "split BatchNorm": lambda s: (
        s | {k.replace("bn1.", "bn1.aux_bn.0."): torch.zeros_like(v) for k, v in s.items() if "bn1." in k}
    ),
    "harmless values": lambda s: {
        "model": s,
        "args": types.SimpleNamespace(sizes=range(3), crop=slice(0, 3), tags=frozenset("a")),
        "version": torch.__version__,
        "time": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date(2020, 1, 1)],
    },
    "the same network twice": lambda s: {"state_dict": s | prefixed(s, "copy.")},
    "averaged, by other names": lambda s: {"state_dict": zeros(s), "ema": {"state_dict": s, "decay": 0.999}},
    "old, without BatchNorm's counts": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.fixture(scope="module")
def trained(backbone):
    return backbone(seed=3, num_classes=5)


def equal_but_for_counts(loaded, expected):
    return all(torch.equal(loaded[key], expected[key]) for key in loaded if not key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_come_out_of_every_wrapping_without_the_classifier(wrapping, trained, backbone, tmp_path):
    torch.save(WRAPPINGS[wrapping](trained.state_dict()), tmp_path / "x.pth")
    model = backbone(seed=4)
    load_backbone(model, read_checkpoint(tmp_path / "x.pth")[0], "x")
    assert equal_but_for_counts(model.state_dict(), trained.state_dict())


def test_weights_come_out_of_torchs_own_average(trained, backbone, tmp_path):
    torch.save(AveragedModel(trained).state_dict(), tmp_path / "x.pth")
    model = backbone(seed=4)
    load_backbone(model, read_checkpoint(tmp_path / "x.pth")[0], "x")
    assert equal_but_for_counts(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pth.tar", "x.pt", "x.bin"])
def test_every_kind_of_file_gives_the_same_tensors(name, trained, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)(trained.state_dict(), tmp_path / name)
    tensors, metadata = read_checkpoint(tmp_path / name)
    assert weights_sha256(tensors) == weights_sha256(trained.state_dict())
    assert metadata == {}


def test_old_torch_format_and_safetensors_metadata_are_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "x.pth")[0]["w"], torch.ones(2))
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"license": "mit"})
    assert read_checkpoint(tmp_path / "x.safetensors")[1] == {"license": "mit"}


def test_keys_that_do_not_match_are_listed(trained, backbone):
    state = trained.state_dict()
    del state["layer1.0.conv1.weight"], state["bn1.bias"]
    state |= {"layer9.weight": torch.ones(1), "conv1.0.weight": torch.ones(2, 2)}
    model = backbone(seed=4)
    before = weights_sha256(model.state_dict())
    with pytest.raises(ValueError) as error:
        load_backbone(model, state, "some file")
    assert "some file does not hold the weights of resnet10t" in str(error.value)
    assert "missing: bn1.bias, layer1.0.conv1.weight;" in str(error.value)
    assert "unexpected: layer9.weight;" in str(error.value)
    assert "other shape: conv1.0.weight (2, 2) for (6, 1, 3, 3)." in str(error.value)
    assert weights_sha256(model.state_dict()) == before, "a refused checkpoint must not be half loaded"


def test_a_long_list_is_cut(backbone):
    with pytest.raises(ValueError, match=r"missing: (\S+ ){8}and \d+ more"):
        load_backbone(backbone(), {"w": torch.ones(1)}, "x")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_truncated_file_is_refused(name, share, trained, tmp_path):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(trained.state_dict(), path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=rf"{name} is not a whole .* fetch or save it again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"<html></html>", bytes(range(256))],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_of_something_else_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)


class Mischief:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_runs_code_is_refused_and_not_run(trained, tmp_path):
    trap = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Mischief(trap)))
    assert trap.is_dir(), "the trap works"
    trap.rmdir()
    torch.save({"state_dict": trained.state_dict(), "extra": Mischief(trap)}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"x\.pth holds more than tensors, such as (posix|nt)\.mkdir,.* as \.safetensors"
    ):
        read_checkpoint(tmp_path / "x.pth")
    assert not trap.exists()


def test_a_pickle_of_other_objects_is_refused(trained, tmp_path):
    torch.save({"model": trained.state_dict(), "args": fractions.Fraction(1, 3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors, such as fractions\.Fraction.*weights_only=False"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "top"),
    [([torch.ones(1)], "list"), ({}, r"\[\]"), ({"epoch": 3, "lr": 0.1}, "epoch"), ({1: 2, "a": 3}, "a")],
)
def test_a_file_without_a_state_dict_says_what_it_holds(content, top, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth holds no state dict.*{top}"):
        read_checkpoint(tmp_path / "x.pth")


def test_unknown_kinds_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.onnx: unknown kind of checkpoint; give \.safetensors, \.pth"):
        read_checkpoint(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*y\.pth"):
        read_checkpoint(tmp_path / "y.pth")


def test_sha256_by_hand():
    """Eight zero bytes after the line that describes them: stored hashes must be valid in later versions."""
    assert weights_sha256({"w": torch.zeros(2)}) == hashlib.sha256(b"w torch.float32 (2,)\n" + bytes(8)).hexdigest()


def test_sha256_sees_names_dtypes_shapes_and_every_bit_but_not_order_or_memory():
    w, b = torch.arange(6.0).view(2, 3), torch.tensor(1.0)
    digest = weights_sha256({"w": w, "b": b})
    assert digest == weights_sha256({"b": b, "w": w.t().contiguous().t()})
    changed = w.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {"w": changed, "b": b},
        {"v": w, "b": b},
        {"w": w.view(3, 2), "b": b},
        {"w": w.bfloat16(), "b": b},
        {"w": w},
    ]
    assert len({digest, *map(weights_sha256, others)}) == 6


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (("encoder_q.", "encoder_k."), "'encoder_k.', 'encoder_q.'"),
        (("module.net1.", "module.net2."), "'module.net1.', 'module.net2.'"),
        (("", "second."), "'', 'second.'"),
        (("student.", "teacher."), "'student.', 'teacher.'"),
        (("ema_fast.", "ema_slow."), "'ema_fast.', 'ema_slow.'"),
    ],
)
def test_one_of_several_networks_is_never_chosen_silently(keys, names, trained, backbone):
    first, second = keys
    tensors = prefixed(trained.state_dict(), first) | prefixed(zeros(trained.state_dict()), second)
    with pytest.raises(ValueError, match=f"mine holds this network several times, below {names}; save one .*PREFIX"):
        load_backbone(backbone(), tensors, "mine")


PARTIAL_AVERAGES = {
    "parameters alone": lambda s, names: s | prefixed({name: s[name] for name in names}, "ema."),
    "keys without dots": lambda s, names: (
        prefixed(s, "model.") | {f"model_ema.{name.replace('.', '')}": s[name] for name in names}
    ),
    "a part of its own": lambda s, names: {"model": s, "ema": {name: s[name] for name in names}},
    "a list": lambda s, names: {"model": s, "ema": {"decay": 0.9, "shadow_params": [s[name] for name in names]}},
}


@pytest.mark.parametrize("kind", PARTIAL_AVERAGES)
def test_an_average_without_some_names_is_not_passed_over(kind, trained, backbone, tmp_path):
    names = [name for name, _ in trained.named_parameters()]
    torch.save(PARTIAL_AVERAGES[kind](trained.state_dict(), names), tmp_path / "x.pth")
    model = backbone(seed=4)
    before = weights_sha256(model.state_dict())
    with pytest.raises(ValueError, match=r"x (holds averaged weights, such as|does not hold the weights of)"):
        load_backbone(model, read_checkpoint(tmp_path / "x.pth")[0], "x")
    assert weights_sha256(model.state_dict()) == before


@pytest.mark.parametrize(("name", "weights"), [("model_ema", "EMA"), ("swa_model", "averaged"), ("schema", None)])
def test_provenance_says_that_weights_are_averages(name, weights, trained, tmp_path):
    torch.save({name: trained.state_dict(), "epoch": 1}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")[1].get("weights") == weights


def test_a_larger_network_beside_it_is_another_network(trained, backbone):
    """A teacher for distillation: it has all keys of the student and more."""
    teacher = zeros(trained.state_dict()) | {"layer9.weight": torch.ones(1)}
    model = backbone(seed=4)
    load_backbone(model, prefixed(trained.state_dict(), "student.") | prefixed(teacher, "teacher."), "x")
    assert equal_but_for_counts(model.state_dict(), trained.state_dict())
