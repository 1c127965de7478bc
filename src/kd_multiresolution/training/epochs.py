"""Which random numbers an epoch draws, and how many epochs there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

LIGHTNING_MAX_EPOCHS = 1000  # what Lightning sets when a user names neither epochs nor steps
STRIDE = 1_000_003  # between the seeds of epochs: those of two trainings must not meet


class EpochSeeds(Callback):
    """Seeds every epoch by its number, so that a resumed training sees what an uninterrupted one does.

    A training that is resumed within an epoch goes on with the batches that were left. Lightning alone would begin with
    the epoch's first ones, unless the user's own loader remembers where it was.

    Args:
        seed: of the training; Lightning's ``seed_everything`` takes precedence.

    Attributes:
        first_epoch: in which the training begins.
        is_resumed: whether it goes on with another.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.first_epoch = 0
        self.is_resumed = False
        self._batches_before = 0  # of the first epoch
        self._is_first_seeded = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, whatever an earlier training, which may have failed, has left."""
        del trainer, pl_module
        if stage == "fit":
            self.first_epoch, self.is_resumed, self._batches_before, self._is_first_seeded = 0, False, 0, False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember where a resumed training begins."""
        del pl_module
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        is_within = epochs["ready"] > epochs["processed"]
        is_done = is_within and batches["is_last_batch"]  # but for what follows an epoch's steps, such as validation
        self.first_epoch = epochs["processed"] + is_done
        self.is_resumed = True
        self._batches_before = batches["current"]["processed"] if is_within and not is_done else 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the first epoch, unless it is: Lightning asks for its batches before it starts."""
        del trainer, pl_module
        if not self._is_first_seeded:
            self.seed_first()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass over the batches that a resumed training's first epoch has had before."""
        del pl_module
        if not self.is_resumed:
            return
        fetcher, loader = cast("Any", trainer.fit_loop)._data_fetcher, cast("Any", trainer.train_dataloader)
        in_processes = hasattr(getattr(loader, "sampler", None), "set_epoch")
        if in_processes:
            loader.sampler.set_epoch(self.first_epoch)
        if not hasattr(loader, "load_state_dict"):
            for _ in range(self._batches_before):
                next(fetcher)
            fetcher.fetched = 0  # Lightning counts them itself
        # The order is drawn with the first batch, before Lightning, where it passes over a validation, draws as well.
        batches = iter(partial(next, fetcher.iterator), None)
        fetcher.iterator = chain([*islice(batches, 1)], batches)
        if in_processes:
            loader.sampler.set_epoch(0)  # as in the beginning, for whoever looks at the images now

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the epoch, but not the first one again, whose first batches have been asked for."""
        del pl_module
        if trainer.current_epoch != self.first_epoch or _reads_anew(trainer):
            self._seed(trainer.current_epoch)

    def seed_first(self) -> None:
        """Seed the first epoch, for whoever asks for its batches earlier still."""
        self._seed(self.first_epoch)
        self._is_first_seeded = True

    def _seed(self, epoch: int) -> None:
        # anomalib's command line takes --seed_everything, and does not call it.
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", self.seed)) + STRIDE * epoch)


def _reads_anew(trainer: Trainer) -> bool:
    """Whether Lightning, having asked for the first batches of a resumed training, is going to ask again."""
    loop = trainer.fit_loop
    resuming = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)  # the latter from Lightning 2.6 on
    return trainer.current_epoch > 0 and not resuming


class EpochLimit(Callback):
    """Sets the number of epochs if the user did not, and takes it back after the fit: the Trainer is the user's.

    ``trainer_arguments`` would override the user's own; so only what Lightning falls back to is replaced.

    Args:
        epochs: the model's argument; the trainer's ``max_epochs`` and ``max_steps`` take precedence.
        default: tells the number where that is missing as well.
    """

    def __init__(self, epochs: int | None, default: Callable[[Trainer], int | None]) -> None:
        self.epochs = epochs
        self.default = default
        self._found: list[int | None] = []  # what the trainer had, while it has another number

    def set(self, trainer: Trainer) -> None:
        """Set the number of epochs, for whoever asks for the length of the training before it starts."""
        found = trainer.max_epochs
        if found == LIGHTNING_MAX_EPOCHS and trainer.max_steps == -1:
            epochs = self.epochs or self.default(trainer)
        elif found in {None, -1} and self.epochs is not None:
            epochs = self.epochs
        else:
            return
        self._found.append(found)
        trainer.fit_loop.max_epochs = epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number of epochs, unless that was done."""
        del pl_module
        if not self._found:
            self.set(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as the user made it."""
        del pl_module, stage
        if self._found:
            trainer.fit_loop.max_epochs = self._found.pop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so as well where there is no teardown."""
        del exception
        self.teardown(trainer, pl_module, "fit")
