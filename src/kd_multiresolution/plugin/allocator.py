"""A setting of the C library's allocator for work on the CPU.

Every batch allocates and frees the same large activations. By default glibc returns them to the system each time, and
the system maps and clears their pages anew: a third of the time of a training step, a quarter of a gradient map's.
"""

from __future__ import annotations

import ctypes
from functools import cache

from lightning.pytorch import Callback, LightningModule, Trainer

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
HELD = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**27}
# glibc's own, with the threshold that it reaches by itself in a process of large allocations.
RELEASED = {MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, TOP_PAD: 2**17}


class HeldMemory(Callback):
    """Has the process keep the memory that it frees while a model is trained or evaluated on the CPU."""

    def __init__(self) -> None:
        self._holds = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep freed memory."""
        del trainer
        self._holds = self._holds or (pl_module.device.type == "cpu" and hold_freed_memory())

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back, as at the end."""
        del exception
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back."""
        del trainer, pl_module, stage
        if self._holds:
            release_freed_memory()
            self._holds = False


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
