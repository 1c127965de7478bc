"""Reading images once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.transforms.v2 import CenterCrop, RandomHorizontalFlip
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.training.image_memory import RememberedImages
from tests.training.conftest import NUM_IMAGES


def fit(data: Folder, folder: Path, epochs: int = 3, **arguments: Any) -> Engine:
    network = KdMultiresolution("small_vgg", **{"image_size": 32, "epochs": epochs, "visualizer": False, **arguments})
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(network, datamodule=data)
    return engine


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


def test_a_data_set_that_reads_for_itself_is_read_in_every_epoch(
    data: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = set()

    class Brightened(FolderDataset):
        """Gives another image each time, of which its augmentations say nothing."""

        def __getitem__(self, index: int) -> ImageItem:
            item = super().__getitem__(index)
            item.image = item.image * float(torch.rand(()))
            seen.add(float(item.image.sum()))
            return item

    monkeypatch.setattr("anomalib.data.datamodules.image.folder.FolderDataset", Brightened)
    with caplog.at_level("INFO"):
        fit(data, tmp_path)
    assert len(seen) >= 3 * NUM_IMAGES
    assert "Brightened.__getitem__" in caplog.text


class Look(Callback):
    """Notes which loaders of a data module are replaced."""

    def __init__(self, data: Folder) -> None:
        self.data = data
        self.replaced: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.replaced = [name for name in vars(self.data) if name.endswith("_dataloader")]


@pytest.mark.parametrize(
    ("limit", "replaced"), [(1.0, ["train_dataloader", "val_dataloader"]), (1, ["train_dataloader"])]
)
def test_with_nothing_to_train_the_data_module_gets_its_loaders_back(
    limit: float, replaced: list[str], data: Folder, tmp_path: Path
) -> None:
    data = Folder(
        "noise", root=tmp_path, normal_dir="good", abnormal_dir="defect", normal_test_dir="defect", num_workers=0,
        train_batch_size=4, eval_batch_size=1, val_split_mode="from_train", val_split_ratio=0.34,
    )  # fmt: skip
    look = Look(data)
    network = KdMultiresolution("small_vgg", image_size=32, visualizer=False)
    engine = Engine(
        default_root_dir=tmp_path, callbacks=[look], max_epochs=0, logger=False, enable_progress_bar=False,
        accelerator="cpu", limit_val_batches=limit,
    )  # fmt: skip
    engine.fit(network, datamodule=data)
    assert look.replaced == replaced
    assert not [name for name in vars(data) if name.endswith("_dataloader")]


def test_images_are_let_go_after_the_training_and_can_still_be_read(
    data: Folder, reads: list[str], tmp_path: Path
) -> None:
    trainer = fit(data, tmp_path).trainer
    images = trainer.train_dataloader.dataset
    assert isinstance(images, RememberedImages)
    assert images.nbytes == 0
    reads.clear()
    assert images[0].image_path in images.paths
    assert len(reads) == 1


def test_images_that_a_batch_resizes_are_read_in_every_epoch(
    data: Folder, reads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """anomalib resizes the images of a batch to the largest of it, so that features depend on the company."""
    save_image(torch.rand(3, 48, 40), tmp_path / "good" / "large.png")
    with caplog.at_level("INFO"):
        fit(data, tmp_path, image_size=None, pre_processor=PreProcessor(CenterCrop(32)))
    assert len([path for path in reads if "good" in path]) >= 3 * NUM_IMAGES
    assert any("because of files of several sizes" in message for message in caplog.messages)


def test_a_collate_function_of_the_users_own_sees_every_batch(data: Folder, tmp_path: Path) -> None:
    seen = []

    def collated(items: list[ImageItem]) -> ImageBatch:
        seen.extend(item.image_path for item in items)
        return ImageBatch.collate(items)

    data.external_collate_fn = collated
    fit(data, tmp_path)
    assert len([path for path in seen if "good" in str(path)]) >= 3 * NUM_IMAGES


def test_without_a_validation_image_it_trains(data: Folder, tmp_path: Path) -> None:
    empty = Folder(
        "noise", root=tmp_path, normal_dir="good", abnormal_dir="defect", normal_test_dir="defect", num_workers=0,
        train_batch_size=4, val_split_mode="from_train", val_split_ratio=0.01,
    )  # fmt: skip
    assert fit(empty, tmp_path, epochs=1).trainer.current_epoch == 1


def test_validation_loaders_may_have_names(data: Folder, tmp_path: Path) -> None:
    data.setup()
    network = KdMultiresolution("small_vgg", image_size=32, epochs=1, visualizer=False)
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(network, train_dataloaders=data.train_dataloader(), val_dataloaders={"test": data.test_dataloader()})
    assert bool(network.post_processor.image_threshold.isfinite())
