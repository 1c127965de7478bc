"""What the Lightning modules share: how they score, and what their checkpoints say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_multiresolution.plugin.allocator import HeldMemory
from kd_multiresolution.plugin.checkpoint import KEY, CheckpointEntry
from kd_multiresolution.plugin.exported import ExplainedExport
from kd_multiresolution.plugin.finite import NonFiniteError, checked_predictions
from kd_multiresolution.plugin.image_files import ImageFileCheck
from kd_multiresolution.plugin.learnt import LearntNormals
from kd_multiresolution.plugin.pictures import picture_statistics
from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, RankEvaluator
from kd_multiresolution.plugin.region import RegionOfInterest, marked_within, read_region
from kd_multiresolution.plugin.threshold_data import ThresholdData
from kd_multiresolution.plugin.tiling import check_tiler, described, in_tiles, restored
from kd_multiresolution.source.network import Source
from kd_multiresolution.source.weights import are_weights_following, weights_follow

logger = logging.getLogger(__name__)

_CONFIGURED: WeakKeyDictionary[Trainer, tuple[ReferenceType[Any], WeakSet[Callback]]] = WeakKeyDictionary()
"""The last model of ours that a trainer had, and its callbacks: Lightning leaves them there for the next model."""


class PluginModule(ExplainedExport):
    """A mixin, to stand before ``AnomalibModule``: the torch model is ``model``, and its source ``model.source``.

    Attributes:
        learnt: what normal images were like in training.
        threshold_origin: what a threshold that was set again was told from, in a sentence; empty: its training set it.
        threshold_data: the data whose validation images thresholds were told from; ``None``: not known.
        checkpoint_file: the file of these weights, if they were loaded from one or their training has written one.
        region_size: height and width of the image files that a mask of what is judged was drawn on, if there is one.
    """

    checkpoint_entry: ClassVar[CheckpointEntry]
    _tiling: Sequence[RemovableHandle] = ()
    _loaded_tiler: Any = None
    learnt = LearntNormals()
    threshold_origin = ""
    threshold_data: ThresholdData | None = None
    checkpoint_file = ""
    region_size: tuple[int, int] | None = None
    _region_is_given = False

    @property
    def source(self) -> Source:
        """Return the frozen network, which knows the region of interest."""
        return cast("Source", self.model.source)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Return the trainer's arguments that the method needs."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Return that the model learns from normal images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return anomalib's default metrics, on scores whose order is kept."""
        metrics = [*AnomalibModule.configure_evaluator().test_metrics]
        for metric in metrics:
            # Without a post-processor there are no labels: F1 is left out then, and the other figures still come.
            metric.strict = False
        return RankEvaluator(test_metrics=metrics)

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's components, the region of interest, the check of image files, and the memory's setting."""
        self._dismiss_callbacks_of_others()
        configured = super().configure_callbacks()
        components = [configured] if isinstance(configured, Callback) else [*configured]
        after = sum(isinstance(part, PreProcessor | PostProcessor) for part in components)  # both come first
        return [*components[:after], RegionOfInterest(), *components[after:], ImageFileCheck(), HeldMemory()]

    def _dismiss_callbacks_of_others(self) -> None:
        """Take out of the trainer what an earlier model of ours has left there, which would see this one's batches.

        Raises:
            ValueError: if it has trained that model, and is to train this one.
        """
        if self._trainer is None or self._trainer not in _CONFIGURED:
            return
        model, theirs = _CONFIGURED[self._trainer]
        if model() is self:
            return
        callbacks: list[Callback] = cast("Any", self._trainer).callbacks
        callbacks[:] = [callback for callback in callbacks if callback not in theirs]
        if self._trainer.state.fn == TrainerFn.FITTING and self._trainer.fit_loop.epoch_progress.current.ready:
            msg = (
                f"{type(self).__name__}: this Engine, or Trainer, has trained another model for "
                f"{self._trainer.current_epoch} epochs, from which Lightning would count on. Give every model that is "
                "trained an Engine of its own."
            )
            raise ValueError(msg)

    def configured(self, callbacks: list[Callback]) -> list[Callback]:
        """Return the callbacks, and know that they are this model's, beside those that it had in the trainer before."""
        if self._trainer is not None:
            model, earlier = _CONFIGURED.get(self._trainer, (None, WeakSet()))
            mine = earlier if model is not None and model() is self else WeakSet()
            mine.update(callbacks)
            _CONFIGURED[self._trainer] = (ref(self), mine)
        return callbacks

    def judge_within(self, region: str | Path | None) -> None:
        """Have the model see, learn from and mark a part of its images alone; one that is loaded has its own.

        Args:
            region: file of a mask, if there is one.

        Raises:
            ValueError: if it cannot be read, or nothing is to be judged.
        """
        if region is not None and not are_weights_following():
            transform = getattr(self.pre_processor, "transform", None)
            self.source.region, self.region_size = read_region(region, transform)
            self._region_is_given = True

    def picture_statistics(self, images: Tensor) -> dict[str, list[float]]:
        """Return what pictures are like, as the model was given them: see :func:`picture_statistics`."""
        return picture_statistics(images, getattr(self.pre_processor, "transform", None), self.source.region)

    def setup(self, stage: str) -> None:
        """Let the networks see tiles if the user gave the model a tiler.

        Raises:
            ValueError: if tiles do not fit the images; before a training, if a callback averages weights in a copy.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_averaging()
        elif stage in ("validate", "test"):
            self._warn_of_raw_scores()
        self.apply_tiler()

    def _check_averaging(self) -> None:
        """Refuse Lightning's ``WeightAveraging``, which versions before 2.6 do not have.

        It writes a copy of the model into checkpoints, of which nobody tells what is normal to it, nor its threshold.
        """
        for callback in cast("Any", self.trainer).callbacks:
            if "WeightAveraging" in (kind.__name__ for kind in type(callback).__mro__):
                msg = (
                    f"{type(callback).__name__} averages weights in a copy of the model, whose checkpoints would have "
                    "no thresholds. Use StochasticWeightAveraging, whose averages get thresholds of their own."
                )
                raise ValueError(msg)

    def _warn_of_raw_scores(self) -> None:
        """Say that anomalib's evaluator misjudges raw scores, of which torchmetrics squashes some batches."""
        post_processor: Any = self.post_processor
        raw = post_processor is None or not post_processor.enable_normalization
        if raw and type(self.evaluator) is Evaluator:
            logger.warning(
                "evaluator=Evaluator(...) with raw scores: torchmetrics squashes each batch that has one above 1, and "
                "no other, so that AUROC, AUPR and F1 may be wrong. Take kd_multiresolution.plugin.post_processor."
                "RankEvaluator in its place, or a post-processor that normalises."
            )

    def apply_tiler(self) -> None:
        """Let the networks see the tiles of the model's ``tiler``, or whole images if it has none.

        Raises:
            ValueError: if tiles do not fit the images.
        """
        for handle in self._tiling:
            handle.remove()
        self._tiling = []
        if (tiler := self._torch_model.tiler) is not None:
            check_tiler(tiler, self.input_size, self._torch_model.source.stride)
            self._tiling = in_tiles(self.tiled_networks, tiler)

    @property
    def validates_scores_alone(self) -> bool:
        """Whether the validation under way goes without maps."""
        return False

    @property
    def tiled_networks(self) -> Sequence[nn.Module]:
        """The networks that see images, in tiles if there is a tiler."""
        return [self._torch_model.source]

    @property
    def _torch_model(self) -> Any:
        return self.model

    def on_fit_start(self) -> None:
        """Say which source it is; thresholds will be this training's."""
        logger.info("%s.", self.source)
        self.checkpoint_file = ""
        if isinstance(self.post_processor, FalseAlarmPostProcessor):
            self.threshold_origin = ""
        elif self.trainer.enable_validation:
            self._note_threshold_data(self.trainer.fit_loop.epoch_loop.val_loop)

    def on_validation_end(self) -> None:
        """Know from which data a validation beside a training has told thresholds."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._note_threshold_data(self.trainer.validate_loop)

    def _note_threshold_data(self, validation: Any) -> None:
        """Know from which data a validation tells thresholds, if it does."""
        post_processor = cast("PostProcessor | None", self.post_processor)
        if post_processor is None or isinstance(post_processor, FalseAlarmPostProcessor):
            return
        if post_processor.enable_thresholding:
            self.threshold_origin = ""
            self.threshold_data = ThresholdData.of(validation._data_source.instance)

    def on_fit_end(self) -> None:
        """Note which file has the weights, if there is one."""
        self.checkpoint_file = getattr(self.trainer.checkpoint_callback, "best_model_path", "")

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Return what an exported model does: of images of any size, normalised scores and maps, labels and masks.

        Raises:
            NonFiniteError: if a score or map is not finite.
        """
        predictions: InferenceBatch = super().forward(batch, *args, **kwargs)
        return marked_within(checked_predictions(predictions, batch), self.source.region)

    def predicted(self, batch: Any, model: Callable[[Tensor], InferenceBatch] | None = None) -> STEP_OUTPUT:
        """Return a batch with its raw scores and maps.

        Args:
            batch: the batch.
            model: what gives them; default: the torch model.

        Raises:
            NonFiniteError: if a score or map is not finite; the images are named.
        """
        try:
            # torch.compile takes no tensors of torchvision's own kind.
            images = batch.image.as_subclass(Tensor)
            predictions = checked_predictions((model or self.model)(images), images)
            if self.model._compiled_call_impl is not None:
                # A CUDA graph's results lie where the next batch's will.
                predictions = type(predictions)(*(None if part is None else part.clone() for part in predictions))
        except NonFiniteError as error:
            raise NonFiniteError(error.reasons, getattr(batch, "image_path", None)) from error
        updated: STEP_OUTPUT = batch.update(**predictions._asdict())
        return updated

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps, for threshold and normalisation."""
        del args, kwargs
        return self.predicted(batch)

    def test_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps."""
        del batch_idx, args, kwargs
        return self.predicted(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps."""
        del batch_idx, dataloader_idx
        return self.predicted(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what anomalib keeps, what the model was built with, and what normal images were like."""
        super().on_save_checkpoint(checkpoint)
        own = {
            "learnt": self.learnt.entry(),
            "threshold_origin": self.threshold_origin,
            "threshold_data": None if self.threshold_data is None else self.threshold_data.entry(),
            "region_size": self.region_size,
            "tiler": described(self._torch_model.tiler),
        }
        checkpoint[KEY] = {**self.checkpoint_entry.describe(self), **own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what anomalib keeps, and say what does not fit it.

        Raises:
            ValueError: if the checkpoint is another model's, a newer version's, or was built with other arguments.
        """
        self.checkpoint_entry.check(checkpoint, self)
        super().on_load_checkpoint(checkpoint)
        entry = checkpoint.get(KEY) or {}
        self.learnt = LearntNormals.of_entry(entry.get("learnt"))
        self.threshold_origin = entry.get("threshold_origin", "")
        self.threshold_data = ThresholdData.of_entry(entry.get("threshold_data"))
        self._load_region(checkpoint["state_dict"].get("model.source.region"), entry.get("region_size"))
        self.checkpoint_entry.warn_of_other_images(checkpoint, self)
        self._load_tiler(checkpoint)
        trained_epochs = 0
        if self._trainer is not None:
            if self._trainer.state.fn == TrainerFn.FITTING:
                return
            trained_epochs = self._trainer.current_epoch
        self.checkpoint_entry.warn_of_other_calibration(checkpoint, self)
        if self.post_processor is not None:
            self.checkpoint_entry.warn_of_other_scores(checkpoint, self)
        if checkpoint.get("epoch", trained_epochs) + 1 < trained_epochs:
            # anomalib's "train" resumes from --ckpt_path, and then loads the same file once more for its test.
            logger.warning(
                "What follows are the figures of the checkpoint, after epoch %d; the training has just ended with "
                "epoch %d. Test the checkpoint that it has written: anomalib test --ckpt_path.",
                checkpoint["epoch"] + 1,
                trained_epochs,
            )

    def _load_tiler(self, checkpoint: dict[str, Any]) -> None:
        """Take the tiler that a checkpoint was trained with; one of the user's own stays, and the log says so."""
        theirs = (checkpoint.get(KEY) or {}).get("tiler")
        if self._torch_model.tiler is self._loaded_tiler:  # the user's own stays, one that was loaded before does not
            self._torch_model.tiler = self._loaded_tiler = None if theirs is None else restored(theirs)
            self.apply_tiler()
        ours = described(self._torch_model.tiler)
        if KEY in checkpoint and ours != theirs:
            logger.warning(
                "This checkpoint was trained with tiler=%s, the model has %s: thresholds do not fit.", theirs, ours
            )

    def _load_region(self, region: Tensor | None, size: tuple[int, int] | None) -> None:
        """Make room for a checkpoint's region of interest.

        Raises:
            ValueError: if the model was given another one.
        """
        source = self.source
        own = source.region if self._region_is_given else None  # one that came with a checkpoint is replaced
        if own is not None and (region is None or not torch.equal(own.cpu(), region.cpu())):
            msg = (
                f"region={self.hparams['region']!r}: this checkpoint was trained with {'another' if size else 'no'} "
                "region, and so were its thresholds. Leave the argument out, or train anew."
            )
            raise ValueError(msg)
        # The buffer itself is loaded with the state dict.
        source.region = None if region is None else region.clone().to(self.device)
        self.region_size = None if size is None else (size[0], size[1])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model; the source's weights come from the checkpoint, not from a download or the original file.

        Args:
            checkpoint_path: as anomalib's.
            *args: as anomalib's.
            **kwargs: as anomalib's; an evaluator or a visualizer is used even if the training went without.

        Raises:
            ValueError: if a region is given.
        """
        if kwargs.get("region") is not None:
            msg = (
                f"region={kwargs['region']!r}: a checkpoint brings its own region, if it has one, and thresholds that "
                "go with it. Leave the argument out, or train anew."
            )
            raise ValueError(msg)
        with weights_follow():
            model: Any = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        for name in ("evaluator", "visualizer"):  # anomalib drops what the training went without, even if it is given
            if (given := kwargs.get(name)) and getattr(model, name) is None:
                setattr(model, name, getattr(model, f"configure_{name}")() if given is True else given)
        if isinstance(checkpoint_path, str | Path):  # and not an open file
            model.checkpoint_file = str(checkpoint_path)
        return model
