"""The cache of the source's features: invisible in the figures, bounded, and never used where images change."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.training.feature_cache import FeatureCache, changing_part
from kd_multiresolution.training.feature_stores import GIB
from tests.data.generated import write_noise_folders

NUM_IMAGES = 10
BYTES_PER_IMAGE = 4 * (2 * 4 * 4 + 3 * 2 * 2)


class CountedSource:
    """Two levels of different sizes; counts the images that it has seen."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.images += len(images)
        means = images.mean(1, keepdim=True)
        levels = [nn.functional.avg_pool2d(means, size) for size in (2, 4)]
        return [levels[0].repeat(1, 2, 1, 1), levels[1].repeat(1, 3, 1, 1)]


def images_and_paths() -> tuple[Tensor, list[str]]:
    images = torch.rand(NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, [f"{i}.png" for i in range(NUM_IMAGES)]


def batches(cache: FeatureCache, epochs: int = 3) -> None:
    """Run shuffled epochs and compare every batch with what the source gives."""
    images, paths = images_and_paths()
    for epoch in range(epochs):
        order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(4):
            features = cache.features([paths[i] for i in batch], images[batch])
            for cached, computed in zip(features, CountedSource()(images[batch]), strict=True):
                torch.testing.assert_close(
                    cached, computed.to(cached), rtol=0, atol=1e-3 * (cache.dtype != torch.float32)
                )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_image_is_computed_once(dtype: str) -> None:
    source = CountedSource()
    cache = FeatureCache(source, NUM_IMAGES, dtype=dtype)
    batches(cache)
    assert len(cache) == NUM_IMAGES
    assert source.images == NUM_IMAGES


@pytest.mark.parametrize("in_memory", [0, 4])
def test_what_exceeds_the_memory_goes_into_a_file_without_a_name(in_memory: int, tmp_path: Path) -> None:
    source = CountedSource()
    cache = FeatureCache(source, NUM_IMAGES, memory=(in_memory + 0.5) * BYTES_PER_IMAGE / GIB, folder=tmp_path)
    batches(cache)
    assert len(cache) == NUM_IMAGES
    assert source.images == NUM_IMAGES
    assert not list(tmp_path.iterdir())


def test_without_room_the_rest_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    source = CountedSource()
    cache = FeatureCache(source, NUM_IMAGES, memory=4.5 * BYTES_PER_IMAGE / GIB, folder=tmp_path)
    batches(cache, epochs=2)
    assert len(cache) == 4
    assert source.images == NUM_IMAGES + (NUM_IMAGES - 4)
    assert not list(tmp_path.iterdir())
    assert "4 images fit" in caplog.text
    assert "No space left" in caplog.text


@pytest.mark.parametrize("use", ["training", "validation"])
def test_an_image_that_changes_is_noticed(use: str) -> None:
    images, paths = images_and_paths()
    cache = FeatureCache(CountedSource(), NUM_IMAGES, use=use)
    cache.features(paths, images)
    other = images.clone()
    other[7] = images[7].flip(2)  # a single one, which is not the first
    cache.features(paths, other)
    with pytest.raises(RuntimeError, match=rf"7\.png: this {use} image is not the same"):
        cache.raise_if_changed()
    cache.features(paths, other)
    cache.raise_if_changed()  # each is looked at once


def test_an_image_may_come_twice_in_a_batch() -> None:
    images, paths = images_and_paths()
    cache = FeatureCache(CountedSource(), NUM_IMAGES)
    rows = [0, 1, 0]
    for _ in range(3):
        features = cache.features([paths[row] for row in rows], images[rows])
        for cached, computed in zip(features, CountedSource()(images[rows]), strict=True):
            torch.testing.assert_close(cached, computed)
    cache.raise_if_changed()


class Flipping(Folder):
    """Mirrors images but the first every other time, where only their pixels show it and Lightning expects it."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        del dataloader_idx
        self.times: Counter[str] = getattr(self, "times", Counter())
        self.times.update(batch.image_path)
        for row, path in enumerate(batch.image_path):
            if self.trainer.training and path != self.train_data.samples.image_path[0] and self.times[path] % 2:
                batch.image[row] = batch.image[row].flip(-1)
        return batch


@pytest.mark.parametrize("model", [KdMultiresolution, KdMultiresolutionDual])
def test_a_data_module_that_changes_images_is_noticed(model: type[Any], tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 6)
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 3}
    data: dict[str, Any] = {"root": tmp_path, "normal_dir": "good", "abnormal_dir": "bad", "train_batch_size": 3}
    data |= {"num_workers": 0, "val_split_mode": "same_as_test", "test_split_ratio": 0.01}
    with pytest.raises(RuntimeError, match=r"\.png: this training image is not the same"):
        Engine(default_root_dir=tmp_path / "kept", **settings).fit(
            model("small_vgg", image_size=32, visualizer=False), datamodule=Flipping("noise", **data)
        )
    Engine(default_root_dir=tmp_path / "computed", **settings).fit(
        model("small_vgg", image_size=32, visualizer=False, cache=None), datamodule=Flipping("noise", **data)
    )


def test_features_that_rounding_moves_are_no_other_image() -> None:
    """In bfloat16 another batch may move a ResNet's features by more than another image would."""
    images, paths = images_and_paths()
    source = CountedSource()
    cache = FeatureCache(lambda batch: [level + source.images / 10 for level in source(batch)], NUM_IMAGES)
    first = cache.features(paths, images)
    torch.testing.assert_close(cache.features(paths, images), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("transform", "part"),
    [
        (None, None),
        (v2.Resize(32), None),
        (v2.Compose([v2.Resize(32), v2.Normalize([0.5] * 3, [0.5] * 3)]), None),
        (v2.RandomHorizontalFlip(), v2.RandomHorizontalFlip),
        (v2.Compose([v2.Resize(32), v2.Compose([v2.RandomRotation(5)])]), v2.RandomRotation),
        (nn.Sequential(v2.Resize(32), v2.ColorJitter(0.1)), v2.ColorJitter),
        (nn.Dropout(), nn.Dropout),
    ],
)
def test_changing_part(transform: nn.Module | None, part: type[nn.Module] | None) -> None:
    found = changing_part(transform)
    assert (found if part is None else type(found)) is part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "float64"}, "cache='float64'"),
        ({"cache_memory": -1.0}, "cache_memory=-1.0"),
        ({"cache_memory": float("nan")}, "cache_memory=nan"),
        ({"cache_folder": "/no/such/folder"}, "cache_folder='/no/such/folder'"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KdMultiresolution(source="small_vgg", **arguments)


class Losses(Callback):
    """Keeps the training loss of every step, and how many images the cache holds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kept: int | None = None
        self.num_images = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        del args
        self.num_images = len(trainer.train_dataloader.dataset)
        self.losses.append(float(outputs["loss"]))
        self.kept = None if (cache := pl_module.training_cache.features) is None else len(cache)


def train(pictures: Path, folder: Path, augmentations: v2.Transform | None = None, **arguments: Any) -> Losses:
    seed_everything(0)
    losses = Losses()
    precision = arguments.pop("precision", "32-true")
    network = KdMultiresolution(source="small_vgg", image_size=32, epochs=3, visualizer=False, **arguments)
    data = Folder(
        "noise", root=pictures, normal_dir="good", train_batch_size=3, eval_batch_size=3, num_workers=0,
        train_augmentations=augmentations, val_split_mode="from_train", test_split_mode="none", seed=0,
    )  # fmt: skip
    engine = Engine(
        default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[losses], precision=precision,
    )  # fmt: skip
    engine.fit(network, datamodule=data)
    assert network.training_cache.features is None
    return losses


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "good").mkdir()
    for i in range(NUM_IMAGES):
        save_image(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)), root / "good" / f"{i}.png")
    return root


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_is_invisible_in_the_losses(precision: str, pictures: Path, tmp_path: Path) -> None:
    without = train(pictures, tmp_path / "without", cache=None, precision=precision)
    cached = train(pictures, tmp_path / "with", precision=precision)
    on_disk = train(pictures, tmp_path / "disk", precision=precision, cache_memory=0.0)
    assert (without.kept, cached.kept, on_disk.kept) == (None, cached.num_images, on_disk.num_images)
    assert cached.losses == on_disk.losses == without.losses
    assert cached.losses[-1] < cached.losses[0]


def test_files_are_said_to_be_what_they_are(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_multiresolution")
    train(pictures, tmp_path, cache_memory=0.0)
    said = [message for message in caplog.messages if "GiB of source features" in message]
    assert [message.split()[1] for message in said] == ["training", "validation"]


def test_random_augmentation_switches_it_off(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_multiresolution")
    losses = train(pictures, tmp_path, augmentations=v2.RandomHorizontalFlip())
    assert losses.kept is None
    assert "RandomHorizontalFlip" in caplog.text
