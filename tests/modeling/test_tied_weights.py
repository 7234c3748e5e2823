"""Networks that use a layer repeatedly, such as CoaT: each weight is saved once and stays one after loading."""

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModel, AutoModelForImageClassification

from concat_ensemble import ConcatEnsembleForImageClassification, assemble
from concat_ensemble.members.checkpoints import load_backbone, weights_sha256

FIRST, SECOND, THIRD = (f"{layer}proj.weight" for layer in ("cpe1.", "serial_blocks1.0.cpe.", "serial_blocks1.1.cpe."))


@pytest.fixture
def tied(build):
    """A ResNet and a CoaT."""
    return build("resnet18", "coat")[0]


@torch.no_grad()
def features(model, pixels):
    return model(pixels).pooler_output


def assert_tied(member):
    weights = {name: member.get_parameter(name) for name in (FIRST, SECOND, THIRD)}
    assert weights[FIRST] is weights[SECOND] is weights[THIRD]


def read_folder(folder) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("size", "arguments"), [("50GB", {}), ("20KB", {"device_map": {"": "cpu"}}), ("50GB", {"device_map": "auto"})]
)
def test_each_weight_is_saved_once_and_loads_bit_for_bit(tied, noise, tmp_path, size, arguments):
    tied.save_pretrained(tmp_path, max_shard_size=size)
    stored = read_folder(tmp_path)
    assert len({id(weight) for weight in tied.state_dict(keep_vars=True).values()}) == len(stored)
    assert f"members.1.{FIRST}" in stored and f"members.1.{SECOND}" not in stored
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert torch.equal(features(loaded, noise(tied)), features(tied, noise(tied)))
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert_tied(loaded.members["1"])
    assert loaded.all_tied_weights_keys[f"members.1.{THIRD}"] == f"members.1.{FIRST}"


def test_with_a_head_a_step_of_training_moves_all_names_and_is_saved(build, noise, tmp_path):
    build("coat", cls=ConcatEnsembleForImageClassification, num_labels=3)[0].save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).train()
    before = model.members["0"].get_parameter(FIRST).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(noise(model), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    assert_tied(model.members["0"])
    assert not torch.equal(model.members["0"].get_parameter(THIRD), before)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(noise(model)).logits, model(noise(model)).logits)


def test_adapters_are_put_into_members_with_and_without_tied_weights(tied, noise, tmp_path):
    peft = pytest.importorskip("peft")
    before = features(tied, noise(tied))
    adapted = peft.get_peft_model(tied, peft.LoraConfig(target_modules=["qkv", "fc1", "conv1"]))
    assert torch.equal(features(adapted, noise(tied)), before)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), noise(tied)), features(merged, noise(tied)))


def test_one_member_alone_is_loaded_exported_and_saved(tied, noise, tmp_path):
    tied.save_pretrained(tmp_path)
    part = AutoModel.from_pretrained(tmp_path, active_members=[1])
    part.export_active().save_pretrained(tmp_path / "part")
    loaded = AutoModel.from_pretrained(tmp_path / "part")
    assert_tied(loaded.members["0"])
    pixels = noise(loaded)
    with torch.no_grad():
        assert torch.equal(features(loaded, pixels), tied.members["1"](pixels))


# The three names as an older or another program may store them: all, or another one than ours.
STORED = {"all": (FIRST, SECOND, THIRD), "another": (THIRD,), "two": (SECOND, THIRD)}


def foreign_tensors(state_dict, names, prefix=""):
    left_out = {prefix + name for name in (FIRST, SECOND, THIRD)} - {prefix + name for name in names}
    return {key: tensor.clone() for key, tensor in state_dict.items() if key not in left_out}


def write_foreign_folder(model, tensors, folder):
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("names", STORED.values(), ids=STORED)
def test_a_folder_may_store_any_of_the_names(tied, noise, tmp_path, names, safe):
    write_foreign_folder(tied, foreign_tensors(tied.state_dict(), names, "members.1."), tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
    loaded = AutoModel.from_pretrained(tmp_path, use_safetensors=safe)
    assert torch.equal(features(loaded, noise(tied)), features(tied, noise(tied)))
    assert_tied(loaded.members["1"])
    loaded.save_pretrained(tmp_path / "again")
    assert len(read_folder(tmp_path / "again")) < len(tied.state_dict())


@pytest.mark.parametrize("safe", [True, False])
def test_a_weight_without_any_of_its_names_is_missing(tied, tmp_path, safe):
    write_foreign_folder(tied, foreign_tensors(tied.state_dict(), (), "members.1."), tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"3 missing .*members\.1\.cpe1\.proj\.weight"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=safe)


def test_names_of_one_weight_with_two_values_are_refused(tied, tmp_path):
    tensors = foreign_tensors(tied.state_dict(), STORED["all"])
    tensors[f"members.1.{SECOND}"] += 1
    write_foreign_folder(tied, tensors, tmp_path)
    with pytest.raises(ValueError, match=r"members\.1\.serial_blocks1\.0\.cpe\.proj\.weight .*must equal"):
        AutoModel.from_pretrained(tmp_path)


def test_assemble_copies_a_model_in_memory_and_an_ensemble_with_their_ties(backbone, noise, tmp_path):
    coat = backbone("coat")
    ensemble = assemble([assemble([coat])])
    assert_tied(ensemble.members["0"])
    pixels = noise(ensemble)
    with torch.no_grad():
        assert torch.equal(features(ensemble, pixels), coat(pixels))
    # Hashes stored before weights were saved once are over all names.
    assert ensemble.config.members[0]["provenance"]["weights_sha256"] == weights_sha256(coat.state_dict())


@pytest.mark.parametrize("names", STORED.values(), ids=STORED)
def test_a_checkpoint_may_store_any_of_the_names(backbone, names):
    trained, new = backbone("coat", 0), backbone("coat", 1)
    load_backbone(new, foreign_tensors(trained.state_dict(), names), "the file")
    assert_tied(new)
    assert weights_sha256(new.state_dict()) == weights_sha256(trained.state_dict())


def test_a_checkpoint_without_a_weight_or_with_two_values_is_refused(backbone):
    coat = backbone("coat")
    with pytest.raises(ValueError, match=r"the file .*missing: cpe1\.proj\.weight"):
        load_backbone(coat, foreign_tensors(coat.state_dict(), ()), "the file")
    tensors = foreign_tensors(coat.state_dict(), STORED["all"])
    tensors[SECOND] += 1
    with pytest.raises(ValueError, match=r"tied but unequal: .*proj\.weight"):
        load_backbone(coat, tensors, "the file")


def test_a_file_that_stores_each_weight_once_becomes_a_member(tmp_path):
    coat = assemble("random:coat_tiny").members["0"]
    save_model(coat, str(tmp_path / "coat_tiny.safetensors"))  # safetensors' own way with tied weights
    ensemble = assemble(tmp_path / "coat_tiny.safetensors")
    assert_tied(ensemble.members["0"])
    assert weights_sha256(ensemble.members["0"].state_dict()) == weights_sha256(coat.state_dict())
