"""What a row of gradients costs beside a row of pooled features, and whether memory stays where it is as images come.

    .venv/bin/python tests/benchmarks/ntk_cost.py resnet50 vit_small_patch16_224 efficientnet_b0

Networks have random weights, which cost what trained ones do; images are noise of the network's own size. For each, in a process of its own and as
`extract_features` runs them: milliseconds per image of the forward pass, of gradients hashed to --dim columns and of these by a loop over the images
with plain autograd, as multiples of the forward pass (medians of --repeats, taken in turn); the share of hashing; how many images go through at a time;
and the process' peak memory before, after --images and after five times as many.
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
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def measure(architecture: str, images: int, repeats: int, dim: int) -> str:
    """One line about one network."""
    model, ntk = assemble(f"random:{architecture}"), NTK(dim=dim)
    member = model.members["0"]
    pixels = torch.randn(images, *model._pixel_shape)
    weights = dict(ntk._chosen(member))

    @torch.inference_mode()
    def forward():
        member.to(memory_format=torch.channels_last)(pixels)

    def naive():
        member.to(memory_format=torch.contiguous_format)
        for image in pixels.split(1):
            torch.autograd.grad(member(image).sum(), list(member.parameters()))

    def gradients():
        member.to(memory_format=torch.contiguous_format)
        ntk.features(model, 0, pixels)

    with keep_freed_memory():
        peaks = [peak()]
        for passes in (1, 4):
            for _ in range(passes):
                gradients()
            peaks.append(peak())
        taken = [(seconds(forward), seconds(gradients), seconds(naive)) for _ in range(repeats)]
        at_a_time = ntk._fitting(member, weights, pixels)
        rows = [torch.randn(at_a_time, *weight.shape) for weight in weights.values()]
        hashing = median(seconds(lambda: ntk._hashed(rows)) for _ in range(repeats)) / at_a_time
    plain, hashed, loop = (1e3 * median(column) / images for column in zip(*taken, strict=True))
    return (
        f"{architecture} ({sum(weight.numel() for weight in weights.values()) / 1e6:.1f} M parameters): forward {plain:.0f} ms an image, "
        f"gradients x{hashed / plain:.1f} (of which hashing x{1e3 * hashing / plain:.1f}), a plain loop's x{loop / plain:.1f}; "
        f"{at_a_time} at a time; peak {peaks[0]:,} MB before, {peaks[1]:,} MB after {images} images, {peaks[2]:,} MB after {5 * images}"
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
