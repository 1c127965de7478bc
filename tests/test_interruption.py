"""What is killed or runs out of disk can be taken up again, and nothing half-written is taken for whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

import peers
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.data.texture_defects import ensure_written
from tests import faults

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL
TRAININGS = [f"{model}-{moment}" for model in faults.MODELS for moment in ("caching", "training", "checkpoint", "disk")]
OTHERS = ["textures-writing", "reproduce-training", "reproduce-result"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    faults.write_pictures(folder / "good", faults.IMAGES)
    faults.write_pictures(folder / "bad", 2)
    faults.write_pictures(folder / "brain_mri" / "no", 14)
    faults.write_pictures(folder / "brain_mri" / "yes", 2)
    return folder


@pytest.fixture(scope="module")
def ends(root: Path) -> dict[str, int]:
    """How the process of each point ended."""
    command = [sys.executable, faults.__file__, str(root), *TRAININGS, *OTHERS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, dict[str, Any]]:
    """The weights of uninterrupted trainings."""
    return {name: faults.train(root, name, root / f"whole-{name}").state_dict() for name in faults.MODELS}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To the bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == theirs[name]


@pytest.mark.parametrize("point", TRAININGS)
def test_training_goes_on_as_if_nothing_had_been(
    point: str, ends: dict[str, int], root: Path, whole: dict[str, dict[str, Any]]
) -> None:
    model, _, moment = point.partition("-")
    log = (root / f"{point}.log").read_text()
    assert ends[point] == (1 if moment == "disk" else KILLED), log
    assert ("File too large" in log) == (moment == "disk"), log
    assert list((root / point / "cache").iterdir()) == [], "the file of features has no name"
    checkpoints = list((root / point).rglob("*.ckpt"))
    if moment == "caching":
        assert checkpoints == []
        resumed = faults.train(root, model, root / point)
    else:
        (checkpoint,) = checkpoints
        assert torch.load(checkpoint, weights_only=True)["epoch"] == 1, "the one before"
        resumed = faults.train(root, model, root / point, checkpoint=checkpoint)
    assert_same(resumed.state_dict(), whole[model])


def test_half_written_textures_are_written_again(ends: dict[str, int], root: Path, tmp_path: Path) -> None:
    assert ends["textures-writing"] == KILLED
    (half,) = (root / "textures-writing").iterdir()
    assert len([*half.rglob("*.png")]) < 30
    again, untouched = (ensure_written(folder, "brick", 0) for folder in (root / "textures-writing", tmp_path))
    assert again != half
    files = {path.relative_to(again): path.read_bytes() for path in again.rglob("*.png")}
    assert files == {path.relative_to(untouched): path.read_bytes() for path in untouched.rglob("*.png")}


@pytest.mark.parametrize(("point", "half"), [("reproduce-training", 0), ("reproduce-result", 1)])
def test_a_table_is_finished_by_a_second_call(point: str, half: int, ends: dict[str, int], root: Path) -> None:
    assert ends[point] == KILLED, (root / f"{point}.log").read_text()
    trainings = root / point / "trainings"
    written = {path: path.stat().st_mtime_ns for path in trainings.glob("*.json")}
    assert len(written) == 1
    assert len([*trainings.iterdir()]) == 1 + half
    assert faults.reproduce_table(root, root / point) == 0
    after = {path: path.stat().st_mtime_ns for path in trainings.glob("*.json")}
    assert len(after) == 2
    assert written.items() <= after.items()
    assert all(json.loads(path.read_text())["metrics"] for path in after)


def test_a_comparison_does_not_wait_for_a_process_that_was_killed() -> None:
    with pytest.raises(BrokenProcessPool):
        peers.in_own_process(signal.raise_signal, signal.SIGKILL)  # as by the kernel, when memory runs out


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_half_a_checkpoint_is_none(part: float, root: Path, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (checkpoint,) = (root / "whole-paper").rglob("*.ckpt")
    content = checkpoint.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: int(part * len(content))])
    with pytest.raises((RuntimeError, EOFError)):
        KdMultiresolution.load_from_checkpoint(tmp_path / "half.ckpt")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")  # below it not even root may write
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        ensure_written(tmp_path / "file" / "folder", "brick", 0)
