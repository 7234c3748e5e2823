"""One forward pass of an ensemble against its members one after the other: `torch.cat([m(x) for m in members], 1)`.

    .venv/bin/python tests/benchmarks/ensemble_forward.py

Prints, for ResNet-18 x 4 and ViT-tiny x 4 with random weights at 224 pixels and each batch size: the loop's time, and
for each way to run the ensemble its share of that time and, in brackets, its largest output difference from the loop,
relative to the largest output. `folded` and what is compiled are also in channels_last. Needs the extra `export`.

Each repeat times the loop and all ways in turn, so that what else the machine does falls on all of them; a share is
the median over the repeats of the share within each, and a time the fastest of `--calls` calls. Compiling and
exporting are not counted.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from torch import nn

from concat_ensemble import assemble
from concat_ensemble.inference.export import export_onnx

WAYS = ("eager", "folded", "compiled", "compiled and bf16", "ONNX Runtime")
Run = Callable[[torch.Tensor], torch.Tensor]


def loop(members: list[nn.Module]) -> Run:
    return lambda pixels: torch.cat([member(pixels) for member in members], dim=1)


def pooled(model: Callable) -> Run:
    return lambda pixels: model(pixels).pooler_output


def onnx(model: nn.Module, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "ensemble.onnx", check=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def ways(model: nn.Module, threads: int) -> dict[str, Run]:
    """Each compiled anew for every batch size, as a deployment of fixed size would be."""
    torch.compiler.reset()
    folded = copy.deepcopy(model).fold_batchnorm().to(memory_format=torch.channels_last)
    half = copy.deepcopy(folded).to(torch.bfloat16)
    compiled = [torch.compile(ensemble, fullgraph=True) for ensemble in (folded, half)]
    return dict(zip(WAYS, [*map(pooled, [model, folded, *compiled]), onnx(model, threads)], strict=True))


def fastest(run: Run, pixels: torch.Tensor, calls: int) -> float:
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        run(pixels)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    for name, default in (("members", 4), ("repeats", 5), ("calls", 3), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, {options.threads} threads on the CPU\n")
    print(row(f"{options.members} members of", "batch", "loop, ms", *WAYS), row(*["---"] * (3 + len(WAYS))), sep="\n")
    for architecture in options.architectures:
        model = assemble([f"random:{architecture}"] * options.members)
        reference = loop(list(model.members.values()))
        for images in options.batches:
            pixels = torch.randn(images, *model.config.pixel_shape, generator=torch.Generator().manual_seed(0))
            runs, wanted = ways(model, options.threads), reference(pixels)
            far = {
                name: ((run(pixels) - wanted).abs().max() / wanted.abs().max()).item() for name, run in runs.items()
            }
            base, shares = [], {name: [] for name in runs}
            for _ in range(options.repeats):
                base.append(fastest(reference, pixels, options.calls))
                for name, run in runs.items():
                    shares[name].append(fastest(run, pixels, options.calls) / base[-1])
            cells = [f"{median(shares[name]):.2f} ({far[name]:.0e})" for name in runs]
            print(row(architecture, images, f"{1e3 * median(base):.0f}", *cells), flush=True)


if __name__ == "__main__":
    main()
