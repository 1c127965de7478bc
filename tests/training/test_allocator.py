"""The allocator's setting."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from kd_multiresolution.training.allocator import hold_freed_memory, release_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_held_memory_is_not_asked_for_again() -> None:
    def faults() -> int:
        """Return the page faults of using the same large piece of memory five times."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.zeros(2**26)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if not hold_freed_memory():
        pytest.skip("the setting is glibc's")
    faults()
    held = faults()
    release_freed_memory()
    released = faults()
    assert held < released / 10
