"""Feature maps of the members' layers, with `output_hidden_states`."""

import pytest
import torch
from transformers import AutoModel, Trainer, TrainingArguments

from concat_ensemble import ConcatEnsembleForImageClassification

PAIR = ("resnet18", "vit-tiny")


@pytest.mark.parametrize("layers", [True, [-1], [1, -1]])
@torch.no_grad()
def test_they_are_timms_feature_maps_in_member_order(build, noise, layers):
    model, backbones = build("resnet18", "resnet50")
    pixels = noise(model)
    output = model(pixels, output_hidden_states=layers)
    indices = None if layers is True else layers
    inputs = [pixels, model._member_pixels["1"](pixels)]
    maps = [
        backbone.forward_intermediates(x, indices=indices)[1] for backbone, x in zip(backbones, inputs, strict=True)
    ]
    expected = maps[0] + maps[1]
    assert len(output.hidden_states) == (10 if layers is True else 2 * len(layers)) == len(expected)
    assert all(map(torch.equal, output.hidden_states, expected))
    assert torch.equal(output.pooler_output, model(pixels).pooler_output)
    assert model(pixels).hidden_states is None and model(pixels, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_pooled_features_stay_the_same_bit_for_bit(build, noise, kind):
    model, _ = build(kind)
    output = model(noise(model), output_hidden_states=True)
    assert torch.equal(output.pooler_output, model(noise(model)).pooler_output)
    assert output.hidden_states and all(each.ndim == 4 for each in output.hidden_states)


@torch.no_grad()
def test_members_of_several_geometries_and_some_members_only(build, noise, tmp_path):
    model, _ = build("vit-tiny", "grey")
    pixels = noise(model)
    maps = model(pixels, output_hidden_states=True).hidden_states
    model.save_pretrained(tmp_path)
    part = AutoModel.from_pretrained(tmp_path, active_members=[1], output_hidden_states=True)
    assert part.config.output_hidden_states  # as for any model of transformers
    assert all(map(torch.equal, part(pixels).hidden_states, maps[2:])) and len(maps) == 2 + 5
    assert part(pixels, output_hidden_states=False).hidden_states is None


def test_a_classifier_returns_them_with_their_gradients(build, noise):
    model, _ = build(*PAIR, cls=ConcatEnsembleForImageClassification, num_labels=3)
    output = model(noise(model), labels=torch.tensor([0, 2]), output_hidden_states=[0])
    resnet, vit = output.hidden_states
    assert (resnet.shape[2:], vit.shape[2:]) == ((32, 32), (2, 2))
    resnet.retain_grad()
    (output.loss + vit.square().mean()).backward()  # a loss on the tokens as a map, too
    assert resnet.grad.abs().sum() > 0 and model.members["1"].blocks[0].mlp.fc2.weight.grad.abs().sum() > 0
    values = model(noise(model), output_hidden_states=[0], return_dict=False)
    assert len(values) == 3 and isinstance(values[2], tuple)  # logits, pooled features, hidden states


def test_trainer_predicts_logits_alone_whatever_the_config_says(build, noise, tmp_path):
    model, _ = build("resnet18", cls=ConcatEnsembleForImageClassification, num_labels=3)
    model.config.output_hidden_states = True
    rows = [{"pixel_values": pixels, "labels": 1} for pixels in noise(model, 3)]
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    assert trainer.predict(rows).predictions.shape == (3, 3)


@pytest.mark.parametrize("layers", [[99], [-99]])
def test_the_error_for_a_layer_that_a_member_lacks_names_both(build, noise, layers):
    model, _ = build(*PAIR)
    with pytest.raises(ValueError, match=r"members\[0\]: timm's ResNet refuses output_hidden_states=\[-?99\]"):
        model(noise(model), output_hidden_states=layers)


def test_token_embeddings_are_none_and_cannot_be_set(build):
    model, _ = build("resnet18")
    assert model.get_input_embeddings() is None and model.get_output_embeddings() is None
    with pytest.raises(NotImplementedError, match="takes images"):
        model.set_input_embeddings(torch.nn.Embedding(2, 2))
