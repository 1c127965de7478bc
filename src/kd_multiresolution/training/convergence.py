"""Stopping at convergence, "the only accessible criterion" of when to stop (Sec. 3.1 of arXiv 2011.11108)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

logger = logging.getLogger(__name__)


class ConvergenceStopping(Callback):
    """Stops training when the training loss has ceased to fall.

    The mean loss of the last ``window`` epochs is compared with that of the ``window`` epochs before. When it is lower
    by less than the fraction ``tolerance``, training stops at the end of the epoch. No test or validation image takes
    part.

    Args:
        window: number of epochs, 1 or more.
        tolerance: fraction of the loss, in (0, 1).

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, window: int = 20, tolerance: float = 0.03) -> None:
        if window < 1:
            msg = f"window={window!r}: expected a number of epochs, 1 or more."
            raise ValueError(msg)
        if not 0 < tolerance < 1:
            msg = f"tolerance={tolerance!r}: expected a fraction of the loss, above 0 and below 1."
            raise ValueError(msg)
        self.window = window
        self.tolerance = tolerance
        self.losses: list[float] = []
        self._sum: Tensor | float = 0.0
        self._images = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know of no loss of an earlier training, unless the same Trainer goes on with it."""
        del pl_module
        if stage == "fit" and trainer.current_epoch == 0:
            self.begin()

    def begin(self) -> None:
        """Begin anew."""
        self.losses, self._sum, self._images = [], 0.0, 0

    @property
    def converged(self) -> bool:
        """Whether the last two windows differ by less than the tolerance."""
        if len(self.losses) < 2 * self.window:
            return False
        before, last = (sum(losses) for losses in (self.losses[: self.window], self.losses[self.window :]))
        return last >= before * (1 - self.tolerance)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's loss; after the last one decide, so that this epoch's validation still runs."""
        del pl_module, batch_idx
        # The sum stays on the device: reading it in every step would make the host wait for it.
        self._sum = self._sum + outputs["loss"].detach().float() * batch.batch_size
        self._images += batch.batch_size
        if not trainer.is_last_batch:
            return
        loss = trainer.strategy.reduce(torch.as_tensor(self._sum / self._images), reduce_op="mean")
        self.losses = [*self.losses, float(loss)][-2 * self.window :]
        self._sum, self._images = 0.0, 0
        self.on_epoch_loss(trainer)

    def on_epoch_loss(self, trainer: Trainer) -> None:
        """Stop training if it has converged; called after the last batch of each epoch."""
        if self.converged:
            trainer.should_stop = True
            self.report(trainer.current_epoch + 1)

    def report(self, epochs: int) -> None:
        """Log after how many epochs training has converged."""
        logger.info(
            "The training loss has converged after %d epochs: it fell by less than %g %% over the last %d.",
            epochs,
            100 * self.tolerance,
            self.window,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the last two windows, and of the epoch under way the sum so far."""
        return {"losses": list(self.losses), "sum": float(self._sum), "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses."""
        self.losses = list(state_dict["losses"])
        self._sum, self._images = state_dict.get("sum", 0.0), state_dict.get("images", 0)
