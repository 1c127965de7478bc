"""What becomes of a training loss: it is logged by its terms, and ends the training when it is no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_multiresolution.plugin.finite import SICK_IMAGE
from kd_multiresolution.training.batches import training_batches


def log_losses(pl_module: LightningModule, terms: Mapping[str, Tensor], loss: Tensor, batch_size: int) -> None:
    """Log a step's loss as ``train_loss``, and each of its terms' means as ``train_<term>``, once per epoch.

    Args:
        pl_module: in its training step.
        terms: by name, of any shape.
        loss: what is minimised.
        batch_size: by which the epoch's mean is weighted.
    """
    for name, mean in {"loss": loss.detach(), **{name: term.detach().mean() for name, term in terms.items()}}.items():
        pl_module.log(
            f"train_{name}",
            mean,
            on_step=False,
            on_epoch=True,
            prog_bar=name == "loss",
            batch_size=batch_size,
            sync_dist=True,
        )


class FiniteLoss(Callback):
    """Checks once per epoch that the loss is finite: nothing comes back from where it is not.

    Raises:
        ValueError: at the end of the epoch, if it is not; an image that is not finite is named.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss of the epoch's last batch."""
        del batch, batch_idx
        if not trainer.is_last_batch:
            return
        loss = cast("Mapping[str, Tensor]", outputs)["loss"].detach()
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
