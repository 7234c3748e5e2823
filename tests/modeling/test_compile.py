"""An ensemble is one graph for `torch.compile`, without graph breaks, and for `torch.export`."""

import pytest
import torch

from concat_ensemble import ConcatEnsembleForImageClassification, ConcatEnsembleModel

pytestmark = pytest.mark.slow

ENSEMBLES = {
    "same size": ("resnet18", "resnet18"),
    "another mean and std": ("resnet18", "resnet50"),
    "mixed geometries": ("resnet18", "resnetblur50", "grey"),
    "mixed architectures": ("resnet18", "vit-tiny"),
}
HEAD = {"cls": ConcatEnsembleForImageClassification, "num_labels": 3, "standardize": True}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_compiled_ensemble_is_one_graph_with_equal_features(build, noise, name):
    model, _ = build(*ENSEMBLES[name])
    actual = torch.compile(model, fullgraph=True)(noise(model)).pooler_output
    close(actual, model(noise(model)).pooler_output)


@torch.no_grad()
def test_the_classifier_compiles_with_its_loss(build, noise):
    model, _ = build(*ENSEMBLES["mixed architectures"], **HEAD)
    labels = torch.tensor([2, 0])
    actual, expected = (
        torch.compile(model, fullgraph=True)(noise(model), labels=labels),
        model(noise(model), labels=labels),
    )
    for key in ("loss", "logits", "pooler_output"):
        close(actual[key], expected[key])


@torch.no_grad()
def test_member_features_and_tuples_compile(build, noise):
    model, _ = build(*ENSEMBLES["mixed architectures"])
    compiled = torch.compile(model, fullgraph=True)
    pooled, parts = compiled(noise(model), output_member_features=True, return_dict=False)
    assert torch.equal(torch.cat(parts, 1), pooled)
    close(pooled, model(noise(model)).pooler_output)


@torch.no_grad()
def test_folded_bfloat16_and_channels_last_compile(build, noise):
    model, _ = build(*ENSEMBLES["mixed architectures"])
    expected = model(noise(model)).pooler_output
    model.fold_batchnorm().to(memory_format=torch.channels_last)
    close(torch.compile(model, fullgraph=True)(noise(model)).pooler_output, expected)
    model.to(torch.bfloat16)
    actual = torch.compile(model, fullgraph=True)(noise(model)).pooler_output
    assert actual.dtype == torch.bfloat16 and (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_gradients_come_through_a_compiled_ensemble(build, noise):
    model, _ = build("grey", "vit-tiny", **HEAD)
    labels = torch.tensor([2, 0])
    gradients = []  # two small members, since backward takes the longest to compile
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(noise(model), labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected)


@torch.no_grad()
def test_all_fourteen_side_by_side_are_one_graph_for_any_batch(build, noise, kinds):
    model, _ = build(*kinds)
    # Only the capture is tested: one graph for a fixed batch size and one for any, and no third.
    compiled = torch.compile(model.to(torch.bfloat16), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for images in (2, 3, 5):
            assert torch.equal(compiled(noise(model, images)).pooler_output, model(noise(model, images)).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, HEAD], ids=["features", "logits"])
def test_torch_export_takes_any_batch(build, noise, settings):
    model, _ = build(*ENSEMBLES["mixed geometries"], **settings)
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": noise(model)}, dynamic_shapes=batch)
    for images in (1, 5):
        actual = program.module()(pixel_values=noise(model, images))
        assert isinstance(actual, type(model(noise(model)))) and set(actual) == set(model(noise(model)))
        close(actual.to_tuple()[0], model(noise(model, images)).to_tuple()[0])


def test_a_compiled_model_can_be_saved(build, tmp_path):
    model, _ = build("resnet18")
    torch.compile(model, fullgraph=True).save_pretrained(tmp_path)
    assert ConcatEnsembleModel.from_pretrained(tmp_path).state_dict().keys() == model.state_dict().keys()
