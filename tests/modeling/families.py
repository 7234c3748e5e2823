"""What holds for the members of every family of timm, and docs/architectures.md, which shows it.

    .venv/bin/python tests/modeling/families.py --write docs/architectures.md

A family is a module of `timm.models`; its smallest architecture stands for it, made smaller where it takes arguments
for that. Takes about ten minutes. `test_families.py` checks the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.models import list_models, list_modules
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleModel, assemble

BATCHES = (1, 2)  # kernels may differ
SMALL_SIDE = 128  # pixels, of an architecture that takes images of any size
# Arguments that make a network smaller, and the side of the images where it must be another one.
SMALLER: dict[str, tuple[dict[str, Any], int | None]] = {
    "beit_base_patch16_224": ({"depth": 2}, None),
    "deepseek_vit_412m": ({"depth": 2, "img_size": 224}, 224),
    "gemma4_vit_167m": ({"depth": 2, "img_size": 240}, 240),
    "halonet_h1": ({}, 256),
    "naflexvit_base_patch16_parfac_gap": ({"depth": 2, "img_size": 224}, 224),
    "qwen3_vit_88m": ({"depth": 2, "img_size": 224}, 224),
    "sam2_hiera_tiny": ({"stages": [1, 1, 2, 1], "global_att_blocks": [3]}, 256),
    "samvit_base_patch16_224": ({"depth": 2, "global_attn_indexes": [1]}, None),
    "vgg11": ({"mlp_ratio": 0.1}, None),
}
PAGE = """<!-- Written by `python tests/modeling/families.py --write docs/architectures.md`. -->

# Architectures

Every architecture of timm that returns pooled features can be a member. Encoders of language models that return a map
(`gemma4_vit_167m_enc` and others in `_enc`) cannot; each has a twin that pools (`gemma4_vit_167m`).

This table has the smallest architecture of each family, which is a module of `timm.models` ({families} of
timm {version}), with random weights in every tensor, and with fewer layers or smaller images where it takes them.

- **saved and loaded**: `save_pretrained`, then `AutoModel.from_pretrained(..., trust_remote_code=True)` in a process
  without this package. All weights and the features of one and of two images equal timm's bit for bit, on the CPU.
- **from memory**: `assemble([network])`; **from a file**: `assemble("ARCHITECTURE=weights.safetensors")`. Features
  equal timm's bit for bit.
- **BatchNorms folded**: how many `fold_batchnorm()` folds; features change by less than 1e-4 of their norm. The others
  do not follow a convolution alone. `-`: the network has none.
- **checkpointing**: gradients with `gradient_checkpointing_enable()` differ from those without by less than 1e-4 of
  their norm. `-`: timm does not have it for this network.
- **hidden states**: how many feature maps `output_hidden_states=True` returns; they and the pooled features equal
  timm's bit for bit. `-`: timm's network does not return any.

`python tests/modeling/families.py` prints the table again in about ten minutes, and with the name of a family its row
alone. `pytest -m slow tests/modeling/test_families.py` checks every row.

{table}

{failed}
"""
# Loads the folders that it is told of, and compares weights and features with those in the file beside each.
VISITOR = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
assert importlib.util.find_spec("concat_ensemble") is None
for line in sys.stdin:
    folder = Path(json.loads(line))
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        actual = {f"members.0.{key}": tensor for key, tensor in model.members["0"].state_dict().items()}
        expected = load_file(folder.parent / "expected.safetensors")
        for name in [name for name in expected if name.startswith("pixels.")]:
            actual[name.replace("pixels", "features")] = model(expected.pop(name)).pooler_output
        differing = [name for name in actual | expected if not torch.equal(actual[name], expected[name])]
        answer = f"other values: {differing[:3]}" if differing else ""
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Visitor:
    """A process that has transformers and timm, but not this package."""

    def __init__(self, home: Path):
        environment = {key: value for key, value in os.environ.items() if key != "HF_MODULES_CACHE"}
        environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        # -S leaves out the editable install; the dependencies come by path.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
        command = [sys.executable, "-S", "-W", "ignore", "-c", VISITOR]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, cwd=home, env=environment, **pipes)

    def compare(self, folder: Path) -> str:
        """Empty if the ensemble in `folder` has the weights and the features in `expected.safetensors` beside it."""
        self.process.stdin.write(json.dumps(str(folder)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the process without the package has ended")
        return json.loads(answer)

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.wait()


class Case:
    """A network of timm, its features of noise, and a folder for its files."""

    @torch.no_grad()
    def __init__(self, backbone: nn.Module, model_args: dict[str, Any], folder: Path, visitor: Visitor):
        self.backbone, self.model_args, self.folder, self.visitor = backbone, model_args, folder, visitor
        self.architecture = backbone.pretrained_cfg["architecture"]
        self.preprocessing = {**resolve_model_data_config(backbone), "image_mode": "RGB"}
        generator = torch.Generator().manual_seed(0)
        self.pixels = {n: torch.randn(n, *self.preprocessing["input_size"], generator=generator) for n in BATCHES}
        self.features = {n: backbone(pixels) for n, pixels in self.pixels.items()}
        first, second = self.features[2]
        assert first.ndim == 1 and first.isfinite().all() and not torch.equal(first, second), "no features"

    def make_ensemble(self) -> ConcatEnsembleModel:
        """An ensemble with this network as its member, by a config and its state dict."""
        member = {
            "architecture": self.architecture,
            "model_args": self.model_args,
            "preprocessing": self.preprocessing,
        }
        member |= {"num_features": self.features[1].shape[1]}
        model = ConcatEnsembleModel(ConcatEnsembleConfig(members=[member])).eval()
        model.members["0"].load_state_dict(self.backbone.state_dict())
        return model

    @torch.no_grad()
    def compare(self, network: Callable[[Tensor], Any]) -> str:
        """Return "yes", or raise AssertionError if a network's features are not those of timm, bit for bit."""
        for n, pixels in self.pixels.items():
            features = network(pixels)
            features = getattr(features, "pooler_output", features)
            error = (features - self.features[n]).abs().max()
            assert torch.equal(features, self.features[n]), f"features of {n} images differ by {error:.1g}"
        return "yes"


@dataclass
class Result:
    """A row of the table. `failures` has the reason for every check that fails."""

    family: str
    architecture: str
    model_args: dict[str, Any]
    input_size: tuple[int, ...] = ()
    num_features: int = 0
    held: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def smallest_architecture(family: str) -> str:
    """Of a module of `timm.models`, by the number of weights."""
    smallest, fewest = "", 10**12

    def count(module, name, parameter):
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total >= fewest:
            raise OverflowError

    with register_module_parameter_registration_hook(count), torch.device("meta"):
        for architecture in list_models(module=family):
            total = 0
            try:
                timm.create_model(architecture, num_classes=0)
            except OverflowError:
                continue
            smallest, fewest = architecture, total
    return smallest


def create_network(architecture: str, model_args: dict[str, Any], size: int | None) -> nn.Module:
    """timm's network in evaluation mode, with random weights in which a lost one shows."""
    if size is None and not timm.get_pretrained_cfg(architecture).fixed_input_size:
        size = SMALL_SIDE
    overlay = {} if size is None else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        backbone = timm.create_model(architecture, num_classes=0, **overlay, **model_args)
        for tensor in backbone.state_dict().values():
            # timm initializes norms and layer scales alike, and many residual blocks so that they return zero.
            if tensor.is_floating_point() and (tensor.ndim < 2 or tensor.min() == tensor.max()):
                tensor += 0.2 * torch.rand_like(tensor)
    return backbone.eval()


def check_loading(case: Case, model: ConcatEnsembleModel) -> str:
    """Saved, and loaded by AutoModel without the package: the same weights and features, bit for bit."""
    model.save_pretrained(case.folder / "ensemble")
    tensors = {f"members.0.{key}": tensor for key, tensor in case.backbone.state_dict().items()}
    tensors |= {f"pixels.{n}": pixels for n, pixels in case.pixels.items()}
    tensors |= {f"features.{n}": features for n, features in case.features.items()}
    # Cloned, since safetensors refuses tensors that share memory.
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, case.folder / "expected.safetensors"
    )
    difference = case.visitor.compare(case.folder / "ensemble")
    assert not difference, difference
    return "yes"


def check_memory(case: Case, model: ConcatEnsembleModel) -> str:
    """`assemble([network])`."""
    return case.compare(assemble([case.backbone]))


def check_file(case: Case, model: ConcatEnsembleModel) -> str:
    """`assemble("ARCHITECTURE=FILE")` of its state dict."""
    path = case.folder / "weights.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in case.backbone.state_dict().items()}, path)
    model = assemble(f"{case.architecture}={path}", model_args=case.model_args or None)
    return case.compare(model.members["0"])  # the member, since a file does not say that the images are smaller here


def check_folding(case: Case, model: ConcatEnsembleModel) -> str:
    """`fold_batchnorm()`: how many BatchNorms are folded; features within float32's rounding."""
    before = count_batchnorms(model)
    if not before:
        return "-"
    folded = model.export_active().fold_batchnorm()
    with torch.no_grad():
        for n, pixels in case.pixels.items():
            error = torch.dist(folded(pixels).pooler_output, case.features[n]) / case.features[n].norm()
            assert error < 1e-4, f"relative error {error:.1g}"
    return f"{before - count_batchnorms(folded)} of {before}"


def count_batchnorms(model: nn.Module) -> int:
    return sum(getattr(module, "running_mean", None) is not None for module in model.modules())


def check_checkpointing(case: Case, model: ConcatEnsembleModel) -> str:
    """Gradient checkpointing, where timm has it: the same gradients."""
    if not model.supports_gradient_checkpointing:
        return "-"
    expected = compute_gradients(case, model)
    model.gradient_checkpointing_enable()
    actual = compute_gradients(case, model)
    model.gradient_checkpointing_disable()
    assert actual.keys() == expected.keys(), f"no gradient for {sorted(actual.keys() ^ expected.keys())[:3]}"
    for name, gradient in expected.items():
        error = torch.dist(actual[name], gradient) / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1g}"
    return "yes"


def compute_gradients(case: Case, model: ConcatEnsembleModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(case.pixels[1]).pooler_output.square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def check_hidden_states(case: Case, model: ConcatEnsembleModel) -> str:
    """`output_hidden_states=True`, where timm has feature maps: how many; the pooled features stay the same."""
    if not hasattr(case.backbone, "forward_intermediates"):
        return "-"
    with torch.no_grad():
        output = model(case.pixels[2], output_hidden_states=True)
        expected = case.backbone.forward_intermediates(case.pixels[2], intermediates_only=True)
    assert len(output.hidden_states) == len(expected) and all(map(torch.equal, output.hidden_states, expected)), "maps"
    assert torch.equal(output.pooler_output, case.features[2]), "with hidden states, the pooled features are others"
    return str(len(expected))


CHECKS: dict[str, Callable[[Case, ConcatEnsembleModel], str]] = {
    "saved and loaded": check_loading,
    "from memory": check_memory,
    "from a file": check_file,
    "BatchNorms folded": check_folding,
    "checkpointing": check_checkpointing,
    "hidden states": check_hidden_states,
}


def describe(error: Exception) -> str:
    """Its message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check(
    family: str, architecture: str, model_args: dict[str, Any], size: int | None, *, folder: Path, visitor: Visitor
) -> Result:
    """All checks of one architecture; its files go to `folder`."""
    result = Result(family, architecture, model_args)
    try:
        case = Case(create_network(architecture, model_args, size), model_args, folder, visitor)
        model = case.make_ensemble()
    except Exception as error:  # whatever it is, the table shall say it
        result.failures["built"] = describe(error)
        return result
    result.input_size, result.num_features = case.preprocessing["input_size"], model.config.num_features
    for name, function in CHECKS.items():
        try:
            result.held[name] = function(case, model)
        except Exception as error:
            result.failures[name] = describe(error)
    return result


def check_family(family: str, visitor: Visitor) -> Result:
    """All checks of a family's smallest architecture."""
    architecture = smallest_architecture(family)
    model_args, size = SMALLER.get(architecture, ({}, None))
    with tempfile.TemporaryDirectory() as folder:
        return check(family, architecture, model_args, size, folder=Path(folder), visitor=visitor)


def row(result: Result) -> str:
    """The family's row in the table."""
    arguments = ", ".join(f"{name}={value}" for name, value in result.model_args.items())
    name = f"`{result.architecture}`" + (f" ({arguments})" if arguments else "")
    size = " x ".join(map(str, result.input_size[1:]))
    cells = [result.family, name, size, str(result.num_features)]
    cells += [result.held.get(check, "**no**") for check in CHECKS]
    return f"| {' | '.join(cells)} |"


def page(results: list[Result]) -> str:
    """docs/architectures.md."""
    titles = ["family", "smallest architecture", "pixels", "features", *CHECKS]
    table = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *map(row, results)]
    failures = [
        f"- {result.family}, {name}: {reason}" for result in results for name, reason in result.failures.items()
    ]
    failed = "\n".join(["**no** stands for:", "", *failures]) if failures else "Nothing fails."
    counts = {"version": timm.__version__, "families": len(results), "table": "\n".join(table), "failed": failed}
    return PAGE.format(**counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="modules of timm.models; default: all of them")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as home, Visitor(Path(home)) as visitor:
        for family in options.families or sorted(list_modules()):
            results.append(check_family(family, visitor))
            print(row(results[-1]), *results[-1].failures.items(), file=sys.stderr, flush=True)
    print(page(results))
    if options.write:
        options.write.write_text(page(results))


if __name__ == "__main__":
    main()
