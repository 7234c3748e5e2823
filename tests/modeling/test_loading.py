"""Which files are saved, what is loaded from them, and which folders are refused."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.dynamic_module_utils import get_relative_import_files

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel, assemble
from concat_ensemble.modeling.configuration_concat_ensemble import AUTO_MAP, PAYLOAD_FILES

INDEX = "model.safetensors.index.json"
KINDS = ("resnet18", "eva02", "grey")  # 64, 192 and 64 columns


def shards(folder) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


@torch.no_grad()
def features(model, pixels):
    return model(pixels).pooler_output


@pytest.fixture(scope="module")
def whole(build):
    return build(*KINDS)[0]


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory):
    """The folder where `whole` is saved; no test may change it."""
    path = tmp_path_factory.mktemp("saved")
    whole.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` that a test may change."""
    return shutil.copytree(saved, tmp_path / "ensemble")


@pytest.fixture
def headed(build):
    """The same members with a head, whose weights are unlike those of a new head."""
    model, _ = build(*KINDS, cls=ConcatEnsembleForImageClassification, num_labels=4, standardize=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("classifier.weight", "classifier.bias", "feature_mean", "feature_scale"):
        model.state_dict()[name].uniform_(1, 2, generator=generator)
    return model


def edit_shard(folder, name, edit):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_holds_a_file_per_member_index_config_processor_and_code(folder, whole):
    members = {"member-00.safetensors", "member-01.safetensors", "member-02.safetensors"}
    assert {path.name for path in folder.iterdir()} == members | PAYLOAD_FILES | {
        INDEX,
        "config.json",
        "preprocessor_config.json",
    }
    index = json.loads((folder / INDEX).read_text())
    keys = {f"member-{int(key.split('.')[1]):02d}.safetensors" for key in index["weight_map"]}
    assert keys == members and set(index["weight_map"]) == set(whole.state_dict())
    for name in members:
        assert {key for key, file in index["weight_map"].items() if file == name} == set(load_file(folder / name))
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.state_dict().values())


@pytest.mark.parametrize("labels", [{}, {"num_labels": 3}])
def test_a_freshly_built_model_writes_all_four_auto_classes_and_their_code(build, tmp_path, labels):
    cls = ConcatEnsembleForImageClassification if labels else ConcatEnsembleModel
    build("resnet18", cls=cls, **labels)[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and len(AUTO_MAP) == 4
    assert config["architectures"] == [cls.__name__] and config["dtype"] == "float32"
    assert {path.name for path in tmp_path.glob("*.py")} == PAYLOAD_FILES


def test_transformers_finds_every_file_of_the_payload():
    folder = Path(inspect.getfile(ConcatEnsembleModel)).parent
    imported = get_relative_import_files(folder / "modeling_concat_ensemble.py")
    files = {Path(path).name for path in imported} | {"modeling_concat_ensemble.py"}
    assert files == PAYLOAD_FILES == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def test_a_members_file_has_the_same_bytes_with_and_without_a_head(folder, headed, tmp_path):
    headed.save_pretrained(tmp_path / "headed")
    assert shards(tmp_path / "headed") == shards(folder) | {"head.safetensors"}
    for name in shards(folder):
        assert (tmp_path / "headed" / name).read_bytes() == (folder / name).read_bytes()
    head = {"classifier.weight", "classifier.bias", "feature_mean", "feature_scale"}
    assert set(load_file(tmp_path / "headed/head.safetensors")) == head


def test_saving_again_removes_what_an_earlier_save_left(build, headed, tmp_path, noise):
    headed.save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors").write_bytes(b"as another library may leave it")
    (tmp_path / "notes.safetensors").write_bytes(b"somebody's own")
    small, _ = build("grey")
    small.save_pretrained(tmp_path)
    assert shards(tmp_path) == {"member-00.safetensors", "notes.safetensors"}
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), noise(small)), features(small, noise(small)))


@pytest.mark.parametrize("size", ["200KB", 200_000])
def test_a_member_larger_than_max_shard_size_is_split_and_loads(whole, noise, tmp_path, size):
    whole.save_pretrained(tmp_path, max_shard_size=size)
    parts = {name for name in shards(tmp_path) if re.fullmatch(r"member-01-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(parts) > 1 and f"member-01-00001-of-{len(parts):05d}.safetensors" in parts
    assert {name[:9] for name in shards(tmp_path)} == {"member-00", "member-01", "member-02"}
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), noise(whole)), features(whole, noise(whole)))
    for name in shards(tmp_path) - parts:
        (tmp_path / name).unlink()
    part = AutoModel.from_pretrained(tmp_path, active_members=[1])
    assert torch.equal(features(part, noise(whole)), features(whole, noise(whole))[:, 64:256])


def test_a_loaded_model_can_be_changed_and_saved_over_its_own_folder(folder, noise, whole):
    # Its tensors are the file itself, mapped into memory: writing into that file would destroy them.
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.members["0"].conv1.weight.mul_(2)
    expected = features(model, noise(whole))
    model.save_pretrained(folder)
    assert torch.equal(features(AutoModel.from_pretrained(folder), noise(whole)), expected)
    assert torch.equal(expected[:, 64:], features(whole, noise(whole))[:, 64:])


def test_nothing_is_saved_over_a_file(whole, tmp_path):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(OSError, match=r"there is a file"):
        whole.save_pretrained(tmp_path / "there")
    with pytest.raises(ValueError, match="variant='fp16'"):
        whole.save_pretrained(tmp_path / "new", variant="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, ConcatEnsembleModel.from_pretrained])
def test_loaded_features_are_bit_identical(load, saved, whole, noise):
    model = load(saved)
    assert type(model) is ConcatEnsembleModel and not model.training
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole)))
    assert AutoImageProcessor.from_pretrained(saved).geometries == whole.config.geometries


@torch.no_grad()
def test_a_head_survives(headed, noise, tmp_path):
    headed.save_pretrained(tmp_path)
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(model(noise(headed)).logits, headed(noise(headed)).logits)
    assert not (info["missing_keys"] or info["unexpected_keys"])


def test_a_folder_with_a_head_loads_as_a_bare_model(headed, whole, noise, tmp_path):
    headed.save_pretrained(tmp_path)
    (tmp_path / "head.safetensors").unlink()  # a bare model does not read it
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is ConcatEnsembleModel
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole)))


@torch.no_grad()
@pytest.mark.parametrize("standardize", [False, True])
def test_a_folder_without_a_head_gets_a_new_one_that_is_small_and_standardises_nothing(
    saved, whole, noise, standardize
):
    model = AutoModelForImageClassification.from_pretrained(saved, num_labels=3, standardize=standardize)
    weight, bias = model.classifier.weight, model.classifier.bias
    assert weight.shape == (3, 320) and weight.std().item() == pytest.approx(0.02, rel=0.2) and not bias.any()
    if standardize:
        assert not model.feature_mean.any() and (model.feature_scale == 1).all()
    output = model(noise(whole))
    assert torch.equal(output.pooler_output, features(whole, noise(whole)))
    torch.testing.assert_close(output.logits, output.pooler_output @ weight.T)


@torch.no_grad()
def test_another_number_of_classes_asks_for_a_new_head_and_leaves_the_members(headed, whole, noise, tmp_path):
    headed.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.weight.abs().max() < 0.2 and not model.classifier.bias.any()
    assert torch.equal(model.feature_mean, headed.feature_mean)
    assert torch.equal(model(noise(whole)).pooler_output, features(whole, noise(whole)))


@torch.no_grad()
def test_a_head_of_two_unnamed_classes_survives(build, noise, tmp_path):
    model, _ = build("grey", cls=ConcatEnsembleForImageClassification, num_labels=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(noise(model)).logits, model(noise(model)).logits)


@pytest.mark.parametrize("base", [ConcatEnsembleModel, ConcatEnsembleForImageClassification])
def test_layers_of_a_subclass_are_initialized_as_in_any_model(base, build, tmp_path):
    """They are not in the file, and torch's memory for them holds what was there before (weights of 1e38)."""

    class WithLayers(base):
        def __init__(self, config):
            super().__init__(config)
            self.linear, self.conv = nn.Linear(64, 300), nn.Conv2d(8, 8, 3)
            self.layer_norm, self.batch_norm = nn.LayerNorm(300), nn.BatchNorm2d(8)
            self.recurrent = nn.Sequential(nn.Embedding(10, 8), nn.LSTM(8, 8))
            self.post_init()

    model, _ = build("grey", cls=base, num_labels=3)
    model.save_pretrained(tmp_path)
    garbage = [torch.full((300, 64), 1e38) for _ in range(50)]
    del garbage
    loaded = WithLayers.from_pretrained(tmp_path)
    for layer in (loaded.linear, loaded.conv):
        assert layer.weight.std().item() == pytest.approx(loaded.config.initializer_range, rel=0.2)
        assert not layer.bias.any()
    for layer in (loaded.layer_norm, loaded.batch_norm):
        assert torch.equal(layer.weight, torch.ones_like(layer.weight)) and not layer.bias.any()
    assert not loaded.batch_norm.running_mean.any() and torch.equal(loaded.batch_norm.running_var, torch.ones(8))
    assert max(parameter.abs().max() for parameter in loaded.recurrent.parameters()) < 1
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_fresh_members_keep_timms_own_initialization(build):
    """transformers would draw each weight from a normal distribution of standard deviation 0.02."""
    assembled, _ = build("grey")
    before = {key: tensor.clone() for key, tensor in assembled.state_dict().items()}
    assembled.init_weights()
    assert all(torch.equal(tensor, before[key]) for key, tensor in assembled.state_dict().items())
    model = ConcatEnsembleModel(assembled.config)
    deviations = {layer.weight.std().item() for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    assert not any(deviation == pytest.approx(model.config.initializer_range, rel=0.02) for deviation in deviations)


def test_batchnorm_statistics_are_remade_where_memory_is_uninitialized(build):
    fresh = ConcatEnsembleModel(build("resnet18", "swin")[0].config)
    with torch.device("meta"):
        model = ConcatEnsembleModel(fresh.config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(7)
    model.init_weights()
    assert all(torch.equal(buffer, dict(fresh.named_buffers())[name]) for name, buffer in model.named_buffers())


def test_batchnorm_statistics_of_an_assembled_or_loaded_model_are_left_alone(backbone, noise, tmp_path):
    model = assemble([backbone("resnet18")])
    before = features(model, noise(model))
    model.save_pretrained(tmp_path)
    for each in (model, AutoModel.from_pretrained(tmp_path)):
        each.init_weights()
        assert torch.equal(features(each, noise(model)), before)


@pytest.mark.parametrize("delicate", ["resnetblur50", "swin", "eva02"])
def test_non_persistent_buffers_are_right_after_loading(build, noise, tmp_path, delicate):
    # transformers leaves these buffers as uninitialized memory; loading resnet50 first fills that with other numbers.
    model, _ = build("resnet50", delicate)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    expected = dict(model.named_buffers())
    lost = set(expected) - set(model.state_dict())
    assert lost and all(torch.equal(buffer, expected[key]) for key, buffer in loaded.named_buffers())
    assert torch.equal(features(loaded, noise(model)), features(model, noise(model)))


@torch.no_grad()
def test_bfloat16_loads_at_half_the_size_and_is_near(saved, whole, noise):
    model = AutoModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_memory_footprint() < 0.6 * whole.get_memory_footprint()
    actual, expected = features(model, noise(whole)).float(), features(whole, noise(whole))
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_usual_attention_arguments_are_accepted(saved, whole, noise, attention):
    model = AutoModel.from_pretrained(saved, attn_implementation=attention)
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole)))


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"members.0": "cpu", "members.1": "cpu", "members.2": "cpu"}]
)
def test_a_device_map_on_the_cpu_changes_nothing(saved, whole, noise, device_map):
    model = AutoModel.from_pretrained(saved, device_map=device_map)
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole)))


@pytest.mark.parametrize(
    "placed",
    [{"device_map": {"members.0": "cpu", "members.1": "disk", "members.2": "cpu"}}, {"max_memory": {"cpu": "1MB"}}],
)
def test_offloading_to_disk_is_refused_since_it_gives_wrong_features(saved, tmp_path, placed):
    # Before 1.15, accelerate itself refuses a model that is wholly on disk.
    refusal = r"disk.*wrong features.*active_members|offload the whole model to the disk"
    with pytest.raises(ValueError, match=refusal):
        AutoModel.from_pretrained(saved, **{"device_map": "auto", **placed}, offload_folder=tmp_path)


def test_a_subfolder_loads_whole_and_in_part(saved, whole, noise, tmp_path):
    shutil.copytree(saved, tmp_path / "inner")
    expected = features(whole, noise(whole))
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path, subfolder="inner"), noise(whole)), expected)
    part = AutoModel.from_pretrained(tmp_path, subfolder="inner", active_members=[2])
    assert torch.equal(features(part, noise(whole)), expected[:, 256:])


def test_a_single_file_as_other_tools_write_it_loads_too(folder, whole, noise):
    for name in shards(folder):
        (folder / name).unlink()
    (folder / INDEX).unlink()
    save_file(whole.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    expected = features(whole, noise(whole))
    assert torch.equal(features(AutoModel.from_pretrained(folder), noise(whole)), expected)
    part = AutoModel.from_pretrained(folder, active_members=[0, 2])
    assert torch.equal(features(part, noise(whole)), expected[:, [*range(64), *range(256, 320)]])


# --- some members ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, ConcatEnsembleModel.from_pretrained])
@pytest.mark.parametrize(
    ("active", "columns"), [([0, 2], [*range(64), *range(256, 320)]), ([2, 0], [*range(256, 320), *range(64)])]
)
def test_active_members_read_only_their_own_files(folder, whole, noise, load, active, columns):
    (folder / "member-01.safetensors").unlink()
    model, info = load(folder, active_members=active, output_loading_info=True)
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole))[:, columns])
    assert not (info["missing_keys"] or info["unexpected_keys"]) and model.config.built_members == active


def test_active_members_of_a_folder_with_a_head(headed, whole, noise, tmp_path):
    headed.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, active_members=[1])
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole))[:, 64:256])
    with pytest.raises(ValueError, match="ConcatEnsembleModel"):
        AutoModelForImageClassification.from_pretrained(tmp_path, active_members=[1])


def test_a_configuration_with_active_members_loads_its_part(folder, whole, noise):
    (folder / "member-00.safetensors").unlink()
    config = AutoConfig.from_pretrained(folder, active_members=[1, 2])
    model = ConcatEnsembleModel.from_pretrained(folder, config=config)
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole))[:, 64:])


@pytest.mark.parametrize("active", [[3], [-1], [0, 0], [], ["0"], "0", 0])
def test_bad_active_members_are_refused_on_loading(saved, active):
    with pytest.raises(ValueError, match=r"active_members=.*from 0 to 2"):
        AutoModel.from_pretrained(saved, active_members=active)


def test_active_members_keep_their_numbers_when_saved(saved, whole, noise, tmp_path):
    AutoModel.from_pretrained(saved, active_members=[2, 0]).save_pretrained(tmp_path)
    assert shards(tmp_path) == {"member-00.safetensors", "member-02.safetensors"}
    expected = features(whole, noise(whole))[:, [*range(256, 320), *range(64)]]
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), noise(whole)), expected)
    with pytest.raises(ValueError, match=r"member-01"):
        AutoModel.from_pretrained(tmp_path, active_members=[1])


def test_active_members_are_not_saved_over_the_other_members(folder, saved):
    with pytest.raises(ValueError, match=r"members \[1\].*export_active"):
        AutoModel.from_pretrained(folder, active_members=[0, 2]).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_exported_members_are_saved_as_a_whole_ensemble(saved, photos, tmp_path):
    part = AutoModel.from_pretrained(saved, active_members=[1, 2])
    part.export_active().save_pretrained(tmp_path)
    assert shards(tmp_path) == {"member-00.safetensors", "member-01.safetensors"}
    pixels = [AutoImageProcessor.from_pretrained(path)(photos)["pixel_values"] for path in (saved, tmp_path)]
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), pixels[1]), features(part, pixels[0]))


# --- what is broken -------------------------------------------------------------------------------------------------

LOAD = pytest.mark.parametrize("load", [AutoModel.from_pretrained, ConcatEnsembleModel.from_pretrained])


@LOAD
def test_the_error_names_a_missing_shard(folder, load):
    (folder / "member-01.safetensors").unlink()
    with pytest.raises(OSError, match=r"member-01\.safetensors"):
        load(folder)


@LOAD
@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_the_error_names_a_truncated_shard(folder, load, size):
    shard = folder / "member-01.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(OSError, match=r"member-01\.safetensors.*not a whole safetensors file"):
        load(folder)


def test_a_broken_file_of_an_inactive_member_is_not_read(folder, whole, noise):
    (folder / "member-01.safetensors").write_bytes(b"")
    model = AutoModel.from_pretrained(folder, active_members=[0])
    assert torch.equal(features(model, noise(whole)), features(whole, noise(whole))[:, :64])


@pytest.mark.parametrize("also_in_index", [True, False])
def test_the_error_names_a_missing_weight(folder, also_in_index):
    edit_shard(folder, "member-00.safetensors", lambda tensors: tensors.pop("members.0.layer1.0.conv1.weight"))
    if also_in_index:
        edit_index(folder, lambda weights: weights.pop("members.0.layer1.0.conv1.weight"))
    with pytest.raises(ValueError, match=r"missing [^;]*members\.0\.layer1\.0\.conv1\.weight"):
        AutoModel.from_pretrained(folder)
    AutoModel.from_pretrained(folder, active_members=[1, 2])


@pytest.mark.parametrize("also_in_index", [True, False])
def test_the_error_names_an_unexpected_weight_of_a_member(folder, also_in_index):
    edit_shard(folder, "member-00.safetensors", lambda tensors: tensors.update({"members.0.extra": torch.zeros(1)}))
    if also_in_index:
        edit_index(folder, lambda weights: weights.update({"members.0.extra": "member-00.safetensors"}))
    with pytest.raises(ValueError, match=r"unexpected .*members\.0\.extra"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("active", [None, [0, 2]])
def test_weights_of_a_member_that_the_configuration_lacks_are_refused(folder, active):
    # Its key begins like those of member 1, which are ignored if member 1 is not active.
    extra = {"members.10.fc": torch.zeros(1)}
    edit_shard(folder, "member-00.safetensors", lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=r"unexpected .*members\.10\.fc"):
        AutoModel.from_pretrained(folder, active_members=active)


@pytest.mark.parametrize("ignore", [{}, {"ignore_mismatched_sizes": True}])
def test_weights_of_another_shape_are_refused_for_a_member_even_where_a_head_may_change(folder, ignore):
    wider = {"members.0.layer1.0.conv1.weight": torch.zeros(9, 8, 3, 3)}
    edit_shard(folder, "member-00.safetensors", lambda tensors: tensors.update(wider))
    with pytest.raises((ValueError, RuntimeError), match=r"members\.0\.layer1\.0\.conv1\.weight|mismatched"):
        AutoModel.from_pretrained(folder, **ignore)


@LOAD
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", ""])
def test_a_shard_named_outside_the_folder_is_refused(folder, load, name):
    shutil.copyfile(folder / "member-00.safetensors", folder.parent / "outside.safetensors")
    edit_index(folder, lambda weights: weights.update(dict.fromkeys([k for k in weights if "members.0." in k], name)))
    with pytest.raises(OSError, match=re.escape(repr(name))):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}'])
def test_the_error_names_a_file_that_is_not_an_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors\.index\.json"):
        AutoModel.from_pretrained(folder)


def test_the_error_for_a_bad_config_on_disk_names_the_member_and_the_value(folder):
    config = json.loads((folder / "config.json").read_text())
    config["members"][1]["model_args"]["pretrained"] = True
    (folder / "config.json").write_text(json.dumps(config))
    for load in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=r"members\[1\].*'pretrained'"):
            load.from_pretrained(folder)


def test_the_package_can_be_imported_after_the_auto_classes():
    """As in a notebook that has used transformers already."""
    program = "from transformers import AutoImageProcessor; import concat_ensemble; print(AutoImageProcessor.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "AutoImageProcessor\n", done.stderr
