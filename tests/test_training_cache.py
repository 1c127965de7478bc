"""Reading images once, and the allocator's setting."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import anomalib.data.datasets.base.image as anomalib_images
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from torch.utils.data import DataLoader, SubsetRandomSampler
from torchvision.transforms.v2 import RandomHorizontalFlip
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.training.allocator import hold_freed_memory, release_freed_memory
from kd_multiresolution.training.image_memory import RememberedImages, remembering_loader

NUM_IMAGES = 6


@pytest.fixture
def data(tmp_path: Path) -> Folder:
    (tmp_path / "good").mkdir()
    (tmp_path / "defect").mkdir()
    for i in range(NUM_IMAGES):
        save_image(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)), tmp_path / "good" / f"{i}.png")
    save_image(torch.ones(3, 40, 40), tmp_path / "defect" / "0.png")
    return Folder(
        "noise", root=tmp_path, normal_dir="good", abnormal_dir="defect", normal_test_dir="defect",
        train_batch_size=4, eval_batch_size=4, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the path of every image that is read."""
    paths: list[str] = []
    read = anomalib_images.read_image

    def counted(path: str, as_tensor: bool = False) -> object:
        paths.append(str(path))
        return read(path, as_tensor=as_tensor)

    monkeypatch.setattr(anomalib_images, "read_image", counted)
    return paths


def fit(data: Folder, folder: Path, epochs: int = 3, **arguments: object) -> None:
    network = KdMultiresolution(source="light_vgg", image_size=32, epochs=epochs, visualizer=False, **arguments)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_remembered_batches_are_the_loaders_own(data: Folder, shuffle: bool, workers: int) -> None:
    data.setup()
    dataset = data.train_data
    original = DataLoader(dataset, batch_size=4, shuffle=shuffle, num_workers=workers, collate_fn=dataset.collate_fn)
    remembering = remembering_loader(original, memory=1.0, progress=False)
    assert isinstance(remembering.dataset, RememberedImages)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = list(original)
        torch.manual_seed(seed)
        for batch, other in zip(remembering, expected, strict=True):
            assert batch.image_path == other.image_path
            assert torch.equal(batch.image, other.image)
            assert torch.equal(batch.gt_label, other.gt_label)


def test_a_loader_with_an_order_of_its_own_is_left_alone(data: Folder) -> None:
    data.setup()
    dataset = data.train_data
    loader = DataLoader(dataset, sampler=SubsetRandomSampler([0, 2]), collate_fn=dataset.collate_fn)
    assert remembering_loader(loader, memory=1.0, progress=False) is loader


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
