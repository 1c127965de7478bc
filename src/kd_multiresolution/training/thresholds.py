"""Thresholds are fitted when they are needed: for every checkpoint, and at the end of a training, however it ends.

Lightning validates as often as the user says, by default after every epoch. A threshold of images needs scores alone;
one of pixels needs maps, and a map that is a gradient costs as much as several epochs of training. So a validation on
the way goes without such maps, unless somebody listens to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor, forget, renew_thresholds
from kd_multiresolution.training.evaluation_mode import evaluation_mode, mark_of

KNOWN = ("anomalib.", "kd_multiresolution.", "lightning.")  # packages whose other callbacks take no validation batches

KINDS = ("image", "pixel")

logger = logging.getLogger(__name__)


def is_heard(trainer: Trainer, *, maps: bool = False) -> bool:
    """Return whether anybody takes what the validations on the way of a training give.

    That is a metric of validation, a post-processor that is not ours, or a callback of the user's.

    Args:
        trainer: whose callbacks are asked.
        maps: whether the question is about anomaly maps alone.
    """
    return any(_hears(callback, maps) for callback in cast("Any", trainer).callbacks)


def _hears(callback: Callback, maps: bool) -> bool:
    kind = type(callback)
    if isinstance(callback, UnclampedPostProcessor):
        return False
    if isinstance(callback, PostProcessor):
        return True
    if kind.__module__.startswith(KNOWN):
        metrics = cast("Iterable[Any]", callback.val_metrics) if isinstance(callback, Evaluator) else ()
        return any(not maps or {"anomaly_map", "pred_mask"} & {*metric.fields} for metric in metrics)
    return kind.on_validation_batch_end is not Callback.on_validation_batch_end


class Thresholds(Callback):
    """Fits the thresholds of a post-processor that has them from validation images.

    Every checkpoint has both, of images and of pixels, but for one kind: a checkpoint of the way that the next epoch's
    overwrites has none of pixels where maps are gradients that nobody listens to. If the training ends there by an
    exception or by Ctrl-C, it gets it then.
    """

    def __init__(self) -> None:
        self._fitted: dict[str, bytes] = {}  # the mark of the weights that each threshold was fitted to
        self._with_maps = False  # while it is fitting
        self._epoch_ends = False
        self._lacks_pixels = False  # the last checkpoint

    def scores_suffice(self, trainer: Trainer) -> bool:
        """Return whether the validation under way needs no maps that are gradients."""
        return trainer.state.fn == TrainerFn.FITTING and not self._with_maps and not is_heard(trainer, maps=True)

    def fit(self, trainer: Trainer, pl_module: LightningModule, *, pixels: bool = True) -> None:
        """Fit what is not fitted to the current weights, in one pass over the validation images, if there are any.

        Args:
            trainer: of the training.
            pl_module: the model.
            pixels: the threshold of pixels as well as that of images.
        """
        module, kinds = cast("Any", pl_module), KINDS if pixels else KINDS[:1]
        mark = mark_of(module.model)
        if module.post_processor is None or all(self._fitted.get(kind) == mark for kind in kinds):
            return
        if not trainer.enable_validation:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        loaders = cast("Any", loop._combined_loader).flattened
        self._with_maps = pixels
        try:
            with evaluation_mode([module.model]), trainer.precision_plugin.val_step_context():
                for loader, most in zip(loaders, loop.max_batches, strict=True):
                    for index, on_host in enumerate(loader):
                        if index >= most:
                            break
                        batch = trainer.strategy.batch_to_device(on_host)
                        if isinstance(module.pre_processor, Callback):
                            module.pre_processor.on_validation_batch_start(trainer, module, batch, index)
                        outputs = module.validation_step(batch, index)
                        module.post_processor.on_validation_batch_end(trainer, module, outputs, batch, index)
                module.post_processor.on_validation_epoch_end(trainer, module)
        finally:
            self._with_maps = False
        self._note(module, kinds, mark)

    def complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit what a checkpoint needs that is about to be written."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._lacks_pixels = self._is_superseded(trainer)
            self.fit(trainer, pl_module, pixels=not self._lacks_pixels)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know of no threshold that was fitted to the current weights."""
        del trainer, pl_module
        self._fitted = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the thresholds of an earlier training if there are no validation images to fit others to."""
        module = cast("Any", pl_module)
        if trainer.enable_validation or not isinstance(module.post_processor, PostProcessor):
            return
        forget(module.post_processor, *KINDS)
        module.threshold_origin, module.threshold_data = "", None
        module.learnt = replace(module.learnt, origin="", scores=())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what Lightning's own validation has fitted, and forget the threshold of pixels of other weights."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        module = cast("Any", pl_module)
        self._note(module, KINDS[:1] if module.validates_scores_alone else KINDS, mark_of(module.model))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_train_epoch_end`: checkpoints are written after one or the other."""
        del pl_module
        self._epoch_ends = trainer.state.fn == TrainerFn.FITTING

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the checkpoint of the epoch: checkpoint callbacks come last."""
        del trainer, pl_module
        self._epoch_ends = True

    def on_train_batch_start(self, *args: Any) -> None:
        """Expect none."""
        del args
        self._epoch_ends = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit both thresholds to the last weights, and to those of the last checkpoint, which may be older."""
        self._complete_files(trainer, pl_module)
        self.fit(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the last checkpoint of a training that ends here the threshold of pixels that it lacks."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING:
            self._complete_files(trainer, pl_module)

    def _complete_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        paths = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
        if not self._lacks_pixels:
            return
        self._lacks_pixels = False
        module = cast("Any", pl_module)
        present = {name: tensor.clone() for name, tensor in module.state_dict().items() if torch.is_tensor(tensor)}
        learnt, fitted = module.learnt, dict(self._fitted)
        try:
            for path in filter(None, paths):
                self._complete(path, trainer, module)
        except Exception as error:  # a finished training is not lost for it, nor is what has ended an unfinished one
            logger.warning("The last checkpoint has no threshold of pixels (%s).", error)
        finally:
            module.load_state_dict(present, strict=False)
            module.learnt, self._fitted = learnt, fitted

    def _complete(self, path: str, trainer: Trainer, module: Any) -> None:
        logger.info("Fitting the threshold of pixels of %s.", path)
        files = trainer.strategy.checkpoint_io
        checkpoint = files.load_checkpoint(path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
        self.fit(trainer, module)
        checkpoint["state_dict"] = module.state_dict()
        if isinstance(module.post_processor, PostProcessor):
            renew_thresholds(checkpoint, module.post_processor)
        files.save_checkpoint(checkpoint, path)

    def _note(self, module: Any, kinds: tuple[str, ...], mark: bytes) -> None:
        self._fitted.update(dict.fromkeys(kinds, mark))
        if self._fitted.get("pixel") != mark and isinstance(module.post_processor, UnclampedPostProcessor):
            module.post_processor.forget_pixels()

    def _is_superseded(self, trainer: Trainer) -> bool:
        """Whether the checkpoint that is being written is to be overwritten by that of the next epoch."""
        callbacks = [*trainer.checkpoint_callbacks]
        rolling = all(
            isinstance(callback, ModelCheckpoint)
            and callback.monitor is None
            and callback.save_top_k == 1
            and not callback.save_last
            for callback in callbacks
        )
        # Of several processes none could complete it afterwards.
        return trainer.world_size == 1 and bool(callbacks) and self._epoch_ends and rolling and not _ends(trainer)


def _ends(trainer: Trainer) -> bool:
    """Whether the training ends with the present epoch."""
    return bool(
        trainer.should_stop
        or trainer.current_epoch + 1 == trainer.max_epochs
        or trainer.global_step == trainer.max_steps
    )
