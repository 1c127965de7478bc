"""What training need not do twice: read an image, compute the source's features of it, ask the system for memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_multiresolution.training.allocator import hold_freed_memory, release_freed_memory
from kd_multiresolution.training.feature_cache import FeatureCache, changing_part, check_cache_arguments
from kd_multiresolution.training.feature_stores import GIB
from kd_multiresolution.training.image_memory import RememberedImages, remembering_loader

logger = logging.getLogger(__name__)


class TrainingCache(Callback):
    """Keeps training images and the source's features of them for the length of one fit.

    It changes no figure, and stays out of the way where images change from epoch to epoch.

    Args:
        dtype: ``float32`` or ``float16``, precision of the kept features; ``None``: keep nothing.
        memory: GiB for images, which may take half of it, and features. Features that exceed it go into a file.
        folder: folder of that file; ``None``: the system's folder for temporary files.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, dtype: str | None = "float32", *, memory: float = 2.0, folder: str | Path | None = None) -> None:
        check_cache_arguments(dtype, memory, folder)
        self.dtype = dtype
        self.memory = memory
        self.folder = folder
        self.features: FeatureCache | None = None
        self._replaced: tuple[AnomalibDataModule, object] | None = None

    def source_features(self, source: FeatureCache.Source, paths: Sequence[str] | None, images: Tensor) -> list[Tensor]:
        """Return the source's features of training images.

        Args:
            source: the source.
            paths: the images' paths, N, if they have any.
            images: (N, 3, H, W).

        Returns:
            One (N, C_i, H_i, W_i) tensor per critical point.
        """
        if self.features is None or paths is None:
            return source(images)
        return self.features.features(paths, images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module's training images read, if they stay the same and fit into half of the memory.

        That is before anything, such as a schedule of the learning rate, asks for the trainer's loader.
        """
        datamodule = getattr(trainer, "datamodule", None)
        if stage != "fit" or self.dtype is None or not isinstance(datamodule, AnomalibDataModule):
            return
        loader = datamodule.train_dataloader()
        if _changing_data(loader.dataset, pl_module) is None:
            progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
            remembering = remembering_loader(loader, memory=self.memory / 2, progress=progress)
            self._replaced = datamodule, vars(datamodule).get("train_dataloader")
            datamodule.train_dataloader = lambda: remembering  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep freed memory."""
        del trainer
        if pl_module.device.type == "cpu":
            hold_freed_memory()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make an empty cache of features, if images stay the same."""
        self._give_back()
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if self.dtype is None:
            return
        remembered = isinstance(dataset, RememberedImages)
        if not remembered and (changing := _changing_data(dataset, pl_module)):
            logger.info("Images are read and the source's features computed in every epoch, because of %s.", changing)
            return
        self.features = FeatureCache(
            cast("Any", pl_module).model.source,
            len(cast("AnomalibDataset", dataset)),
            memory=self.memory - (dataset.nbytes / GIB if isinstance(dataset, RememberedImages) else 0),
            folder=self.folder,
            dtype=self.dtype,
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free everything, and leave the data module as it was."""
        del exception
        self._give_back()
        self.on_train_end(trainer, pl_module)

    def _give_back(self) -> None:
        """Leave the data module as the user made it: the trainer has its loader now."""
        if self._replaced is not None:
            datamodule, own = self._replaced
            del datamodule.train_dataloader
            if own is not None:
                vars(datamodule)["train_dataloader"] = own
            self._replaced = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free everything."""
        del trainer, pl_module
        self.features = None
        release_freed_memory()


def _changing_data(dataset: object, pl_module: LightningModule) -> object:
    """Return what keeps the training images from being the same in every epoch, or ``None``."""
    if not isinstance(dataset, AnomalibDataset):
        return "a data set that is not anomalib's"
    if not dataset.samples.image_path.is_unique:
        return "several images of one path"
    pre_processor = getattr(pl_module, "pre_processor", None)
    own = pre_processor.transform if isinstance(pre_processor, PreProcessor) else None
    return changing_part(dataset.augmentations) or changing_part(own)
