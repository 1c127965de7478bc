"""The length of a training, and one cycle of its rate, which falls to zero with the last step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from kd_multiresolution.training.optimizer import Muon

LEARNING_RATE = 4e-3  # the highest
WEIGHT_DECAY = 1.0
STEPS = 1400  # of training, where nobody gives a number of epochs

logger = logging.getLogger(__name__)


def check_learning_rate(learning_rate: float) -> None:
    """Check that a rate suits the weight decay.

    Raises:
        ValueError: if it is too high.
    """
    if learning_rate * WEIGHT_DECAY >= 1:
        msg = f"learning_rate={learning_rate:g}: expected less than {1 / WEIGHT_DECAY:g}, like {LEARNING_RATE:g}."
        raise ValueError(msg)


def default_epochs(trainer: Trainer) -> int:
    """Return how many epochs make the default number of steps; the trainer has a limit of epochs.

    Raises:
        ValueError: if the loader does not say how many batches it has.
    """
    _check_steps(trainer)
    return math.ceil(STEPS * (trainer.max_epochs or 1) / trainer.estimated_stepping_batches)


def one_cycle(parameters: Iterable[Tensor], trainer: Trainer, learning_rate: float) -> OptimizerLRSchedulerConfig:
    """Return Muon and one cycle of its rate over all steps.

    Args:
        parameters: the cloners' weights.
        trainer: knows the number of steps.
        learning_rate: the highest.

    Raises:
        ValueError: if nothing says how many steps there are.
    """
    _check_steps(trainer)
    steps = trainer.estimated_stepping_batches
    optimizer = Muon(parameters, learning_rate, weight_decay=WEIGHT_DECAY)
    cycle = OneCycleLR(optimizer, learning_rate, total_steps=int(steps), cycle_momentum=False)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def _check_steps(trainer: Trainer) -> None:
    if not 0 < trainer.estimated_stepping_batches < float("inf"):
        msg = (
            f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}: KdMultiresolutionDual has a rate that "
            "falls to zero with the last step, and nothing says how many there are. Give epochs or max_epochs, or "
            "max_steps where the loader has no length."
        )
        raise ValueError(msg)


def check_cycle(cycle: OneCycleLR, trainer: Trainer, learning_rate: float) -> None:
    """Check that the rate's cycle is that of this training; a resumed one has it from its checkpoint.

    Raises:
        ValueError: if it has another length, or another rate.
    """
    steps, highest = trainer.estimated_stepping_batches, cycle.optimizer.param_groups[0]["max_lr"]
    for name, given, begun in (("steps", steps, cycle.total_steps), ("learning_rate", learning_rate, highest)):
        if given != begun:
            msg = (
                f"{name}={given:g}: the training that is resumed began with {begun:g}, and KdMultiresolutionDual goes "
                "through one cycle of its rate. Resume it with the same epochs, batches and learning_rate, or train "
                "anew."
            )
            raise ValueError(msg)


def warn_of_unfinished(cycle: object) -> None:
    """Say in the log if a training has ended before its rate had fallen.

    Args:
        cycle: the schedule at the end; one of the user's, such as that of averaged weights, ends as it likes.
    """
    if isinstance(cycle, OneCycleLR) and cycle.last_epoch < cycle.total_steps:
        logger.warning(
            "The training has ended after %d of %d steps; its rate, which falls to zero with the last one, was still "
            "at %.2g. Give a shorter training fewer epochs or max_steps, so that the rate falls in time.",
            cycle.last_epoch,
            cycle.total_steps,
            cycle.get_last_lr()[0],
        )
