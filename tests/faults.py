"""Processes that die at a chosen point, by ``kill -9`` or on a full disk.

A script: ``python faults.py FOLDER POINT...`` imports everything once and forks a process per point. It prints how each
of them ended, as JSON: minus the signal's number, or the exit status.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image

import reproduce
import tests.small_vgg  # noqa: F401 - a model of timm's from here on
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.data.texture_defects import ensure_written
from kd_multiresolution.training.feature_cache import FileStore
from tests.data.generated import write_image

IMAGES = 9  # the last batch of an epoch is a single one, which convolutions may compute otherwise
BATCHES = 2  # per epoch
EPOCHS = 4  # a checkpoint after every second one
MODELS = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}
SMALL_DISK = 100_000  # bytes per file: too few for a checkpoint


def write_pictures(folder: Path, count: int) -> None:
    for i in range(count):
        write_image(folder / f"{i}.png", i, "RGB", (32, 32))


def train(root: Path, model_name: str, out: Path, *callbacks: Callback, checkpoint: Path | None = None) -> Any:
    """Train on the pictures below ``root``, with the features in a file below ``out``."""
    (out / "cache").mkdir(parents=True, exist_ok=True)
    model = MODELS[model_name](
        "small_vgg", image_size=32, epochs=EPOCHS, visualizer=False, evaluator=False,
        cache_memory=0, cache_folder=out / "cache",
    )  # fmt: skip
    data = Folder(
        "parts", root=root, normal_dir="good", abnormal_dir="bad", normal_test_dir="bad", num_workers=0,
        train_batch_size=IMAGES - 1, val_split_mode="same_as_test",
    )  # fmt: skip
    engine = Engine(
        default_root_dir=out, callbacks=[*callbacks], check_val_every_n_epoch=2, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Sums depend on the number of threads, and a forked process need not have its parent's.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine.fit(model, datamodule=data, ckpt_path=checkpoint)
    torch.set_num_threads(threads)
    return model


def reproduce_table(root: Path, out: Path) -> int:
    """Train for a table: two splits of BrainMRI, one epoch each."""
    short = ["--image-size", "32", "--epochs", "1", "--source", "small_vgg", "--dataset", "brain_mri"]
    return reproduce.main(["--table", "6", "--root", str(root), "--output", str(out), "--splits", "0", "1", *short])


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def interrupted(owner: type, name: str, call: int, instead: Callable[..., Any] = die) -> Any:
    """Do something else in a function's place, when it is called for the so-many-th time."""
    original, calls = getattr(owner, name), []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return (instead if len(calls) == call else original)(*arguments, **options)

    setattr(owner, name, counting)
    yield
    setattr(owner, name, original)


def write_half(opener: Any, content: bytes) -> None:
    opener.f.write(content[: len(content) // 2])
    opener.f.flush()
    die()


class DiskFills(Callback):
    """From the third epoch on, files cannot grow."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))


def fail(root: Path, point: str) -> None:
    """Do what is to be interrupted."""
    work, _, moment = point.partition("-")
    out = root / point
    opener = fsspec.implementations.local.LocalFileOpener
    if work == "textures":
        with interrupted(Image.Image, "save", 20):
            ensure_written(out, "brick", 0)
    elif work == "reproduce":
        owner, name, call = {
            "training": (KdMultiresolution, "training_step", 2),
            "result": (Path, "replace", 4),  # each training also renames a file of its own
        }[moment]
        with interrupted(owner, name, call):
            reproduce_table(root, out)
    elif moment == "disk":
        train(root, work, out, DiskFills())
    elif moment == "caching":
        with interrupted(FileStore, "write", 3):
            train(root, work, out)
    elif moment == "training":
        with interrupted(MODELS[work], "training_step", 3 * BATCHES):
            train(root, work, out)
    elif moment == "checkpoint":
        with interrupted(opener, "write", 2, instead=write_half):
            train(root, work, out)
    else:
        raise ValueError(point)


def main(root: Path, points: list[str]) -> None:
    ends = {}
    for point in points:
        pid = os.fork()
        if pid == 0:
            log = os.open(root / f"{point}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                fail(root, point)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
                os._exit(1)
            os._exit(0)
        ends[point] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
