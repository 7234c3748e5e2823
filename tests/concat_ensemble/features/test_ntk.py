"""Gradients against a loop over the images with plain autograd; hashing against the bound in its docstring."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTModel

from concat_ensemble import (
    ConcatEnsembleImageProcessor,
    KNNProbe,
    LinearProbe,
    PrototypeProbe,
    RidgeProbe,
    assemble,
    extract_features,
)
from concat_ensemble.data.images import read_image
from concat_ensemble.features.extractor import is_ensemble
from concat_ensemble.features.ntk import NTK, NTKFeatures
from concat_ensemble.features.table import FeatureTable

ARCHITECTURES = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3},
    "efficientnet_b0": {},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request):
    """An ensemble of one member, in evaluation mode with BatchNorm statistics of its own, and 4 of its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels = {"input_size": (3, 32, 32)}
        member = timm.create_model(
            request.param, num_classes=0, pretrained_cfg_overlay=pixels, **ARCHITECTURES[request.param]
        )
        member.train()(torch.randn(16, 3, 32, 32))
        levels = torch.linspace(-1, 1, 4)[:, None, None, None]
        return assemble(member.eval()), torch.randn(4, 3, 32, 32) * (1 + levels) + levels


def naive_gradients(member, pixels, seed=0, head=None):
    """(n, P) by a loop: d f(x) / d theta, with f(x) the pooled features of x times a head of norm 1."""
    rows = []
    for n in range(len(pixels)):
        output = member(pixels[n : n + 1])
        pooled = getattr(output, "pooler_output", output)[0]
        if head is None:
            head = np.random.default_rng([seed, 1]).normal(size=len(pooled))
            head /= np.linalg.norm(head)
        gradients = torch.autograd.grad(pooled @ torch.tensor(head, dtype=torch.float32), list(member.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows).double().numpy()


def naive_hash(member, rows, dim, seed=0):
    """(n, `dim`) float64: each parameter added with its sign to its column."""
    rng = np.random.default_rng(seed)
    columns = np.concatenate([rng.integers(2 * dim, size=weight.numel()) for weight in member.parameters()])
    signed = rows * np.where(columns < dim, 1, -1)
    return np.stack([np.bincount(columns % dim, row, minlength=dim) for row in signed])


def exact_kernels(model, pixels, ntk=None):
    """(n, n) float64 of each member: inner products of the whole gradients, nothing hashed, summed over outputs."""
    members = list(model.members.values()) if is_ensemble(model) else [model]
    kernels = []
    for member, own in zip(members, (ntk or NTK()).for_members(model), strict=True):
        chunks = ([part for output in chunk for part in output] for chunk in own._gradients(member, pixels))
        parts = [torch.cat(parts).flatten(1).double() for parts in zip(*chunks, strict=True)]
        kernels.append(sum(part @ part.T for part in parts).numpy())
    return kernels


def exact_kernel(model, pixels, ntk=None):
    """(n, n) empirical neural tangent kernel of the concatenation (arXiv:2506.18221, section 2)."""
    return np.sum(exact_kernels(model, pixels, ntk), axis=0)


def kernel_features(kernel, fitted, seed=0):
    """(n, rank <= m) rows whose inner products with those of the m images of the mask `fitted` are the kernel's.

    With the eigendecomposition K = V diag(l) V' of these images' kernel, a row is k(x, these) V diag(l)^(-1/2) Q.
    Q is a random rotation: without it, standardizing the columns would whiten them.
    """
    values, vectors = np.linalg.eigh(kernel[fitted][:, fitted])
    positive = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(positive.sum(), positive.sum())))
    roots = vectors[:, positive] / np.sqrt(values[positive])
    return (kernel[:, fitted] @ roots @ rotation).astype(np.float32)


@pytest.fixture(scope="module")
def kernel_table(ensemble, digits):
    """The exact kernel as features for every probe: what the hashed gradients approximate."""
    pixels = torch.cat([pixels_of(ensemble, digits[split]) for split in digits])
    splits = np.repeat(list(digits), [len(digits[split]) for split in digits])
    blocks = [kernel_features(kernel, splits != "test") for kernel in exact_kernels(ensemble, pixels)]
    return FeatureTable(
        {split: [block[splits == split] for block in blocks] for split in digits},
        {split: np.array(digits[split]["label"][:]) for split in digits},
        digits["train"].features["label"].names,
    )


def assert_near(rows, expected, relative):
    np.testing.assert_array_less(
        np.linalg.norm(rows - expected, axis=1), relative * np.linalg.norm(expected, axis=1) + 1e-30
    )


@pytest.mark.parametrize("images_at_a_time", [1, 64])
def test_rows_equal_those_of_the_naive_loop(network, images_at_a_time):
    model, pixels = network
    member = model.members["0"]
    ntk = NTK(dim=64, memory=1 if images_at_a_time == 1 else 4 << 30)
    expected = naive_hash(member, naive_gradients(member, pixels), 64)
    assert_near(ntk.features(member, pixels).numpy(), expected, 1e-5)


def test_hashed_gradients_of_networks_keep_inner_products(network):
    """Johnson-Lindenstrauss: n points in dim >= 4 ln n / (e^2 / 2 - e^3 / 3) columns keep their geometry up to e
    (Dasgupta and Gupta 2003)."""
    model, pixels = network
    kernel, rows = exact_kernel(model, pixels), NTK(dim=1024).features(model.members["0"], pixels).double().numpy()
    allowed = next(e for e in np.arange(0.01, 1, 0.001) if 4 * np.log(len(rows)) / (e**2 / 2 - e**3 / 3) <= 1024)
    assert allowed < 0.13
    norms = np.sqrt(np.diag(kernel))
    assert (np.abs(rows @ rows.T - kernel) <= allowed * np.outer(norms, norms)).all()


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 2_000), st.sampled_from([1, 7, 64]), st.floats(0, 4))
def test_hashing_has_the_documented_mean_and_variance(seed, num_parameters, dim, heavy):
    """For rows with few large numbers too (`heavy`), over 400 seeds of S."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, num_parameters)) * rng.random(num_parameters) ** heavy
    x, y = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    hashed = [NTK(dim=dim, seed=s)._hash([[torch.tensor(np.stack([x, y]))]]) for s in range(400)]
    errors = np.array([float(a @ b) for a, b in hashed]) - x @ y
    bound = (1 + (x @ y) ** 2) / dim
    assert bound <= 2 / dim and abs(errors.mean()) < 5 * np.sqrt(bound / 400)
    assert errors.var() < 1.6 * bound


def test_the_exact_kernel_equals_that_of_the_naive_loop(network):
    model, pixels = network
    rows = naive_gradients(model.members["0"], pixels)
    for memory in (4 << 30, 50 << 20):  # all images at once; in chunks
        kernel = exact_kernel(model, pixels, NTK(memory=memory))
        np.testing.assert_allclose(kernel, rows @ rows.T, rtol=1e-5, atol=1e-5 * np.abs(rows @ rows.T).max())


@pytest.fixture(scope="module")
def gradients(ensemble, digits):
    return extract_features(ensemble, digits, ntk=NTK(dim=48), quiet=True)


def pixels_of(model, split):
    return ConcatEnsembleImageProcessor.from_config(model.config)(
        [read_image(split, n) for n in range(len(split))], return_tensors="pt"
    )["pixel_values"]


def test_a_table_has_a_block_of_gradients_per_member(ensemble, digits, gradients, table):
    pixels = pixels_of(ensemble, digits["test"])
    expected = [naive_hash(m, naive_gradients(m, pixels), 48) for m in ensemble.members.values()]
    assert gradients.feature_dims == [48, 48] and list(gradients) == list(table)
    assert_near(gradients["test"].features, np.hstack(expected), 1e-5)
    assert gradients["test"].labels.tolist() == table["test"].labels.tolist()
    assert not set(gradients.keys) & set(table.keys)
    assert all(weight.grad is None and weight.requires_grad for weight in ensemble.parameters())


def test_the_fields_of_a_blocks_key_are_those_of_version_0_1_0(ensemble):
    head = np.arange(32) / 32
    expected = {"ntk": {"dim": 48, "parameters": "conv", "seed": 3, "head": (np.arange(16, 32) / 32).tolist()}}
    assert NTKFeatures(NTK(48, "conv", 3, head), ensemble).key_fields(1) == expected


def test_settings_and_members_decide_what_is_stored(backbone, ensemble, digits, gradients):
    def extracted(model, **own):
        return extract_features(model, digits, ntk=NTK(**{"dim": 48} | own), quiet=True).extracted

    assert extracted(ensemble, memory=10**6) == 0  # how rows are computed is no part of their key
    assert extracted(backbone(1)) == 0
    assert extract_features(ensemble, digits, quiet=True).extracted == 0
    for other in ({"dim": 47}, {"seed": 1}, {"parameters": "conv"}, {"head": np.ones(32)}):
        assert extracted(ensemble, **other) == sum(map(len, digits.values()))
    assert extracted(backbone(0), head=np.ones(16)) == 0


@pytest.mark.parametrize("probe", [LinearProbe, RidgeProbe, KNNProbe, PrototypeProbe])
@pytest.mark.parametrize("exact", [False, True])
def test_every_probe_takes_them(probe, exact, gradients, kernel_table):
    table = kernel_table if exact else gradients
    fitted = probe().fit(table["train"], validation=table["validation"])
    assert fitted.score(table["test"]) > 0.6  # of three classes


def test_a_kernel_table_has_the_kernels_inner_products(ensemble, digits, kernel_table):
    rows = {split: kernel_table[split].features.astype(float) for split in kernel_table}
    pixels = torch.cat([pixels_of(ensemble, digits[split]) for split in digits])
    kernel = exact_kernel(ensemble, pixels)
    fitted = np.concatenate([rows["train"], rows["validation"]])
    everything = np.concatenate([fitted, rows["test"]])
    expected = kernel[:, : len(fitted)]
    np.testing.assert_allclose(everything @ fitted.T, expected, atol=1e-5 * np.abs(expected).max())


def test_the_head_of_a_probe_is_used(ensemble, digits, table):
    """d logit / d theta, by the chain rule through standardization."""
    probe = RidgeProbe().fit(table["train"], validation=table["validation"])
    pixels = pixels_of(ensemble, digits["test"])
    heads = np.split(probe.coef_[2] / probe.scale_, 2)
    kernel = exact_kernel(ensemble, pixels, NTK(head=np.concatenate(heads)))
    members = zip(ensemble.members.values(), heads, strict=True)
    rows = np.hstack([naive_gradients(member, pixels, head=head) for member, head in members])
    np.testing.assert_allclose(kernel, rows @ rows.T, atol=1e-5 * np.abs(rows @ rows.T).max())


def test_the_kernel_of_several_outputs_is_the_sum_of_theirs(ensemble, digits):
    heads = np.random.default_rng(0).normal(size=(3, 32))
    pixels = pixels_of(ensemble, digits["test"])[:6]
    expected = sum(exact_kernel(ensemble, pixels, NTK(head=head)) for head in heads)
    np.testing.assert_allclose(exact_kernel(ensemble, pixels, NTK(head=heads)), expected, rtol=1e-4)
    settings = NTK(dim=4_000, head=heads).for_members(ensemble)
    members = zip(settings, ensemble.members.values(), strict=True)
    rows = np.hstack([own.features(member, pixels).numpy() for own, member in members])
    np.testing.assert_allclose(rows @ rows.T, expected, atol=0.15 * np.abs(expected).max())


def test_only_selected_parameters_count(ensemble, digits):
    pixels = pixels_of(ensemble, digits["test"])[:3]
    parts = [exact_kernel(ensemble, pixels, NTK(parameters=p)) for p in ("", r"layer4", r"^(?!layer4)")]
    np.testing.assert_allclose(parts[0], parts[1] + parts[2], rtol=1e-5)


def test_a_transformers_model_has_gradients_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(4, 3, 16, 16)
    rows = naive_gradients(model, pixels)
    expected = naive_hash(model, rows, 32)
    assert_near(NTK(dim=32).features(model, pixels).numpy(), expected, 1e-5)
    np.testing.assert_allclose(exact_kernel(model, pixels), rows @ rows.T, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 0}, "dim=0 .* integer of at least 1"),
        ({"dim": 8.0}, "dim=8.0 .* integer"),
        ({"parameters": "("}, r"parameters='\(' .* regular expression"),
        ({"parameters": "attn"}, "parameters='attn' .* resnet10t: conv1.0.weight"),
        ({"head": [1.0, 2.0]}, "head has 2 weights; .* 32"),
        ({"head": [np.nan]}, "head must be .* finite numbers"),
        ({"head": np.zeros((2, 2, 2))}, "head must be rows of finite numbers"),
        ({"head": np.zeros((3, 31))}, "head has 31 weights; .* 32"),
    ],
)
def test_wrong_settings_are_refused(wrong, message, ensemble, digits):
    with pytest.raises(ValueError, match=message):
        extract_features(ensemble, digits, ntk=NTK(**wrong), quiet=True)


def test_gradients_are_not_computed_in_bfloat16(ensemble, digits):
    with pytest.raises(ValueError, match=r"compute=torch.bfloat16.* torch.float32"):
        extract_features(ensemble, digits, ntk=NTK(), compute=torch.bfloat16, quiet=True)


def test_an_architecture_without_gradients_per_image_is_named(backbone, digits):
    model = assemble(backbone(0))
    model.members["0"].set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"resnet10t .*turn gradient checkpointing off"):
        extract_features(model, digits, ntk=NTK(), quiet=True)


MEMORY = """
import resource, tempfile, timm
from pathlib import Path
from concat_ensemble import assemble, extract_features, load_data
from concat_ensemble.features.extractor import is_ensemble
from concat_ensemble.features.ntk import NTK
channels = (32, 64, 128, 256)
model = timm.create_model("resnet10t", channels=channels, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
for limit in (40, 400):
    store = tempfile.TemporaryDirectory()
    extract_features(model, load_data("digits", limit=limit), ntk=NTK(dim=8, memory=100 << 20), store=Path(store.name))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images():
    """The gradients of 1,200 images would be 6 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < few + 100, f"{few} MB for 120 images, {many} MB for 1,200"
