"""Cost of a row of gradients beside a row of pooled features, and whether memory grows with the number of images.

    .venv/bin/python tests/benchmarks/ntk_cost.py resnet50 vit_small_patch16_224 efficientnet_b0

Networks have random weights, which cost as much as trained ones; images are noise of the network's input size. Each
network runs in a process of its own, as in `extract_features`. Prints milliseconds per image of the forward pass; as
multiples of it (medians of --repeats alternating runs), the gradients hashed to --dim columns, the hashing alone, and
a loop over the images with plain autograd; how many images go through at a time; and the peak memory of the process
before, after --images, and after five times as many.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch

from concat_ensemble import assemble
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.ntk import NTK


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak() -> int:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def measure(architecture: str, images: int, repeats: int, dim: int) -> str:
    """The line to print about one network."""
    model, ntk = assemble(f"random:{architecture}"), NTK(dim=dim)
    member = model.members["0"]
    pixels = torch.randn(images, *model._pixel_shape)
    weights = ntk._select_parameters(member)

    @torch.inference_mode()
    def forward():
        member.to(memory_format=torch.channels_last)(pixels)

    def naive():
        member.to(memory_format=torch.contiguous_format)
        for image in pixels.split(1):
            torch.autograd.grad(member(image).sum(), list(member.parameters()))

    def gradients():
        member.to(memory_format=torch.contiguous_format)
        ntk.features(member, pixels)

    with keep_freed_memory():
        peaks = [peak()]
        for passes in (1, 4):
            for _ in range(passes):
                gradients()
            peaks.append(peak())
        times = [(seconds(forward), seconds(gradients), seconds(naive)) for _ in range(repeats)]
        chunk = ntk._chunk_size(member, weights, pixels)
        rows = [torch.randn(chunk, *weight.shape) for weight in weights.values()]
        hashing = 1e3 * median(seconds(lambda: ntk._hash(rows)) for _ in range(repeats)) / chunk
    plain, hashed, loop = (1e3 * median(column) / images for column in zip(*times, strict=True))
    parameters = sum(weight.numel() for weight in weights.values()) / 1e6
    return (
        f"{architecture} ({parameters:.1f} M parameters): forward {plain:.0f} ms per image, gradients "
        f"x{hashed / plain:.1f} (hashing alone x{hashing / plain:.1f}), in a plain loop x{loop / plain:.1f}; "
        f"{chunk} images at a time; peak {peaks[0]:,} MB before, {peaks[1]:,} MB after {images} images, "
        f"{peaks[2]:,} MB after {5 * images}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+")
    for name, default in (("images", 16), ("repeats", 3), ("dim", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, max_tasks_per_child=1) as processes:
        for architecture in options.architectures:
            work = (architecture, options.images, options.repeats, options.dim)
            print(processes.submit(measure, *work).result(), flush=True)


if __name__ == "__main__":
    main()
