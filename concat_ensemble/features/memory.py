"""Keeps freed memory in the process while large pieces are freed and allocated again and again."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt, from glibc's malloc.h, and glibc's defaults for two of them.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_THRESHOLD, MAPS = 32 << 20, 65_536  # bytes; number of maps


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within this context the process keeps the memory that it frees, on Linux with glibc. Elsewhere it does nothing.

    A forward pass on a CPU allocates and frees hundreds of megabytes per layer. glibc returns such large pieces to the
    system at once, and the page faults on fresh memory then cost as much as the arithmetic.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # The values that glibc itself arrives at after it has seen pieces as large as these.
        libc.mallopt(MMAP_MAX, MAPS)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
