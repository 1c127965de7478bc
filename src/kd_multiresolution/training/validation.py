"""Validation in few epochs: it costs more than an epoch of training, and fits the post-processor alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class SparseValidation(Callback):
    """Validates every ``interval`` epochs and in the last one, if the user left validation at Lightning's default.

    Args:
        interval: epochs from one validation to the next.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this epoch ends with a validation."""
        del pl_module
        if self._decides(trainer):
            is_last = trainer.current_epoch + 1 == trainer.max_epochs
            trainer.check_val_every_n_epoch = 1 if is_last else self.interval

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Validate in the epoch in which training stops."""
        del pl_module, args
        if trainer.should_stop and self._decides(trainer):
            trainer.check_val_every_n_epoch = 1

    def _decides(self, trainer: Trainer) -> bool:
        """Whether the user left validation at Lightning's default, and the last epoch can be told beforehand."""
        bounded = trainer.max_steps == -1 and trainer.max_epochs not in {None, -1}
        return bounded and trainer.check_val_every_n_epoch in {1, self.interval}
