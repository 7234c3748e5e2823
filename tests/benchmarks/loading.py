"""`ConcatEnsembleModel.from_pretrained` against `timm.create_model` and `load_state_dict` for each member.

    .venv/bin/python tests/benchmarks/loading.py

Prints, for four ResNet-50s of random weights, both times and their ratio: medians over the repeats, each of which
times both in turn, from files that the system has in memory. Before it takes memory an ensemble's files are compared
with what its config builds; timm alone does not do that.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from concat_ensemble import ConcatEnsembleModel, assemble

MEMBERS = 4


def loop(folder: Path) -> None:
    for k in range(MEMBERS):
        weights = load_file(folder / f"member-{k:02d}.safetensors")
        member = timm.create_model("resnet50", num_classes=0)
        member.load_state_dict({name.removeprefix(f"members.{k}."): tensor for name, tensor in weights.items()})


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assemble(["random:resnet50"] * MEMBERS).save_pretrained(folder)
        taken = [
            (seconds(loop, folder), seconds(ConcatEnsembleModel.from_pretrained, folder))
            for _ in range(options.repeats + 1)
        ][1:]  # the first one warms up
    theirs, ours = (median(times) for times in zip(*taken, strict=True))
    ratios = [ours / theirs for theirs, ours in taken]
    print(
        f"timm one after the other {theirs:.2f} s, from_pretrained {ours:.2f} s: ratio {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
