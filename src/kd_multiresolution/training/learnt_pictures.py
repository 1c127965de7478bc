"""What the training images are like, noted while they are read for the first time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_multiresolution.plugin.learnt import distribution
from kd_multiresolution.plugin.pictures import STATISTICS
from kd_multiresolution.training.batches import of_all_processes


class LearntPictures(Callback):
    """Notes brightness, contrast and sharpness of the images of the first epoch, as the model is given them."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        del trainer, pl_module
        self._found = {name: [] for name in STATISTICS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at a batch, and after the epoch's last one let the model know, before any checkpoint is written."""
        del outputs, batch_idx
        if trainer.current_epoch > 0 or not hasattr(pl_module, "picture_statistics"):  # another model's training
            return
        for name, values in cast("Any", pl_module).picture_statistics(batch.image).items():
            self._found[name] += values
        if trainer.is_last_batch:
            self._note(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the model know of an epoch that ends before its last batch."""
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0 or not all(self._found.values()):  # resumed behind an epoch's last batch
            return
        module = cast("Any", pl_module)
        pictures = {name: distribution(of_all_processes(trainer, values)) for name, values in self._found.items()}
        module.learnt = replace(module.learnt, pictures=pictures)
