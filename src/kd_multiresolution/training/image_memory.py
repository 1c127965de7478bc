"""Images of a training decoded and resized once, and kept in the memory of the device that trains, if they fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataset, ImageItem
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from kd_multiresolution.training.feature_stores import GIB


class RememberedImages(Dataset[ImageItem]):
    """The items of a data set, in memory.

    Args:
        items: the items.
        dataset: the data set, which is read again once the items are forgotten.
    """

    def __init__(self, items: list[ImageItem], dataset: AnomalibDataset) -> None:
        self.items = items
        self.dataset = dataset

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(map(_size, self.items))

    @property
    def paths(self) -> list[str]:
        """The images' paths."""
        return [*self.dataset.samples.image_path]

    def forget(self) -> None:
        """Free the memory: whoever still holds this reads the images from now on."""
        self.items = []

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageItem:
        """Return an item; its tensors are shared, as collating copies them."""
        return copy.copy(self.items[index]) if self.items else cast("ImageItem", self.dataset[index])


def remembering_loader(
    loader: DataLoader[ImageItem], *, device: torch.device, memory: float, progress: bool
) -> DataLoader[ImageItem]:
    """Return a loader of the same batches in the same order, that reads all images now and never again.

    Args:
        loader: a loader of a data set whose items do not change, and have one size.
        device: where images are kept, and batches put together.
        memory: budget in GiB, on that device.
        progress: show a progress bar.

    Returns:
        The loader itself if the images exceed the budget, or if it draws them in an order of its own.
    """
    dataset = cast("AnomalibDataset", loader.dataset)
    sampler = loader.sampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement and sampler.generator is None
    plain = loader.batch_size is not None and (shuffled or type(sampler) is SequentialSampler)
    if not plain or len(dataset) == 0 or len(dataset) * _size(cast("ImageItem", dataset[0])) > memory * GIB:
        return loader
    reading = DataLoader(dataset, batch_size=None, num_workers=loader.num_workers, collate_fn=_as_it_is)
    items: Iterator[ImageItem] = iter(reading)
    if progress:
        items = iter(track(items, description="Reading images", total=len(dataset)))
    remembered = RememberedImages([_copy_on(device, item) for item in items], dataset)
    return DataLoader(
        remembered,
        batch_size=loader.batch_size,
        shuffle=shuffled,
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory and device.type == "cpu",
    )


def _copy_on(device: torch.device, item: ImageItem) -> ImageItem:
    # A copy on the host, too: what loader processes send lives in shared memory, one open file per tensor.
    kept = copy.copy(item)
    for name, field in vars(item).items():
        setattr(kept, name, field.to(device, copy=True) if isinstance(field, Tensor) else copy.copy(field))
    return kept


def _size(item: ImageItem) -> int:
    return sum(field.nbytes for field in vars(item).values() if isinstance(field, Tensor))


def _as_it_is(item: Any) -> Any:
    return item
