"""The training loss: logged once per epoch, and no step waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from operators import WAITING, OperatorCounter

MODELS = [KdMultiresolution, KdMultiresolutionDual]
BATCHES = [3, 3, 3, 2]


class Watching(Callback):
    """Keeps what each step costs and loses, and what an epoch's end finds logged."""

    def __init__(self) -> None:
        self.counters: list[OperatorCounter] = []
        self.losses: list[list[float]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append([])

    def on_train_batch_start(self, *_: Any) -> None:
        self.counters.append(OperatorCounter())
        self.counters[-1].__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counters[-1].__exit__(None, None, None)
        assert len(batch.image) == BATCHES[batch_idx]
        self.losses[-1].append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.logged.append({name: float(value) for name, value in metrics.items() if name.startswith("train_")})

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.last = float(trainer.callback_metrics["train_loss"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "good").mkdir()
    for i in range(sum(BATCHES)):
        save_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)), root / "good" / f"{i}.png")
    return root


def mean(losses: list[float]) -> float:
    counts = BATCHES[: len(losses)]
    return sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)


def watched(model: type[Any], pictures: Path, out: Path, *callbacks: Callback, **arguments: Any) -> Watching:
    data = Folder(
        "noise", root=pictures, normal_dir="good", train_batch_size=3, num_workers=0, val_split_mode="none",
        test_split_mode="none",
    )  # fmt: skip
    watching = Watching()
    network = model("small_vgg", critical_points=["pool2", "pool3", "pool4"], image_size=32, epochs=2, visualizer=False)
    Engine(
        default_root_dir=out, callbacks=[watching, *callbacks], logger=False, accelerator="cpu",
        enable_progress_bar=False, limit_val_batches=0, **arguments,
    ).fit(network, datamodule=data)  # fmt: skip
    return watching


@pytest.mark.parametrize("model", MODELS)
def test_the_mean_over_images_is_logged_at_the_end_of_every_epoch(
    model: type[Any], pictures: Path, tmp_path: Path
) -> None:
    watching = watched(model, pictures, tmp_path)
    terms = {"train_value", "train_direction"} if model is KdMultiresolution else {"train_local", "train_global"}
    assert len(watching.logged) == 2
    for losses, logged in zip(watching.losses, watching.logged, strict=True):
        assert logged.keys() == {"train_loss"} | terms
        assert logged["train_loss"] == pytest.approx(mean(losses), rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_an_epoch_that_ends_before_its_last_batch_is_logged(model: type[Any], pictures: Path, tmp_path: Path) -> None:
    watching = watched(model, pictures, tmp_path, max_steps=6)
    assert [len(losses) for losses in watching.losses] == [4, 2]
    assert watching.last == pytest.approx(mean(watching.losses[-1]), rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_no_step_waits_for_the_device(model: type[Any], pictures: Path, tmp_path: Path) -> None:
    first, *others = watched(model, pictures, tmp_path).counters  # the first one checks the kept features
    assert first.names.total() > 100
    assert [counter.names[WAITING] for counter in others] == [0] * 7


class Poison(Callback):
    """Weights become no number after the first step of the second epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(BATCHES) + 1:
            for weight in pl_module.parameters():
                weight.data.fill_(torch.nan)


@pytest.mark.parametrize("model", MODELS)
def test_a_training_that_ends_within_an_epoch_does_not_end_with_a_loss_that_is_no_number(
    model: type[Any], pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="training loss is nan after epoch 2"):
        watched(model, pictures, tmp_path, Poison(), max_steps=6)
