"""Reading images once."""

from __future__ import annotations

from pathlib import Path

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.transforms.v2 import RandomHorizontalFlip

from kd_multiresolution import KdMultiresolution
from tests.training.conftest import NUM_IMAGES


def fit(data: Folder, folder: Path, epochs: int = 3, **arguments: object) -> None:
    network = KdMultiresolution(source="small_vgg", image_size=32, epochs=epochs, visualizer=False, **arguments)  # type: ignore[arg-type]
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(network, datamodule=data)


def test_each_training_image_is_read_once(data: Folder, reads: list[str], tmp_path: Path) -> None:
    fit(data, tmp_path)
    training = [path for path in reads if "good" in path]
    # One of them once more, for its size.
    assert len(training) == NUM_IMAGES + 1
    assert len(set(training)) == NUM_IMAGES
    assert "train_dataloader" not in vars(data)


@pytest.mark.parametrize("arguments", [{"cache": None}, {"cache_memory": 1e-6}])
def test_without_cache_or_room_they_are_read_in_every_epoch(
    data: Folder, reads: list[str], tmp_path: Path, arguments: dict[str, float | None]
) -> None:
    fit(data, tmp_path, **arguments)
    assert len([path for path in reads if "good" in path]) >= 3 * NUM_IMAGES


def test_augmented_images_are_read_in_every_epoch(data: Folder, reads: list[str], tmp_path: Path) -> None:
    data.train_augmentations = RandomHorizontalFlip()
    fit(data, tmp_path)
    assert len([path for path in reads if "good" in path]) >= 3 * NUM_IMAGES


def test_with_nothing_to_train_the_data_module_gets_its_loaders_back(data: Folder, tmp_path: Path) -> None:
    replaced = []

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            replaced.extend(name for name in vars(data) if name.endswith("_dataloader"))

    network = KdMultiresolution("small_vgg", image_size=32, visualizer=False)
    engine = Engine(
        default_root_dir=tmp_path, callbacks=[Look()], max_epochs=0, logger=False, enable_progress_bar=False,
        accelerator="cpu",
    )  # fmt: skip
    engine.fit(network, datamodule=data)
    assert replaced == ["train_dataloader"]
    assert not [name for name in vars(data) if name.endswith("_dataloader")]
