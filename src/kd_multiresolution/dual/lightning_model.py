"""The Lightning module: steps, optimiser and anomalib's components; at its end the registration with anomalib."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from kd_multiresolution.dual.calibration import ImageScore
from kd_multiresolution.dual.cycle import (
    LEARNING_RATE,
    check_cycle,
    check_learning_rate,
    default_epochs,
    one_cycle,
    warn_of_unfinished,
)
from kd_multiresolution.dual.held_out import FEWEST_IMAGES, CalibratedEvaluation, HeldOutImages
from kd_multiresolution.dual.loss import cloner_losses
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.plugin.arguments import arguments_of, check_choice, check_positive, check_seed, check_types
from kd_multiresolution.plugin.checkpoint import KEY, CheckpointEntry, check_variant
from kd_multiresolution.plugin.learnt import distribution
from kd_multiresolution.plugin.module import PluginModule
from kd_multiresolution.plugin.post_processor import FALSE_ALARM_RATE, FalseAlarmPostProcessor, check_rate_unconfigured
from kd_multiresolution.plugin.pre_processor import check_unconfigured, resizing, sides, warn_of_other_normalization
from kd_multiresolution.plugin.registration import register_models
from kd_multiresolution.plugin.tiling import allow_tiles
from kd_multiresolution.results.drift import DriftWarning
from kd_multiresolution.results.report import Report
from kd_multiresolution.results.visualizer import FrameVisualizer, check_drawable
from kd_multiresolution.training.batches import of_all_processes, paths_and_batches, paths_of, sum_over_processes
from kd_multiresolution.training.cache import TrainingCache
from kd_multiresolution.training.epochs import EpochLimit, EpochSeeds
from kd_multiresolution.training.learnt_pictures import LearntPictures
from kd_multiresolution.training.loss import EpochLosses, FiniteLoss
from kd_multiresolution.training.thresholds import Thresholds, is_heard

IMAGE_SIZE = (256, 256)


class KdMultiresolutionDual(PluginModule, AnomalibModule):
    """Two small cloners of a frozen source, one of details and one of the whole image, learnt from normal images.

    Where they fail to predict the source's features, or contradict each other, the image is anomalous. The map takes
    one forward pass, and the threshold is told from normal images alone. Not the paper's method: see
    ``docs/method.md``.

    Args:
        source: the frozen network: any convolutional model of timm, such as ``resnet18.tv_in1k`` or
            ``vgg16.tv_in1k``; or ``efficientnet_lite0``, whose weights were installed with this package.
        pretrained: use the source's pre-trained weights, downloaded on first use unless they were installed. If false,
            and no file is given, the source is random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of the download.
        critical_points: names of two or more of the source's levels, ``layer1`` to ``layer4`` for ResNet, ``pool1`` to
            ``pool5`` for VGG; all but the first are predicted. Default: those of strides 4, 8 and 16.
        sigma: standard deviation of the anomaly map's Gaussian blur, in pixels.
        image_size: height and width in pixels, or one number for both, to which images are resized; multiples of the
            source's stride at the last critical point. Default: 256. Not together with a pre-processor of your own.
        imagenet_normalization: normalise images with the mean and deviation that the source was trained with:
            ImageNet's for torchvision's networks, 0.5 and 0.5 for ``efficientnet_lite0``. Default: yes.
        region: file of a mask, such as a PNG, as large as the image files it was drawn on: white is judged, of all else
            nothing is seen, learnt from, scored or marked. Kept in checkpoints and exported files. Default: everything.
        epochs: train for this many epochs. Default: as many as make 1,400 steps. ``--trainer.max_epochs`` takes
            precedence (unless it is 1000, Lightning's own default).
        learning_rate: the optimiser's (Muon) highest rate in its one cycle. Default: 4e-3.
        image_score: to be chosen before training: ``defects``, the mean of the highest hundredth of a weighted sum of
            the maps, and of how unusual features are for their positions; ``whole``, how far the image as a whole is
            from what the local cloner makes of it; ``auto``, what held-out normal images say.
        false_alarm_rate: the fraction of normal images, above 0 and below 0.5, that exceed the normalised score 0.5, as
            told from held-out normal images. Not together with a post-processor of your own.
        cache: ``float32`` or ``float16``: in training read each image once and compute the source's features of it
            once, kept in that precision; null: in every epoch. Images that augmentation changes are never kept, nor
            are those that a data set reads by a ``__getitem__`` of your own, nor is any where the trainer limits the
            batches of an epoch.
        cache_memory: GiB of the training device's memory, a GPU's on a GPU, for images, which may take half of it, and
            features; features that exceed it go into a file that vanishes with the training. The features of up to 64
            held-out images, and of as many out of focus and with painted defects, are held besides: a third of a GiB
            for ResNet-18 at 256 pixels.
        cache_folder: folder of that file. Default: the system's folder for temporary files.
        seed: seed of the cloners' initial weights, of a random source, of the choice of held-out images, and, unless
            Lightning's ``seed_everything`` was called, of the order of the training images, which follows from seed and
            epoch.
        pre_processor: anomalib's pre-processor; true for resizing and normalising, false for none.
        post_processor: anomalib's post-processor; true for one that does not clamp scores and has its threshold from
            ``false_alarm_rate``, false for raw scores.
        evaluator: anomalib's evaluator; true for AUROC and F1 score of images and pixels.
        visualizer: anomalib's visualizer; false leaves out the pictures, and the page about
            each test and prediction; the table of scores stays.
        variant: no argument any more: ``paper`` is the model ``KdMultiresolution``.

    Raises:
        TypeError: if an argument has another type; numpy's numbers are none of Python's.
        ValueError: if an argument is out of range, or two of them contradict each other.
        RuntimeError: if the source's pre-trained weights cannot be had.
    """

    model: KdMultiresolutionDualModel

    checkpoint_entry = CheckpointEntry(
        model="KdMultiresolutionDual",
        format=7,
        oldest_format=6,
        built=("source",),
        built_before={},
        scoring=("sigma",),
        calibration={"image_score": "auto", "false_alarm_rate": FALSE_ALARM_RATE},
        remedy="trained anew",
    )

    def __init__(
        self,
        source: str = "resnet18.tv_in1k",
        pretrained: bool = True,
        source_weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        sigma: float = 4.0,
        image_size: int | tuple[int, int] | None = None,
        imagenet_normalization: bool | None = None,
        region: str | Path | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        image_score: Literal["auto", "defects", "whole"] = "auto",
        false_alarm_rate: float = FALSE_ALARM_RATE,
        cache: Literal["float32", "float16"] | None = "float32",
        cache_memory: float = 1.0,
        cache_folder: str | Path | None = None,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        variant: str | None = None,
    ) -> None:
        given = dict(locals())
        check_types(KdMultiresolutionDual.__init__, given)
        check_variant(variant, "KdMultiresolutionDual")
        check_seed("seed", seed)
        check_drawable(visualizer, post_processor, has_maps=True)
        check_unconfigured(pre_processor, image_size, imagenet_normalization)
        check_rate_unconfigured(post_processor, false_alarm_rate)
        check_positive("epochs", epochs)
        check_positive("learning_rate", learning_rate)
        check_learning_rate(learning_rate or LEARNING_RATE)
        check_choice("image_score", image_score, get_args(ImageScore))
        size = IMAGE_SIZE if image_size is None else sides(image_size)
        resizes = pre_processor is True
        if resizes:
            pre_processor = self.configure_pre_processor(
                size, imagenet_normalization=imagenet_normalization, source=source
            )
        else:
            warn_of_other_normalization(pre_processor, source)
        self.false_alarm_rate = false_alarm_rate
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.hparams.pop("variant")
        self.epochs = epochs
        self.learning_rate = learning_rate or LEARNING_RATE
        self.training_cache = TrainingCache(cache, memory=cache_memory, folder=cache_folder)
        self.epoch_seeds = EpochSeeds(seed)
        self.epoch_limit = EpochLimit(epochs, default_epochs)
        self.epoch_losses = EpochLosses()
        self.thresholds = Thresholds()
        self.model = KdMultiresolutionDualModel(**arguments_of(KdMultiresolutionDualModel, given))
        allow_tiles(self.model)
        if resizes:
            self.model.check_image_size(size)
        self.judge_within(region)
        self.held_out = HeldOutImages(self.model, seed, image_score)

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        *,
        imagenet_normalization: bool | None = None,
        source: str = "resnet18.tv_in1k",
    ) -> PreProcessor:
        """Return a pre-processor that resizes images, as the source was trained or to [0, 1].

        Args:
            image_size: height and width in pixels; default: 256 x 256.
            imagenet_normalization: subtract the mean and divide by the deviation that the source was trained with;
                default: yes.
            source: name of the source.

        Raises:
            ValueError: if timm does not have the source, or does not say how it was trained.
        """
        return resizing(image_size or IMAGE_SIZE, normalized_for=None if imagenet_normalization is False else source)

    def configure_post_processor(self) -> PostProcessor:
        """Return a post-processor that does not clamp scores, with a threshold from normal images."""
        return FalseAlarmPostProcessor(self.false_alarm_rate)

    @classmethod
    def configure_visualizer(cls) -> FrameVisualizer:
        """Return anomalib's pictures, of what the model saw."""
        return FrameVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's components, and what training consists of besides its steps."""
        report = Report(pages=self.visualizer is not None)
        callbacks: list[Callback] = [
            report.raw_scores,
            DriftWarning(),
            *super().configure_callbacks(),
            self.epoch_seeds,
            self.training_cache,
            self.epoch_losses,
            FiniteLoss(),
            LearntPictures(),
            self.epoch_limit,
            CalibratedEvaluation(),
        ]
        return self.configured([*callbacks, report, *([self.thresholds] if self.fits_thresholds else [])])

    @property
    def fits_thresholds(self) -> bool:
        """Whether a post-processor that was given fits its thresholds to validation images."""
        return isinstance(self.post_processor, PostProcessor) and not isinstance(
            self.post_processor, FalseAlarmPostProcessor
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Muon over both cloners' weights, with one cycle of its rate."""
        # The cycle's length is that of the training; asking for it makes Lightning ask for the first batches.
        self.epoch_seeds.seed_first()
        self.epoch_limit.set(self.trainer)
        weights = [*self.model.local_cloner.parameters(), *self.model.global_cloner.parameters()]
        return one_cycle(weights, self.trainer, self.learning_rate)

    def on_train_start(self) -> None:
        """Choose the held-out images, and look once at the images of an epoch."""
        check_cycle(cast("OneCycleLR", self.lr_schedulers()), self.trainer, self.learning_rate)
        resumed = self.epoch_seeds.is_resumed
        memory = self.training_cache.memory / 2  # the part of images
        with self.held_out.look_ahead(resumed=resumed):
            paths, batches = paths_and_batches(self.trainer, self, fewest=FEWEST_IMAGES, memory=memory)
            self.held_out.start(
                paths,
                self._with_features(batches),
                self._sum_over_processes,
                resumed=resumed,
                precision=self.trainer.precision_plugin.train_step_context,
            )

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the squared error of both cloners on those images of the batch that are not held out."""
        del args, kwargs
        paths = paths_of(batch)
        fitted = self.held_out.fitted(paths)
        # A batch of held-out images alone must not move the cloners, but other processes wait for its gradient.
        rows = fitted or [0]
        with torch.no_grad():
            features = self.training_cache.source_features(
                self.model.source,
                [paths[row] for row in rows],
                lambda: self.model.checked_images(_chosen(cast("Tensor", batch.image), rows)),
            )
        losses = cloner_losses(self.model, features)
        terms = {name: loss * bool(fitted) for name, loss in losses.items()}
        loss = torch.stack([*terms.values()]).sum()
        self.epoch_losses.add(loss, terms, batch.batch_size)
        return loss

    def calibrate(self) -> None:
        """Tell from held-out images what is normal to the cloners, while they are trained, and set the threshold."""
        calibration = self.held_out.calibrate(self._sum_over_processes)
        if calibration is None:
            return
        scores = distribution(of_all_processes(self.trainer, calibration.scores.scores))
        self.learnt = replace(self.learnt, origin="held-out training images", scores=scores)
        if isinstance(self.post_processor, FalseAlarmPostProcessor):
            self.post_processor.set_normal_scores(calibration.scores, calibration.peaks)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps; on the way of a training, if anybody takes them.

        The model's own threshold needs none of them; that of a post-processor that was given does.
        """
        del args, kwargs
        on_the_way = self.trainer.state.fn == TrainerFn.FITTING
        return batch if on_the_way and not (self.fits_thresholds or is_heard(self.trainer)) else self.predicted(batch)

    def on_train_end(self) -> None:
        """Set what is normal, let the held-out images go, and say if the rate has not fallen."""
        self.calibrate()
        self.held_out.end()
        warn_of_unfinished(self.lr_schedulers())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what anomalib keeps, what the model was built with, what is normal, and how images were held out."""
        self.calibrate()  # the checkpoint's tensors are the model's own
        if self._trainer is not None and self.fits_thresholds:
            self.thresholds.complete(self._trainer, self)
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["held_out"] = self.held_out.names
        checkpoint[KEY]["random_state"] = self.held_out.random_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what anomalib keeps, and how a resumed training held out images before.

        Raises:
            ValueError: if the checkpoint is another model's, a newer version's, or was built with other arguments.
        """
        super().on_load_checkpoint(checkpoint)
        entry = checkpoint.get(KEY) or {}
        self.held_out.names_before = entry.get("held_out") or None
        self.held_out.random_state = entry.get("random_state")

    def _with_features(self, batches: Iterable[Any]) -> Iterator[tuple[Sequence[str], Tensor, list[Tensor]]]:
        """Yield paths, images and source features of training batches."""
        for batch in batches:
            images = self.model.checked_images(batch.image)
            paths = paths_of(batch)
            # As in a training step, which compares them with its own.
            with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
                features = self.training_cache.source_features(self.model.source, paths, images)
            yield paths, images, [level.to(images.dtype) for level in features]

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return sum_over_processes(self.trainer, tensor)


def _chosen(images: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(images):
        return images
    return images.index_select(0, torch.tensor(rows).to(images.device, non_blocking=True))  # without a wait for a GPU


class kd_multiresolution_dual(KdMultiresolutionDual):  # noqa: N801
    """:class:`KdMultiresolutionDual` for ``--model kd_multiresolution_dual``: the command line takes class names."""

    def __new__(cls, *args: Any, **kwargs: Any) -> KdMultiresolutionDual:  # type: ignore[misc]
        """Return a :class:`KdMultiresolutionDual`: checkpoints and result folders carry its name."""
        return KdMultiresolutionDual(*args, **kwargs)


register_models(KdMultiresolutionDual, kd_multiresolution_dual)
