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
from lightning.pytorch import Trainer

from kd_multiresolution import KdMultiresolutionDual
from kd_multiresolution.plugin import allocator
from kd_multiresolution.plugin.allocator import HeldMemory, hold_freed_memory, release_freed_memory


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
    assert calls[-1] is False  # validation on the way of a training asks once more
    assert calls.count(False) == 1
    calls.clear()
    engine.validate(model, datamodule=noise)
    engine.predict(model, datamodule=noise)
    assert calls == [True, False] * 2
    with pytest.raises(KeyError):
        engine.test(model, datamodule=noise)
    assert calls == [True, False] * 3


def test_the_last_of_several_trainers_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    monkeypatch.setattr(allocator, "hold_freed_memory", lambda: True)
    monkeypatch.setattr(allocator, "release_freed_memory", lambda: released.append(True))
    first, second = HeldMemory(), HeldMemory()
    module, trainer = torch.nn.Linear(1, 1), Trainer(logger=False, accelerator="cpu")
    module.device = torch.device("cpu")
    first.on_test_start(trainer, module)
    second.on_predict_start(trainer, module)
    first.teardown(trainer, module, "test")
    first.teardown(trainer, module, "test")
    assert not released
    second.teardown(trainer, module, "predict")
    assert released == [True]


def test_a_library_that_takes_a_part_of_it_alone_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> bool:
            asked.append(parameter)
            return parameter != allocator.TRIM_THRESHOLD

        def malloc_trim(self, pad: int) -> None: ...

    monkeypatch.setattr(allocator, "_glibc", Library)
    assert not hold_freed_memory()
    assert asked == [allocator.MMAP_MAX, allocator.TRIM_THRESHOLD, *allocator.RELEASED]
