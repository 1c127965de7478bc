"""A setting of the C library's allocator for work on the CPU.

Every batch allocates and frees the same large activations. By default glibc returns them to the system each time, and
the system maps and clears their pages anew: a third of the time of a training step, a quarter of a gradient map's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import ClassVar
from weakref import WeakSet

from lightning.pytorch import Callback, LightningModule, Trainer

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
HELD = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**27}
# glibc's own, with the threshold that it reaches by itself in a process of large allocations.
RELEASED = {MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, TOP_PAD: 2**17}


class HeldMemory(Callback):
    """Has the process keep the memory that it frees while a model is trained or evaluated on the CPU."""

    _holding: ClassVar[WeakSet[HeldMemory]] = WeakSet()  # of a trainer each

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep freed memory."""
        del trainer
        if pl_module.device.type == "cpu" and hold_freed_memory():
            self._holding.add(self)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back, as at the end."""
        del exception
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back."""
        del trainer, pl_module, stage
        if self in self._holding:
            self._holding.remove(self)
            if not self._holding:
                release_freed_memory()


def hold_freed_memory() -> bool:
    """Let the process keep the memory that it frees, until :func:`release_freed_memory`.

    Returns:
        Whether the C library can do so; only glibc can.
    """
    library = _glibc()
    if library is None:
        return False
    done = all(library.mallopt(*setting) for setting in HELD.items())
    if not done:
        release_freed_memory()
    return done


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
