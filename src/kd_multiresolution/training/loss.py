"""What becomes of a training loss: it is logged by its terms, and ends the training when it is no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_multiresolution.plugin.finite import SICK_IMAGE
from kd_multiresolution.training.batches import training_batches


class EpochLosses(Callback):
    """Logs the mean loss of each epoch as ``train_loss``, and that of each of its terms as ``train_<term>``.

    Sums stay on the device. Lightning's own means would take a metric per term in every step, and copies of all.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._images = 0

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], batch_size: int) -> None:
        """Add a step's loss.

        Args:
            loss: what is minimised.
            terms: by name, of any shape.
            batch_size: by which the epoch's mean is weighted.
        """
        self._names = ["loss", *terms]
        means = torch.stack([loss.detach(), *(term.detach().mean() for term in terms.values())])
        wide = means.to(torch.promote_types(means.dtype, torch.float32))
        self._sums = batch_size * wide if self._sums is None else self._sums.add_(wide, alpha=batch_size)
        self._images += batch_size

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        del trainer, pl_module
        self._sums, self._images = None, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after the epoch's last batch, so that whatever looks at its end finds the means."""
        del outputs, batch, batch_idx
        if trainer.is_last_batch:
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log an epoch that ends before its last batch."""
        del trainer
        self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        if self._sums is None:
            return
        for name, mean in zip(self._names, (self._sums / self._images).unbind(), strict=True):
            pl_module.log(
                f"train_{name}",
                mean,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=self._images,
                sync_dist=True,
            )
        self._sums = None


class FiniteLoss(Callback):
    """Checks once per epoch that the loss is finite: nothing comes back from where it is not.

    Raises:
        ValueError: at the end of the epoch, if it is not; an image that is not finite is named.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss of the epoch's last batch."""
        del batch, batch_idx
        # A reduction writes into what it is given, and others read the outputs after this.
        self._last = cast("Mapping[str, Tensor]", outputs)["loss"].detach().clone()
        if trainer.is_last_batch:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check an epoch that ends before its last batch."""
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, self._last = self._last, None
        if loss is None:
            return
        if bool(trainer.strategy.reduce(loss, reduce_op="mean").isfinite()):
            return
        sick = [
            path
            for batch in training_batches(trainer, pl_module)
            for path, image in zip(getattr(batch, "image_path", None) or (), batch.image, strict=False)
            if not bool(image.isfinite().all())
        ]
        rate = cast("Any", pl_module).learning_rate
        why = (
            f"{sick[0]}: {SICK_IMAGE}" if sick else f"learning_rate={rate:g} may be too high, or the precision too low"
        )
        msg = f"The training loss is {float(loss)} after epoch {trainer.current_epoch + 1}. {why}."
        raise ValueError(msg)
