"""What training need not do twice: read an image, and compute the source's features of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kd_multiresolution.plugin.module import PluginModule
from kd_multiresolution.training.batches import batches_in_order, fork_rng, is_limited
from kd_multiresolution.training.feature_cache import (
    FeatureCache,
    changing_part,
    check_cache_arguments,
    made,
    resizes_to_one_size,
)
from kd_multiresolution.training.feature_stores import GIB
from kd_multiresolution.training.image_memory import RememberedImages, remembering_loader

logger = logging.getLogger(__name__)

READERS = ("anomalib.", "kd_multiresolution.")  # packages whose data sets give the same image each time


class TrainingCache(Callback):
    """Keeps the images of training and validation, and the source's features of them, for the length of one fit.

    It changes no figure, and stays out of the way where images change from epoch to epoch.

    Args:
        dtype: ``float32`` or ``float16``, precision of the kept features; ``None``: keep nothing.
        memory: GiB, on the device that trains, for images, which may take half of it, and features. Features that
            exceed it go into a file, those of validation images, which get what training images have left, into
            another one.
        folder: folder of these files; ``None``: the system's folder for temporary files.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, dtype: str | None = "float32", *, memory: float = 2.0, folder: str | Path | None = None) -> None:
        check_cache_arguments(dtype, memory, folder)
        self.dtype = dtype
        self.memory = memory
        self.folder = folder
        self.features: FeatureCache | None = None
        self.features_of_validation: FeatureCache | None = None
        self._replaced: list[tuple[AnomalibDataModule, str, object]] = []
        self._remembered: list[RememberedImages] = []

    def source_features(
        self, source: FeatureCache.Source, paths: Sequence[str] | None, images: FeatureCache.Images
    ) -> list[Tensor]:
        """Return the source's features of training images.

        Args:
            source: the source.
            paths: the images' paths, N, if they have any.
            images: the images.

        Returns:
            One (N, C_i, H_i, W_i) tensor per critical point.
        """
        if self.features is None or paths is None:
            return source(made(images))
        return self.features.features(paths, images)

    def validation_features(
        self, source: FeatureCache.Source, paths: Sequence[str] | None, images: Tensor
    ) -> list[Tensor]:
        """Return the source's features of validation images, as :meth:`source_features`; always in full precision."""
        if self.features_of_validation is None or paths is None:
            return source(images)
        return self.features_of_validation.features(paths, images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module's images read once, if they stay the same and fit into half of the memory.

        That is before anything, such as a schedule of the learning rate, asks for the trainer's loader.

        Raises:
            TypeError: if the trainer has gone over to a model that is not ours.
        """
        if not isinstance(pl_module, PluginModule):
            msg = (
                f"{type(pl_module).__name__}: this Engine, or Trainer, still has the callbacks of a model of "
                "kd_multiresolution, which Lightning leaves there. Give every model an Engine of its own."
            )
            raise TypeError(msg)
        datamodule = trainer.fit_loop._data_source.instance  # trainer.datamodule may be that of an earlier run
        if stage != "fit" or self.dtype is None or not isinstance(datamodule, AnomalibDataModule):
            return
        progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
        free = self.memory / 2
        for name in ("train_dataloader", *(["val_dataloader"] if trainer.limit_val_batches else [])):
            loader = getattr(datamodule, name)()
            if not isinstance(loader, DataLoader) or _changing_data(loader, pl_module) is not None:
                continue
            if is_limited(loader, getattr(trainer, f"limit_{name.removesuffix('_dataloader')}_batches")):
                continue
            device = trainer.strategy.root_device
            remembering = remembering_loader(loader, device=device, memory=free, progress=progress)
            free -= _gib_of_images(remembering.dataset)
            if isinstance(remembering.dataset, RememberedImages):
                self._remembered.append(remembering.dataset)
            self._replaced.append((datamodule, name, vars(datamodule).get(name)))
            setattr(datamodule, name, partial(_loader, remembering))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the features of all images, if those stay the same.

        Their last digits depend on which images a network sees together. In the order of the data set a resumed
        training computes them as the first one did.
        """
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # asks for the loader, as it would later
        self._give_back()
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if self.dtype is None:
            return
        changing = _changing_data(loader, pl_module)
        if changing is None and is_limited(cast("DataLoader[Any]", loader), trainer.limit_train_batches):
            changing = "the limit of an epoch's batches"  # most of what would be kept may never be asked for
        if changing is not None:
            logger.info("Images are read and the source's features computed in every epoch, because of %s.", changing)
            return
        source, count = cast("Any", pl_module).model.source, len(cast("AnomalibDataset", dataset))
        memory = self.memory - _gib_of_images(dataset)
        self.features = FeatureCache(source, count, memory=memory, folder=self.folder, dtype=self.dtype)
        # The global random generator decides the order of the images; a look ahead must not change it.
        with fork_rng(pl_module.device), trainer.precision_plugin.train_step_context():
            for batch in batches_in_order(trainer, pl_module):
                self.features.features(batch.image_path, cast("Any", pl_module).model.checked_images(batch.image))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make an empty cache of features of the validation images, if they stay the same."""
        if self.features is None or self.features_of_validation is not None:
            return
        loaders = cast("Any", trainer.fit_loop.epoch_loop.val_loop)._combined_loader.flattened
        if len(loaders) != 1 or _changing_data(loaders[0], pl_module):
            return
        (loader,) = loaders
        if is_limited(loader, trainer.limit_val_batches):
            return
        memory = max(self.features.memory - self.features.gib_in_memory - _gib_of_images(loader.dataset), 0)
        count = len(loader.dataset)
        self.features_of_validation = FeatureCache(
            self.features.source, count, memory=memory, folder=self.folder, use="validation"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that what was kept of validation images is theirs.

        Raises:
            RuntimeError: if it is not.
        """
        del trainer, pl_module
        if self.features_of_validation is not None:
            self.features_of_validation.raise_if_changed()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do so of training images."""
        del trainer, pl_module
        if self.features is not None:
            self.features.raise_if_changed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free everything, and leave the data module as it was."""
        del exception
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do so at the end: Lightning keeps the loaders of the last training, and with them the images."""
        del stage
        self._give_back()
        self.on_train_end(trainer, pl_module)
        for images in self._remembered:
            images.forget()
        self._remembered = []

    def _give_back(self) -> None:
        """Leave the data module as the user made it: the trainer has its loaders now."""
        for datamodule, name, own in reversed(self._replaced):
            delattr(datamodule, name)
            if own is not None:
                vars(datamodule)[name] = own
        self._replaced = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the features: from now on images may still be read, to fit thresholds."""
        del trainer, pl_module
        self.features = self.features_of_validation = None


def _loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    return loader


def _gib_of_images(dataset: object) -> float:
    return dataset.nbytes / GIB if isinstance(dataset, RememberedImages) else 0.0


def _changing_data(loader: object, pl_module: LightningModule) -> object:
    """Return what keeps the images of a loader from being the same in every epoch, or ``None``."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, RememberedImages):
        return None
    if not isinstance(dataset, AnomalibDataset):
        return "a data set that is not anomalib's"
    reads = next(kind for kind in type(dataset).__mro__ if "__getitem__" in vars(kind))
    if not reads.__module__.startswith(READERS):
        return f"{reads.__name__}.__getitem__, which may give another image each time"
    if cast("Any", loader).collate_fn != dataset.collate_fn:
        return "a collate_fn of your own"
    if not dataset.samples.image_path.is_unique:
        return "several images of one path"
    pre_processor = getattr(pl_module, "pre_processor", None)
    own = pre_processor.transform if isinstance(pre_processor, PreProcessor) else None
    if (changing := changing_part(dataset.augmentations) or changing_part(own)) is not None:
        return changing
    # anomalib resizes the images of a batch to its largest.
    return None if _have_one_size(dataset) else "files of several sizes, which do not come alone in a batch"


def _have_one_size(dataset: AnomalibDataset) -> bool:
    """Return whether all images that a data set gives are of one size; what are no files are."""
    if resizes_to_one_size(dataset.augmentations):
        return True
    sizes = set()
    for path in map(Path, dataset.samples.image_path):
        if path.is_file():
            with Image.open(path) as image:
                sizes.add(image.size)
    return len(sizes) < 2
