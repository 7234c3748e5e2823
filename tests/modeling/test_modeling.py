"""What the two models compute, compared with timm and with computations by hand."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from concat_ensemble import (
    ConcatEnsembleConfig,
    ConcatEnsembleForImageClassification,
    ConcatEnsembleImageProcessor,
    ConcatEnsembleModel,
)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def test_features_are_timms_concatenated_in_member_order(build, noise):
    model, (first, second) = build("resnet18", "resnetblur50", cls=ConcatEnsembleModel)
    pixels = noise(model)
    taken = [pixels[:, 0], pixels[:, 1]]  # they differ in crop, so each has a slice
    expected = torch.cat([first(taken[0]), second(taken[1])], dim=1)
    assert torch.equal(model(pixels).pooler_output, expected) and expected.shape == (2, 64 + 256)


@torch.no_grad()
def test_member_features_come_on_request_and_are_the_columns(build, noise):
    model, _ = build("resnet18", "vit-tiny", "grey")
    output = model(noise(model), output_member_features=True)
    assert [part.shape[1] for part in output.member_features] == [64, 192, 64]
    assert torch.equal(torch.cat(output.member_features, 1), output.pooler_output)
    assert model(noise(model)).member_features is None


@torch.no_grad()
def test_return_dict_false_gives_the_same_as_a_tuple(build, noise):
    model, _ = build("resnet18", "resnet50")
    pixels = noise(model)
    (pooled,) = model(pixels, return_dict=False)
    assert torch.equal(pooled, model(pixels).pooler_output)
    pooled, parts = model(pixels, output_member_features=True, return_dict=False)
    assert torch.equal(torch.cat(parts, 1), pooled)


@torch.no_grad()
def test_a_member_with_another_mean_and_std_gets_its_own_normalization(build, photos, timm_features):
    model, backbones = build("resnet18", "resnet50")
    pixels = ConcatEnsembleImageProcessor.from_config(model.config)(photos)["pixel_values"]
    assert pixels.shape == (5, 3, 64, 64)  # one slice for both
    close(model(pixels).pooler_output, torch.cat([timm_features(backbone, photos) for backbone in backbones], 1))


@torch.no_grad()
def test_each_member_sees_its_slice_cropped_to_its_size_and_channels(build):
    model, backbones = build("grey", "convnext", "vit-small", "resnet18")
    slices = torch.full((2, 4, 3, 64, 80), torch.nan)  # a member that reads outside its part gives NaN
    for n, (channels, height, width) in enumerate([(1, 32, 32), (3, 48, 80), (3, 48, 48), (3, 64, 64)]):
        slices[:, n, :channels, :height, :width] = torch.randn(2, channels, height, width)
    expected = [backbones[0](slices[:, 0, :1, :32, :32]), backbones[1](slices[:, 1, :, :48])]
    expected += [backbones[2](slices[:, 2, :, :48, :48]), backbones[3](slices[:, 3, :, :64, :64])]
    assert torch.equal(model(slices).pooler_output, torch.cat(expected, 1))


@pytest.mark.parametrize(
    ("kinds", "shape", "expected"),
    [
        (["resnet18"], (2, 3, 32, 32), r"\(2, 3, 32, 32\).*\(B, 3, 64, 64\)"),
        (["resnet18"], (3, 64, 64), r"\(3, 64, 64\).*\(B, 3, 64, 64\)"),
        (["resnet18"], (2, 1, 3, 64, 64), r"\(B, 3, 64, 64\)"),
        (["grey"], (2, 3, 32, 32), r"\(B, 1, 32, 32\)"),
        (["grey", "resnet18"], (2, 3, 64, 64), r"\(2, 3, 64, 64\).*\(B, 2, 3, 64, 64\)"),
        (["grey", "resnet18"], (2, 1, 3, 64, 64), r"\(B, 2, 3, 64, 64\)"),
    ],
)
def test_the_error_for_pixels_of_the_wrong_shape_says_the_right_one(build, kinds, shape, expected):
    model, _ = build(*kinds)
    with pytest.raises(ValueError, match=expected):
        model(torch.zeros(shape))


def test_a_wrong_number_of_features_is_refused(spec):
    model = ConcatEnsembleModel(ConcatEnsembleConfig(members=[{**spec("resnet18"), "num_features": 63}])).eval()
    with pytest.raises(ValueError, match=r"members\[0\].*\(1, 64\).*\(B, 63\)"):
        model(torch.zeros(1, 3, 64, 64))


def test_a_member_without_pooled_features_is_refused(spec):
    unpooled = spec("resnet18")
    unpooled["model_args"] = {**unpooled["model_args"], "global_pool": ""}
    with pytest.raises(ValueError, match=r"members\[0\].*\(1, 64, 2, 2\).*pooled"):
        ConcatEnsembleModel(ConcatEnsembleConfig(members=[unpooled])).eval()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("model_args", [{"depht": 2}, {"num_heads": 5}, {"depth": "two"}])
def test_the_error_for_model_args_that_timm_refuses_names_the_member_and_the_value(spec, model_args):
    with pytest.raises(ValueError, match=rf"members\[1\].*vit_tiny_patch16_224.*{next(iter(model_args))}"):
        member = {**spec("vit-tiny"), "model_args": model_args}
        ConcatEnsembleModel(ConcatEnsembleConfig(members=[spec("resnet18"), member]))


def test_every_parameter_is_named_after_its_member_with_and_without_a_head(build):
    model, backbones = build("resnet18", "vit-tiny")
    keys = {f"members.{k}.{key}" for k, backbone in enumerate(backbones) for key in backbone.state_dict()}
    assert set(model.state_dict()) == keys
    headed, _ = build("resnet18", "vit-tiny", cls=ConcatEnsembleForImageClassification, num_labels=3, standardize=True)
    assert set(headed.state_dict()) - keys == {"classifier.weight", "classifier.bias", "feature_mean", "feature_scale"}


# --- the classifier -------------------------------------------------------------------------------------------------


def classifier(build, *kinds, **config):
    """A classifier whose head has weights unlike those of a new one."""
    model, _ = build(*kinds, cls=ConcatEnsembleForImageClassification, **config)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if not name.startswith("members."):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def test_logits_and_loss_match_a_computation_by_hand(build, noise):
    model = classifier(build, "resnet18", "resnet50", num_labels=3)
    labels = torch.tensor([2, 0])
    output = model(noise(model), labels=labels)
    logits = output.pooler_output @ model.classifier.weight.T + model.classifier.bias
    close(output.logits, logits, 1e-4)
    close(output.loss, -logits.log_softmax(1)[range(2), labels].mean(), 1e-4)


@torch.no_grad()
def test_standardize_subtracts_the_stored_mean_and_divides_by_the_stored_scale(build, noise):
    model = classifier(build, "resnet18", "grey", num_labels=4, standardize=True)
    pooled = ConcatEnsembleModel.forward(model, noise(model)).pooler_output
    output = model(noise(model))
    by_hand = (pooled - model.feature_mean) / model.feature_scale @ model.classifier.weight.T + model.classifier.bias
    close(output.logits, by_hand, 1e-4)
    assert torch.equal(output.pooler_output, pooled)  # it is the input of the head before it is standardized


@torch.no_grad()
def test_regression_and_multi_label_losses(build, noise):
    model = classifier(build, "resnet18", num_labels=1)
    target = torch.tensor([0.5, 2.0])
    output = model(noise(model), labels=target)
    close(output.loss, ((output.logits[:, 0] - target) ** 2).mean())
    model = classifier(build, "resnet18", num_labels=3, problem_type="multi_label_classification")
    target = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    output = model(noise(model), labels=target)
    close(output.loss, functional.binary_cross_entropy_with_logits(output.logits, target))


@torch.no_grad()
def test_classifier_tuple_is_loss_logits_features(build, noise):
    model = classifier(build, "resnet18", num_labels=3)
    labels = torch.tensor([2, 0])
    output = model(noise(model), labels=labels)
    loss, logits, pooled = model(noise(model), labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert torch.equal(pooled, output.pooler_output)
    assert len(model(noise(model), return_dict=False)) == 2


@pytest.mark.parametrize("labels", [{}, {"num_labels": 0}, {"num_labels": None}, {"id2label": {}}])
def test_a_classifier_without_classes_is_refused(spec, labels):
    with pytest.raises(ValueError, match=r"num_labels.*needs classes"):
        ConcatEnsembleForImageClassification(ConcatEnsembleConfig(members=[spec("resnet18")], **labels))


def test_a_head_needs_all_members(spec):
    config = ConcatEnsembleConfig(members=[spec("resnet18")] * 2, active_members=[0], num_labels=3)
    with pytest.raises(ValueError, match=r"active_members.*ConcatEnsembleModel"):
        ConcatEnsembleForImageClassification(config)


def test_a_new_head_is_small_and_its_bias_zero(build):
    model, _ = build("efficientnet", cls=ConcatEnsembleForImageClassification, num_labels=10, initializer_range=0.3)
    assert model.classifier.weight.std().item() == pytest.approx(0.3, rel=0.05)  # 12,800 numbers
    assert not model.classifier.bias.any()


# --- some members ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("active", [[0], [2], [0, 2], [3, 1]])
def test_active_members_give_their_columns_of_the_same_pixels(build, noise, active):
    kinds = ("resnet18", "grey", "vit-tiny", "resnet50")
    whole, _ = build(*kinds)
    part, _ = build(*kinds, active_members=active)
    parts = whole(noise(whole), output_member_features=True).member_features
    assert torch.equal(part(noise(whole)).pooler_output, torch.cat([parts[k] for k in active], 1))
    assert {key.split(".")[1] for key in part.state_dict()} == set(map(str, active))


@torch.no_grad()
def test_export_active_is_a_whole_renumbered_ensemble_with_equal_features(build, photos):
    part, _ = build("resnet18", "grey", "vit-tiny", "resnet50", active_members=[3, 1])
    whole = part.export_active()
    assert whole.config.active_members is None and not whole.training
    assert [member["architecture"] for member in whole.config.members] == ["resnet50", "resnet10t"]
    assert {key.split(".")[1] for key in whole.state_dict()} == {"0", "1"}
    pixels = [
        ConcatEnsembleImageProcessor.from_config(model.config)(photos)["pixel_values"] for model in (part, whole)
    ]
    assert pixels[1].shape[1] == 2  # only the geometries of these members
    # Before, resnet50's pixels were derived from resnet18's mean and std; now they have its own.
    close(whole(pixels[1]).pooler_output, part(pixels[0]).pooler_output)


def test_export_active_of_a_classifier_leaves_the_head_behind(build, noise):
    model = classifier(build, "resnet18", "resnet50", num_labels=3)
    exported = model.export_active()
    assert not any(key.startswith("classifier") for key in exported.state_dict()) and not exported.config.id2label
    assert torch.equal(exported(noise(model)).pooler_output, model(noise(model)).pooler_output)


# --- training -------------------------------------------------------------------------------------------------------


def batch_norm_statistics(model):
    return {
        key: value.clone() for key, value in model.state_dict().items() if "running_" in key or "num_batches" in key
    }


def test_frozen_members_learn_nothing_and_keep_their_batch_norm_statistics(build, noise):
    model = classifier(build, "resnet18", "regnety", num_labels=3)
    model.freeze_members()
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(noise(model, 4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert model.training and not any(module.training for module in model.members.modules())


def test_unfrozen_members_learn_and_move_their_statistics(build, noise):
    model = classifier(build, "resnet18", "regnety", num_labels=3)
    model.freeze_members()
    model.freeze_members(False)
    model.train()
    before = batch_norm_statistics(model)
    model(noise(model, 4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(torch.equal(value, before[key]) for key, value in batch_norm_statistics(model).items())


@torch.no_grad()
def test_members_frozen_during_training_stop_at_once(build, noise):
    model, _ = build("resnet18")
    model.train()
    model.freeze_members()
    before = batch_norm_statistics(model)
    model(noise(model))
    assert all(torch.equal(value, before[key]) for key, value in batch_norm_statistics(model).items())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_")
def test_gradient_checkpointing_computes_blocks_twice_and_gives_the_same_gradients(build, noise):
    model, _ = build("resnet50", "vit-tiny", "swin", "mobilenetv3")
    blocks = [model.members["0"].layer3[0], model.members["1"].blocks[0], model.members["2"].layers[0].blocks[0]]
    blocks.append(model.members["3"].blocks[1][0])
    calls = []
    for block in blocks:
        # A pre-hook, since the second pass stops as soon as it has computed what is needed.
        block.register_forward_pre_hook(lambda block, _: calls.append(id(block)))

    def gradients():
        calls.clear()
        model.zero_grad()
        model(noise(model)).pooler_output.square().mean().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}, [
            calls.count(id(block)) for block in blocks
        ]

    plain, once = gradients()
    model.gradient_checkpointing_enable()
    again, twice = gradients()
    assert once == [1] * 4 and twice == [2] * 4  # the second time in the backward pass
    assert plain.keys() == again.keys()
    for key in plain:
        close(again[key], plain[key], 1e-6)
    model.gradient_checkpointing_disable()
    assert gradients()[1] == [1] * 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_skips_members_that_do_not_support_it(spec):
    # pit_ti_224 has timm's method, which fails with an assertion.
    pit = {"architecture": "pit_ti_224", "num_features": 256, "preprocessing": spec("resnet18")["preprocessing"]}
    with torch.device("meta"):
        mixed, alone = (ConcatEnsembleModel(ConcatEnsembleConfig(members=m)) for m in ([spec("vit-tiny"), pit], [pit]))
    mixed.gradient_checkpointing_enable()
    assert mixed.members["0"].grad_checkpointing
    with pytest.raises(ValueError, match="does not support"):
        alone.gradient_checkpointing_enable()


@torch.no_grad()
def test_bfloat16_is_near_and_takes_float32_pixels(build, noise, kind):
    model, _ = build(kind, "resnet50")
    expected = model(noise(model)).pooler_output
    actual = model.to(torch.bfloat16)(noise(model)).pooler_output
    assert actual.dtype == torch.bfloat16 and expected.std() > 0
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_a_copy_and_a_pickle_give_the_same_features(build, noise):
    # A Trainer's callbacks copy models, and processes that are started by spawn pickle them.
    model, _ = build("resnet18", "resnet50", "grey")
    expected = model(noise(model)).pooler_output
    assert torch.equal(copy.deepcopy(model)(noise(model)).pooler_output, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(noise(model)).pooler_output, expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_to_one_graph(build, noise):
    model, _ = build("resnet18", "resnet50", "grey", "vit-tiny")
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(noise(model)).pooler_output, model(noise(model)).pooler_output, 1e-4)
