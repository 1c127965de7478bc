"""The allocator's setting."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from kd_multiresolution import KdMultiresolutionDual
from kd_multiresolution.plugin import allocator
from kd_multiresolution.plugin.allocator import hold_freed_memory, release_freed_memory


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


class StopAtOnce(KdMultiresolutionDual):
    def test_step(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError


def test_it_is_held_while_a_model_works_and_no_longer(
    noise: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(allocator, "hold_freed_memory", lambda: calls.append(True) or True)
    monkeypatch.setattr(allocator, "release_freed_memory", lambda: calls.append(False))
    model = StopAtOnce(
        "small_vgg", critical_points=["pool2", "pool3", "pool4"], image_size=32, epochs=1, visualizer=False
    )
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(model, datamodule=noise)
    assert calls == [True, False]
    engine.validate(model, datamodule=noise)
    engine.predict(model, datamodule=noise)
    assert calls == [True, False] * 3
    with pytest.raises(KeyError):
        engine.test(model, datamodule=noise)
    assert calls == [True, False] * 4
