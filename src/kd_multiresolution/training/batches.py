"""The batches of the training images, as a training step gets them, for whoever looks at them beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kd_multiresolution.training.feature_stores import GIB
from kd_multiresolution.training.image_memory import RememberedImages

T = TypeVar("T")


def training_batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield the batches of this process's training images, on its device and pre-processed.

    Args:
        trainer: whose training is about to start, or under way.
        pl_module: anomalib's, with a pre-processor.
    """
    return _prepared(trainer, pl_module, cast("Iterable[ImageBatch]", trainer.train_dataloader))


def batches_of_an_epoch(trainer: Trainer, pl_module: LightningModule, *, fewest: int = 0) -> Iterator[Any]:
    """Yield as :func:`training_batches`, but no more batches than the user lets an epoch have.

    Args:
        trainer: see :func:`training_batches`.
        pl_module: see :func:`training_batches`.
        fewest: images with paths that there are in any case, if the data set has them.
    """
    return _prepared(trainer, pl_module, _of_an_epoch(trainer, fewest))


def _of_an_epoch(trainer: Trainer, fewest: int) -> Iterator[Any]:
    images = 0
    for number, batch in enumerate(cast("Iterable[Any]", trainer.train_dataloader), start=1):
        yield batch
        images += len(getattr(batch, "image_path", None) or ())
        if number >= trainer.num_training_batches and images >= fewest:
            return


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Leave the random generators as they are, the host's and the device's: they decide the order of the images."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def is_limited(loader: DataLoader[Any], limit: float) -> bool:
    """Return whether an epoch has a part of a loader's batches.

    Args:
        loader: the loader.
        limit: the trainer's ``limit_train_batches`` or ``limit_val_batches``, which ``fast_dev_run`` sets.
    """
    return limit < (len(loader) if isinstance(limit, int) else 1.0)


def batches_in_order(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield all training images, as :func:`training_batches`, but in the order of their data set: always the same."""
    loader = cast("DataLoader[Any]", trainer.train_dataloader)
    in_order = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 1,  # a batch sampler has no size
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    return _prepared(trainer, pl_module, in_order)


def _prepared(trainer: Trainer, pl_module: LightningModule, loader: Iterable[ImageBatch]) -> Iterator[Any]:
    pre_processor = cast("Any", pl_module).pre_processor
    for batch_on_host in loader:
        batch = trainer.strategy.batch_to_device(batch_on_host)
        if isinstance(pre_processor, Callback):
            pre_processor.on_train_batch_start(trainer, pl_module, batch, 0)
        yield batch


def paths_and_batches(
    trainer: Trainer, pl_module: LightningModule, *, fewest: int, memory: float
) -> tuple[list[str], Iterator[Any]]:
    """Return the paths of the images of an epoch, those of other processes included, and :func:`batches_of_an_epoch`.

    A data set of anomalib's has the paths. Of any other one, and where the user limits an epoch, images are read for
    the paths that come with them, and once more if they exceed the memory.

    Args:
        trainer: see :func:`training_batches`.
        pl_module: see :func:`training_batches`.
        fewest: see :func:`batches_of_an_epoch`.
        memory: GiB for the images.

    Raises:
        TypeError: if the images come without paths.
    """
    loader = cast("DataLoader[Any]", trainer.train_dataloader)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, AnomalibDataset | RememberedImages) and not is_limited(loader, trainer.limit_train_batches):
        known = dataset.paths if isinstance(dataset, RememberedImages) else [*dataset.samples.image_path]
        return known, batches_of_an_epoch(trainer, pl_module, fewest=fewest)
    paths: list[str] = []
    kept: list[Any] = []
    free = memory * GIB
    with fork_rng(pl_module.device):
        for batch in _of_an_epoch(trainer, fewest):
            paths += paths_of(batch)
            free -= batch.image.nbytes
            kept.append(batch)
            if free < 0:
                kept.clear()
    batches = kept if free >= 0 else _of_an_epoch(trainer, fewest)
    return of_all_processes(trainer, paths), _prepared(trainer, pl_module, batches)


def paths_of(batch: Any) -> list[str]:
    """Return the paths of a batch's images, which are their names.

    Raises:
        TypeError: if it has none.
    """
    paths = getattr(batch, "image_path", None)
    if paths is None:
        msg = (
            f"{type(batch).__name__} without image_path: some training images are held out, so each needs a name of "
            "its own. Give the batches an image_path per image, a file or any other name."
        )
        raise TypeError(msg)
    return list(paths)


def sum_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    return cast("Tensor", trainer.strategy.reduce(tensor, reduce_op="sum"))


def of_all_processes(trainer: Trainer, items: Iterable[T]) -> list[T]:
    """Return the items of all processes, which all have to ask."""
    mine = [*items]
    if trainer.world_size == 1:
        return mine
    parts: list[list[T]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, mine)
    return [item for part in parts for item in part]
