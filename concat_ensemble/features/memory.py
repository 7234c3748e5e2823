"""Memory that is freed and asked for again at once: by the layers of a network, by the chunks of a pass over rows."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h: parameters of mallopt, and what they are set to when left alone.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_THRESHOLD, MAPS = 32 << 20, 65_536


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While this lasts, freed memory stays with the process, on Linux with glibc; elsewhere nothing happens.

    A forward pass on a CPU asks for hundreds of megabytes a layer and frees them again. glibc hands such pieces back to the system at once, and
    the faults on fresh pages then cost as much as the arithmetic.
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
        # As glibc itself has it once it has seen pieces as large as these.
        libc.mallopt(MMAP_MAX, MAPS)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
