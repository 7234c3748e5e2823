"""An exported file gives PyTorch's outputs without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleForImageClassification, assemble
from concat_ensemble.inference.export import export_onnx, export_program

EXPORTS = pytest.mark.parametrize(("export", "name"), [(export_onnx, "pair.onnx"), (export_program, "pair.pt2")])


@pytest.fixture(scope="session")
def mixed(backbone):
    """A gray ResNet and a ViT with another image size and three channels, with a head."""
    config = assemble([backbone(0), "random:test_vit"]).config.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels = {"id2label": {0: "cat", 1: "dog", 2: "emu"}}
        settings = {"members": config["members"], "standardize": True, **labels}
        model = ConcatEnsembleForImageClassification(ConcatEnsembleConfig(**settings)).eval()
        nn.init.normal_(model.classifier.weight)
    return model


def pixels(model, images):
    return torch.rand(images, *model.config.pixel_shape, generator=torch.Generator().manual_seed(1))


def run_onnx(path, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": batch.numpy()})), strict=True))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_onnx_gives_the_same_outputs_for_any_batch_size(mixed, tmp_path, folded):
    model = assemble([mixed]).fold_batchnorm() if folded else mixed
    path = export_onnx(model, tmp_path / "new" / "mixed.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["mixed.onnx"]
    for images in (1, 2, 7):
        expected, actual = model(pixels(model, images)), run_onnx(path, pixels(model, images))
        assert list(actual) == list(expected)
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_onnx_metadata_hold_the_config(mixed, tmp_path):
    onnx = pytest.importorskip("onnx")
    metadata = {prop.key: prop.value for prop in onnx.load(export_onnx(mixed, tmp_path / "x.onnx")).metadata_props}
    config = ConcatEnsembleConfig(**json.loads(metadata["config"]))
    assert config.members == mixed.config.members and config.id2label == {0: "cat", 1: "dog", 2: "emu"}


@pytest.mark.slow
def test_weights_too_large_for_one_onnx_file_are_stored_beside_it(ensemble, tmp_path, monkeypatch):
    # torch's own limit is 1.5 GB
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    path = export_onnx(ensemble, tmp_path / "x.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"x.onnx", "x.onnx.data"}
    actual = run_onnx(path, pixels(ensemble, 3))["pooler_output"]
    torch.testing.assert_close(actual, ensemble(pixels(ensemble, 3)).pooler_output, atol=1e-4, rtol=0)


RUN = """
import sys, torch
batch, program = torch.load("batch.pt"), torch.export.load("mixed.pt2").module()
torch.save(program(batch), "outputs.pt")
assert not {"concat_ensemble", "timm", "transformers"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_program_runs_on_pytorch_alone(mixed, tmp_path):
    export_program(mixed, tmp_path / "mixed.pt2")
    torch.save(pixels(mixed, 4), tmp_path / "batch.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, check=True)
    expected = mixed(pixels(mixed, 4), return_dict=False)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), expected, atol=1e-5, rtol=0)


class Noisy(nn.Module):
    def forward(self, pixels):
        return pixels.mean((2, 3)) * self.scale + torch.rand(pixels.shape[0], 1)


class Undecided(nn.Module):
    def forward(self, pixels):
        return pixels.mean((2, 3)) * self.scale if pixels.sum() > 0 else pixels.amax((2, 3))


def of_one(module, ensemble):
    """An ensemble with `module` as its only member."""
    config = ConcatEnsembleConfig(members=[{**ensemble.config.members[0], "num_features": 1}])
    model = type(ensemble)(config).eval()
    module.scale = nn.Parameter(torch.ones(1))
    model.members["0"] = module.eval()
    return model


@pytest.mark.slow
@EXPORTS
def test_outputs_that_differ_are_refused_and_the_old_file_stays(ensemble, tmp_path, export, name):
    (tmp_path / name).write_text("older")
    with pytest.raises(ValueError, match=r"from PyTorch's outputs, more than 1"):
        export(of_one(Noisy(), ensemble), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "older"
    export(of_one(Noisy(), ensemble), tmp_path / name, check=False)
    assert (tmp_path / name).stat().st_size > 100


@pytest.mark.slow
@EXPORTS
def test_a_member_that_has_no_graph_is_refused_in_one_line(ensemble, tmp_path, export, name):
    with pytest.raises(ValueError, match=r"this ensemble") as refusal:
        export(of_one(Undecided(), ensemble), tmp_path / name)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_the_error_names_the_extra_to_install(ensemble, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # how Python itself says that it is not to be imported
    with pytest.raises(ValueError, match=r"pip install 'concat-ensemble\[export\]'"):
        export_onnx(ensemble, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@EXPORTS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), r"call eval\(\)"),
        (lambda model: model.to(torch.bfloat16), r"bfloat16.*model\.float\(\)"),
        (lambda model: model.to("meta"), r"on meta.*model\.float\(\)\.cpu\(\)"),
    ],
)
def test_a_model_in_another_state_is_refused(backbone, tmp_path, export, name, change, message):
    with pytest.raises(ValueError, match=message):
        export(change(assemble([backbone(0)])), tmp_path / name)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        export(assemble([backbone(0)]), tmp_path)


@pytest.mark.slow
def test_the_command_writes_both_formats_and_replaces_them_only_with_overwrite(run, refused, folder):
    for name in ("pair.onnx", "pair.pt2"):
        code, out, err = run("export", "pair", "--output", name)
        assert code == 0 and out.startswith(f"{name}: ") and err == ""
        refused(["export", "pair", "--output", name], f"{name} is there already", "--overwrite")
        assert run("export", "pair", "--output", name, "--overwrite", "--quiet") == (0, "", "")


@pytest.mark.slow
def test_the_command_exports_bfloat16_with_its_head(run, mixed, tmp_path):
    mixed.save_pretrained(tmp_path / "mixed")
    for file in (tmp_path / "mixed").glob("*.safetensors"):
        save_file({key: t.to(torch.bfloat16) for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert run("export", "mixed", "-o", "x.onnx")[0] == 0
    actual = run_onnx(tmp_path / "x.onnx", pixels(mixed, 2))
    expected = mixed(pixels(mixed, 2))
    assert list(actual) == ["logits", "pooler_output"]
    assert (actual["logits"] - expected.logits).norm() < 0.05 * expected.logits.norm()


def test_the_command_refuses(refused, folder, tmp_path):
    (tmp_path / "there.onnx").write_text("something")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "resnet"}')
    refused(["export", "nonesuch", "-o", "x.onnx"], "no such folder: nonesuch")
    refused(["export", "other", "-o", "x.onnx"], "other holds no ensemble", "concat-ensemble build")
    refused(["export", "pair", "-o", "x.onxx"], "--output x.onxx", ".onnx", ".pt2")
    refused(["export", "pair", "-o", "there.onnx"], "there.onnx is there already", "--overwrite")
    refused(["export", "pair", "-o", "pair"], ".onnx")
    refused(["export", "pair", "-o", "/proc/nonesuch/x.onnx"], "/proc", "--output")
