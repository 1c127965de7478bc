"""A setting of the C library's allocator for training on the CPU.

Every step allocates and frees the same large activations. By default glibc returns them to the system each time, and
the system maps and clears their pages anew: a third of the time of a step.
"""

from __future__ import annotations

import ctypes
from functools import cache

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
HELD = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**27}
# glibc's own, with the threshold that it reaches by itself in a process of large allocations.
RELEASED = {MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, TOP_PAD: 2**17}


def hold_freed_memory() -> bool:
    """Let the process keep the memory that it frees, until :func:`release_freed_memory`.

    Returns:
        Whether the C library can do so; only glibc can.
    """
    library = _glibc()
    return library is not None and all(library.mallopt(*setting) for setting in HELD.items())


def release_freed_memory() -> None:
    """Return freed memory to the system, now and from now on."""
    library = _glibc()
    if library is not None:
        for setting in RELEASED.items():
            library.mallopt(*setting)
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
    except (OSError, TypeError, AttributeError):
        return None
    return library
