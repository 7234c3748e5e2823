"""Layouts of the paper's systems: small original architectures with random weights, saved as their authors save them,
must give the same features as timm's architectures after conversion.
"""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from concat_ensemble import ConcatEnsembleModel
from concat_ensemble.members.checkpoints import PICKLES, load_backbone, read_checkpoint
from concat_ensemble.members.converters import (
    convert,
    from_swav,
    from_timecat,
    from_vissl,
    from_wide_resnet,
    load_jax_vit,
)
from concat_ensemble.members.ensemble_recipes import ENSEMBLES, ensemble_recipe
from concat_ensemble.modeling.configuration_concat_ensemble import timm_architectures
from concat_ensemble.recipe_files import recipe_names

PROVENANCE = {"pretraining_data", "objective", "steps", "seed", "license"}


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def filled(model, seed=0):
    """Fill all tensors with random numbers, so that a lost one is noticed; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
                is_scale = key.endswith("weight") and tensor.ndim == 1
                tensor.copy_(1 + noise.abs() if key.endswith("var") else scale * noise + is_scale)
    return model.eval()


# --- the original architectures --------------------------------------------------------------------------------------


class Block(nn.Module):
    """ResNet v1.5's: the 3x3 convolution strides."""

    def __init__(self, width_in, width, stride, names):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or width_in != 4 * width:
            self.downsample.add_module(names[0], nn.Conv2d(width_in, 4 * width, 1, stride, bias=False))
            self.downsample.add_module(names[1], nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class OriginalResNet(nn.Module):
    """AlgoPerf's with `names=("conv", "bn")`; SwAV's pads its stem in two steps."""

    def __init__(self, stem=64, width=8, depths=(2, 1, 1, 1), names=("0", "1"), swav=False):
        super().__init__()
        self.swav = swav
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 2 if swav else 3, bias=False), nn.BatchNorm2d(stem)
        width_in = stem
        for stage, depth in enumerate(depths):
            blocks = nn.Sequential()
            for n in range(depth):
                blocks.append(Block(width_in, width << stage, 2 if stage and not n else 1, names))
                width_in = 4 * (width << stage)
            self.add_module(f"layer{stage + 1}", blocks)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(F.pad(x, (1, 1, 1, 1)) if self.swav else x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Transform(nn.Module):
    """ClassyVision's bottleneck with squeeze and excitation."""

    def __init__(self, width_in, width, stride, group):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        conv = nn.Conv2d(width, width, 3, stride, 1, groups=width // group, bias=False)
        self.b = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        squeezed = round(0.25 * width_in)
        self.se = nn.Module()
        self.se.excitation = nn.Sequential(nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1))
        self.c, self.final_bn = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.b(self.a(x))
        return self.final_bn(self.c(x * self.se.excitation(x.mean((2, 3), keepdim=True)).sigmoid()))


class RegNetBlock(nn.Module):
    def __init__(self, width_in, width, stride, group):
        super().__init__()
        self.has_projection = stride > 1 or width_in != width
        if self.has_projection:
            self.proj, self.bn = nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        self.f = Transform(width_in, width, stride, group)

    def forward(self, x):
        return F.relu((self.bn(self.proj(x)) if self.has_projection else x) + self.f(x))


class OriginalRegNetY(nn.Module):
    """VISSL's trunk; of the sizes of RegNetY-200MF, the smallest that both have."""

    def __init__(self, widths=(24, 56, 152, 368), depths=(1, 1, 4, 7), group=8, parts=False):
        super().__init__()
        stem = nn.Module()
        stem.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        stem.forward = stem.stem.forward
        self._feature_blocks = nn.ModuleDict({"conv1": stem})
        width_in = 32
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = nn.Sequential()
            for n in range(depth):
                blocks.add_module(f"block{stage}-{n}", RegNetBlock(width_in, width, 1 if n else 2, group))
                width_in = width
            if parts:
                whole, blocks = blocks, nn.Sequential()
                blocks.add_module(f"block{stage}-part0", whole)
            self._feature_blocks[f"res{stage + 1}"] = blocks

    def forward(self, x):
        for block in self._feature_blocks.values():
            x = block(x)
        return x.mean((2, 3))


def jax_vit_weights(tokens=5, width=48, heads=3, depth=2):
    rng = np.random.default_rng(0)
    shapes = {"cls": (1, 1, width), "embedding/kernel": (16, 16, 3, width), "embedding/bias": (width,)}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, tokens, width)
    shapes |= {"head/kernel": (width, 7), "head/bias": (7,)}
    shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    shapes |= {f"Transformer/encoder_norm/{name}": (width,) for name in ("scale", "bias")}
    for n in range(depth):
        block = f"Transformer/encoderblock_{n}"
        shapes |= {f"{block}/LayerNorm_{k}/{name}": (width,) for k in (0, 2) for name in ("scale", "bias")}
        for name in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_1/{name}/kernel"] = (width, heads, width // heads)
            shapes[f"{block}/MultiHeadDotProductAttention_1/{name}/bias"] = (heads, width // heads)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = (heads, width // heads, width)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = (width,)
        for k, sizes in enumerate(((width, 4 * width), (4 * width, width))):
            shapes |= {f"{block}/MlpBlock_3/Dense_{k}/kernel": sizes, f"{block}/MlpBlock_3/Dense_{k}/bias": sizes[1:]}
    return {key: rng.normal(0, 0.2, shape).astype(np.float32) for key, shape in shapes.items()}


def original_vit(weights, images):
    """Flax's, in its own indices (images, tokens, heads, width of a head)."""
    w = {key: torch.from_numpy(array) for key, array in weights.items()}

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], w[f"{at}/scale"], w[f"{at}/bias"], eps=1e-6)

    patches = F.conv2d(images, w["embedding/kernel"].permute(3, 2, 0, 1), w["embedding/bias"], stride=16)
    x = torch.cat([w["cls"].expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for n in range(2):
        block = f"Transformer/encoderblock_{n}"
        attention, y = f"{block}/MultiHeadDotProductAttention_1", norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            torch.einsum("btd,dhk->bthk", y, w[f"{attention}/{name}/kernel"]) + w[f"{attention}/{name}/bias"]
            for name in ("query", "key", "value")
        )
        share = torch.einsum("bqhk,bthk->bhqt", q / q.shape[-1] ** 0.5, k).softmax(-1)
        mixed = torch.einsum("bhqt,bthk->bqhk", share, v)
        x = x + torch.einsum("bqhk,hkd->bqd", mixed, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"]
        y, mlp = norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3"
        y = F.gelu(y @ w[f"{mlp}/Dense_0/kernel"] + w[f"{mlp}/Dense_0/bias"])
        x = x + y @ w[f"{mlp}/Dense_1/kernel"] + w[f"{mlp}/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm")[:, 0]


# --- state dicts -----------------------------------------------------------------------------------------------------

SMALL = {"layers": (2, 1, 1, 1), "channels": (8, 16, 32, 64)}
WIDE = {"layers": (2, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_chs": 8, "width_factor": 2, "preact": False}
HEADS = {"projection_head.0.weight": torch.ones(3, 3), "prototypes.prototypes0.weight": torch.ones(3, 3)}
# Original network, its checkpoint made from its state dict, and timm's architecture, arguments and converter.
CASES = {
    "timecat": (
        lambda: OriginalResNet(names=("conv", "bn")),
        lambda s: {
            "model_params": prefixed(s | {"fc.weight": torch.ones(7, 256)}, "_orig_mod.module."),
            "global_step": 9,
        },
        ("resnet50", SMALL, from_timecat),
    ),
    "SwAV, hub": (
        lambda: OriginalResNet(swav=True),
        lambda s: prefixed(s | HEADS, "module."),
        ("resnet50", SMALL, from_swav),
    ),
    "SwAV, training": (
        lambda: OriginalResNet(swav=True),
        lambda s: {"state_dict": prefixed(s | HEADS, "module."), "epoch": 400, "amp": {"loss_scaler0": {}}},
        ("resnet50", SMALL, from_swav),
    ),
    "SwAV, wide": (
        lambda: OriginalResNet(stem=16, width=16, swav=True),
        lambda s: prefixed(s | HEADS, "module."),
        ("resnetv2_50", WIDE, lambda t: from_wide_resnet(from_swav(t))),
    ),
    "supervised, wide": (
        lambda: OriginalResNet(stem=16, width=16),
        lambda s: {"state_dict": prefixed(s, "module.model0.") | {"module.classifier.weight": torch.ones(7, 512)}},
        ("resnetv2_50", WIDE, from_wide_resnet),
    ),
    **{
        f"SEER{', in parts' if parts else ''}": (
            lambda parts=parts: OriginalRegNetY(parts=parts),
            lambda s: {
                "classy_state_dict": {"base_model": {"model": {"trunk": s, "heads": HEADS}, "meters": {}}},
                "iteration": 5,
            },
            ("regnety_002", {}, from_vissl),
        )
        for parts in (False, True)
    },
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_are_the_original_architectures(case, tmp_path):
    make, wrap, (architecture, model_args, converter) = CASES[case]
    original = filled(make())
    torch.save(wrap(original.state_dict()), tmp_path / "checkpoint.torch")
    tensors = read_checkpoint(tmp_path / "checkpoint.torch")[0]
    before = dict(tensors)
    converted = converter(tensors)
    assert tensors == before, "a converter does not change its argument"
    if (
        architecture != "resnetv2_50"
    ):  # these small ones have no width that `convert` knows; real ones are tested below
        assert convert(architecture, tensors).tensors.keys() == converted.keys()
        assert convert(architecture, tensors).pretrained_cfg["crop_pct"] == 0.875
    backbone = filled(timm.create_model(architecture, num_classes=0, **model_args), seed=1)
    load_backbone(backbone, converted, case)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = original(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def loaded():
    """For each layout, a state dict as read from a file, its converter and the backbone that it is for."""
    layouts = {}
    for case in ("timecat", "SwAV, wide", "SEER"):
        make, wrap, (architecture, model_args, converter) = CASES[case]
        content = wrap(filled(make()).state_dict())
        content = content.get("model_params", content)
        trunk = content["classy_state_dict"]["base_model"]["model"]["trunk"] if case == "SEER" else content
        layouts[case] = trunk, converter, timm.create_model(architecture, num_classes=0, **model_args)
    return layouts


@settings(max_examples=15)
@given(case=st.sampled_from(["timecat", "SwAV, wide", "SEER"]), place=st.integers(0, 10**6), bad=st.booleans())
def test_a_checkpoint_with_one_wrong_tensor_is_refused(loaded, case, place, bad):
    tensors, converter, backbone = loaded[case]
    keys = [key for key in tensors if not key.endswith(("tracked", "fc.weight"))]
    keys = [key for key in keys if "head" not in key and "proto" not in key]
    key = keys[place % len(keys)]
    broken = dict(tensors)
    if bad:
        broken[key] = torch.zeros(3, 1)
        message = r"other shape: \S+ \(3, 1\) for "
    else:
        broken[key + "x"] = broken.pop(key)
        message = r"missing: \S+; unexpected: \S+x\."
    with pytest.raises(ValueError, match=rf"mine does not hold the weights of \w+; {message}"):
        load_backbone(backbone, converter(broken), "mine")


@pytest.mark.parametrize(("width", "millions"), [(2, 94), (4, 375), (5, 586)])
def test_a_wide_resnet50_is_built_as_wide_as_its_stem(width, millions):
    """Numbers of parameters as in SwAV's README, counted on the meta device, where size costs nothing."""
    with torch.device("meta"):
        original = OriginalResNet(64 * width, 64 * width, (3, 4, 6, 3), swav=True)
        converted = convert("resnet50", prefixed(original.state_dict() | HEADS, "module."))
        expected = timm.create_model(converted.architecture, num_classes=0, **converted.model_args).state_dict()
    assert converted.model_args["width_factor"] == width and converted.pretrained_cfg["interpolation"] == "bilinear"
    shapes = {key.removeprefix("module."): tensor.shape for key, tensor in converted.tensors.items()}
    assert shapes == {key: tensor.shape for key, tensor in expected.items()}
    assert round(sum(parameter.numel() for parameter in original.parameters()) / 1e6) == millions
    json.dumps(converted.model_args)


def test_tensors_with_timms_keys_are_returned_unchanged():
    for architecture in ("resnet10t", "regnety_002", "vit_tiny_patch16_224", "resnetv2_50"):
        with torch.device("meta"):
            state = timm.create_model(architecture).state_dict()
        converted = convert(architecture, state)
        assert converted.tensors is state and converted.architecture == architecture
        assert converted.model_args == converted.pretrained_cfg == {}


def test_two_names_for_one_tensor_are_refused():
    state = {"layer1.0.downsample.conv.weight": torch.ones(1), "layer1.0.downsample.0.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"under two names, one of them layer1\.0\.downsample\.0\.weight"):
        from_timecat(state)


# --- .npz ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=48, depth=2).eval()


@torch.no_grad()
def test_npz_features_are_the_original_architectures(vit, tmp_path):
    np.savez(tmp_path / "ViT.npz", **(weights := jax_vit_weights()))
    load_jax_vit(vit, tmp_path / "ViT.npz")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(vit(images), original_vit(weights, images), rtol=1e-4, atol=1e-5)


KEY = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {KEY + "s": w.pop(KEY)}, rf"missing: {KEY}"),
        (lambda w: w | {KEY: np.zeros((48, 5), np.float32)}, r"\(The size of tensor"),
        (lambda w: w | {KEY: np.zeros((1, 1), np.float32)}, r"numbers, not"),
        (lambda w: w | {KEY: np.array([object()])}, r"it is an array of object"),
        (lambda w: jax_vit_weights(tokens=17), r": it has [\d,]+ numbers, not [\d,]+; .* image size"),
        (lambda w: jax_vit_weights(depth=3), r"numbers, not"),
        (lambda w: {"weight": w["cls"]}, r"did not find a supported"),
    ],
)
def test_npz_with_one_wrong_array_is_refused(vit, change, message, tmp_path):
    np.savez(tmp_path / "ViT.npz", **change(jax_vit_weights()))
    with pytest.raises(ValueError, match=f"ViT.npz does not hold the weights of vit_tiny_patch16_224.*{message}"):
        load_jax_vit(vit, tmp_path / "ViT.npz")


def test_a_damaged_or_missing_npz_file_is_refused(vit, tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"cut.npz does not hold .*fetch the file again"):
        load_jax_vit(vit, tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*none.npz"):
        load_jax_vit(vit, tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"holds a vision transformer, not resnet10t"):
        load_jax_vit(timm.create_model("resnet10t", num_classes=0), tmp_path / "cut.npz")


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names(ENSEMBLES))
def test_a_recipe_names_existing_members(name):
    recipe, lines = ensemble_recipe(name), (ENSEMBLES / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    files = " --checkpoints FOLDER" if recipe.checkpoints else ""
    assert comment.startswith(f"concat-ensemble build --recipe {name}{files} --output {name} ")
    assert "Weights not run here" in comment and 8 <= len(lines) <= 20 and max(map(len, lines)) <= 140
    assert len(recipe.members) == sum(line.startswith("  ") for line in lines) - len(recipe.provenance or {})
    for source, own in recipe.members.items():
        assert set(own or {}) | set(recipe.provenance or {}) <= PROVENANCE
        architecture, is_file, file = source.rpartition("=")
        if is_file:
            assert architecture in timm_architectures() and file.endswith((*PICKLES, ".npz")) and recipe.checkpoints
        else:
            assert source in timm.list_pretrained(f"{source.split('.')[0]}.*")
            license = timm.get_pretrained_cfg(source).license
            assert license == (recipe.provenance or {}).get("license") or license in comment


FIGURES = {
    "4: ResNet50-CAT4 and the wide network": "timecat-cat1 timecat-cat4 resnet50w2",
    "5: SWAV": "swav-cat2 swav-cat5 swav-cat7 swav-cat8 swav-w2 swav-w4 swav-w5",
    "5: SEER": "seer-32gf seer-64gf seer-128gf seer-256gf seer-cat2 seer-cat3 seer-cat4",
    "5: ViT, original": "vit-orig-cat2-in21k vit-orig-cat2-in1k",
    "5: ViT, augreg": "vit-augreg-cat2-in21k vit-augreg-cat2-in1k",
    "5: ViT, both": "vit-cat4-in21k vit-cat4-in1k vit-cat4-jax",
    "6: time-concatenation": "timecat-cat1 timecat-cat2 timecat-cat4 timecat-cat5",
}


@pytest.mark.parametrize("figure", FIGURES)
def test_every_system_of_the_figures_has_a_recipe(figure):
    assert set(FIGURES[figure].split()) <= set(recipe_names(ENSEMBLES))


# Of download_checkpoint.md in TjuJianyu/RRL; within the bucket vit_models.
AUGREG_B = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
AUGREG_L = "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0"
VIT_FILES = {
    "vit-orig-cat2-in21k": ["imagenet21k/ViT-B_16", "imagenet21k/ViT-L_16"],
    "vit-orig-cat2-in1k": ["imagenet21k+imagenet2012/ViT-B_16", "imagenet21k+imagenet2012/ViT-L_16"],
    "vit-augreg-cat2-in21k": [f"augreg/{AUGREG_B}", f"augreg/{AUGREG_L}"],
    "vit-augreg-cat2-in1k": [
        f"augreg/{AUGREG_B}--imagenet2012-steps_20k-lr_0.03-res_384",
        f"augreg/{AUGREG_L}--imagenet2012-steps_20k-lr_0.01-res_384",
    ],
    "vit-cat4-jax": ["imagenet21k/ViT-B_16", f"augreg/{AUGREG_B}", "imagenet21k/ViT-L_16", f"augreg/{AUGREG_L}"],
}


@pytest.mark.parametrize("name", VIT_FILES)
def test_the_files_of_vits_are_those_of_the_predecessor(name):
    files = [source.partition("=")[2] for source in ensemble_recipe(name).members]
    assert files == [f"{file}.npz" for file in VIT_FILES[name]]


@torch.no_grad()
def test_the_command_builds_a_recipe(run, tmp_path):
    original = filled(OriginalResNet(64, 64, (3, 4, 6, 3), names=("conv", "bn")))
    (tmp_path / "got" / "checkpoints_full").mkdir(parents=True)
    content = {"model_params": prefixed(original.state_dict(), "_orig_mod.module.")}
    torch.save(content, tmp_path / "got" / "checkpoints_full" / "checkpoint_run0.pth")
    code, out, err = run("build", "--recipe", "timecat-cat1", "--checkpoints", "got", "--output", "cat1")
    assert code == 0 and err == "" and "checkpoint_run0.pth" in out
    model = ConcatEnsembleModel.from_pretrained(tmp_path / "cat1")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.members["0"](images), original(images), rtol=1e-4, atol=1e-5)
    (member,) = model.config.members
    assert (member["preprocessing"]["crop_pct"], member["preprocessing"]["interpolation"]) == (0.875, "bilinear")
    known = {"ensemble_recipe": "timecat-cat1", "seed": 2, "steps": 450000, "license": "cc-by-nc-4.0"}
    assert known.items() <= member["provenance"].items()
    assert "recipe `timecat-cat1`: weights not run here" in (tmp_path / "cat1" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "swav-cat9"], ["no recipe 'swav-cat9'; did you mean swav-cat", "resnet50-trainings"]),
        (["--recipe", "cifar100"], ["no recipe 'cifar100'"]),
        (
            ["--recipe", "swav-cat5"],
            ["no swav_400ep_pretrain.pth.tar", "facebookresearch/swav", "--checkpoints"],
        ),
        (["random:resnet18", "--recipe", "swav-cat5"], ["--recipe swav-cat5", "leave out random:resnet18"]),
        (["--recipe", "vit-objectives"], ["cannot reach the Hub", "vit_base_patch16_224.augreg_in21k"]),
    ],
)
def test_build_refuses(words, message, refused):
    refused(["build", *words, "--output", "made"], *message)
