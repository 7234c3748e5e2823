"""Keeps float32 arithmetic on a GPU at float32's own precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Within this context convolutions and matrix products of float32 tensors on a GPU keep all 24 bits.

    By default torch lets convolutions round their inputs to TF32, with 11 bits, on Nvidia GPUs since 2020. On an H100
    that moved a ResNet's features by up to 1e-3, so that a table would depend on the device that made it.
    """
    cudnn: Any = torch.backends.cudnn
    backends = cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
