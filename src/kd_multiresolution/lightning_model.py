"""The Lightning module: steps, optimiser and anomalib's components; at its end the registration with anomalib."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from kd_multiresolution.arguments import check_seed, check_types
from kd_multiresolution.attribution import CHUNK_SIZE
from kd_multiresolution.checkpoint import KEY as CHECKPOINT_KEY
from kd_multiresolution.checkpoint import (
    check_checkpoint,
    describe,
    warn_of_other_calibration,
    warn_of_other_images,
    warn_of_other_scores,
)
from kd_multiresolution.convergence import ConvergenceStopping
from kd_multiresolution.discrepancy import discrepancy_terms, weighted_sum
from kd_multiresolution.dual import DualModel
from kd_multiresolution.dual_training import IMAGE_SIZE, DualTraining, check_dual_training, dual_losses
from kd_multiresolution.dual_training import LEARNING_RATE as DUAL_LEARNING_RATE
from kd_multiresolution.finite import SICK_IMAGE, NonFiniteError
from kd_multiresolution.image_files import ImageFileCheck
from kd_multiresolution.image_memory import RememberedImages
from kd_multiresolution.optimizer import adam
from kd_multiresolution.post_processor import (
    FALSE_ALARM_RATE,
    FalseAlarmPostProcessor,
    RankEvaluator,
    UnclampedPostProcessor,
)
from kd_multiresolution.presets import LEARNING_RATE, PRESETS
from kd_multiresolution.quantization import quantize_source
from kd_multiresolution.registration import register_models
from kd_multiresolution.report import REPORT_FILE, Report
from kd_multiresolution.torch_model import KdMultiresolutionModel
from kd_multiresolution.training_cache import TrainingCache
from kd_multiresolution.value_weight import initial_value_weight
from kd_multiresolution.variants import check_variant
from kd_multiresolution.visualizer import ThresholdVisualizer

logger = logging.getLogger(__name__)

DEFAULT = PRESETS["mvtec"]
LIGHTNING_MAX_EPOCHS = 1000  # what Lightning sets when a user names neither epochs nor steps
VALIDATION_INTERVAL = {"paper": 10, "dual": 20}  # epochs; a validation takes as long as three of the dual ones
EPOCH_SEEDS = 1_000_003  # seeds of the epochs of two trainings must not meet

# While a checkpoint is loaded its own weights are on their way: the source's need not be fetched first.
_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


class KdMultiresolution(AnomalibModule):
    """Multiresolution knowledge distillation: a small cloner imitates a frozen source on normal images.

    Where the two disagree the image is anomalous; the gradient of their discrepancy at the input shows where. Defaults
    are the paper's settings for MVTec AD (Salehi et al., CVPR 2021, arXiv 2011.11108).

    Args:
        source: the frozen network: ``light_vgg``, whose weights come with this package, or any convolutional model of
            timm, such as ``vgg16.tv_in1k`` (the paper's) or ``resnet18.tv_in1k``.
        variant: ``paper``; or ``dual``, two cloners fed by the source's features and a forward-only map, which takes of
            the arguments up to ``percentile_scale`` only those of the source, ``critical_points`` and ``sigma``.
        pretrained: use the source's pre-trained weights, downloaded on first use. If false, and no file is given, the
            source is random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of the download.
        critical_points: names of the source's levels at which the cloner is trained, ``pool1`` to ``pool5`` for VGG,
            timm's feature levels otherwise (``layer1`` to ``layer4`` for ResNet). Default: the last four; for the dual
            variant those of strides 4, 8 and 16.
        score_points: the critical points that make up score and map. Default: the last three of them.
        cloner: ``compact`` as in the paper's Fig. 2, or ``equal`` in size to the source.
        cloner_bias: give the cloner's convolutions a bias. The paper has none.
        cloner_batch_norm: give the cloner batch norm, as the published code does.
        terms: terms of the discrepancy: ``total`` (both), ``value`` or ``direction``.
        value_weight: factor of the value term beside the direction term, above 0; or ``auto``, the paper's rule: equal
            initial size of both, measured on the first batches before the first step.
        anomaly_map: ``gradient`` of the score at the input; ``smooth_grad``, its mean over noisy copies of the image;
            ``guided_backprop``, guided at the cloner's ReLUs; ``discrepancy`` of source and cloner at each position,
            which needs no gradient; null for image scores alone.
        attribution_path: whether the gradient runs through ``both`` networks, as in the published code, or through the
            ``cloner`` alone, as the paper has it.
        smooth_grad_samples: number of SmoothGrad's noisy copies.
        smooth_grad_noise: standard deviation of SmoothGrad's noise, as a fraction of the image's range.
        smooth_grad_as_published: average scaled maps under the published code's noise, (noise / range) squared, instead
            of gradients.
        explicit_backward: compute gradients by the operators that an exported model has, instead of by autograd; the
            values are the same.
        chunk_size: largest number of images, or of SmoothGrad's noisy copies, whose gradient is computed at once; it
            bounds the memory.
        sigma: standard deviation of the anomaly map's Gaussian blur, in pixels.
        percentile_scale: scale every map to [0, 1] by its own 99th percentile, as for the paper's pixel figures. Maps
            of different images are then not comparable.
        image_size: height and width in pixels, or one number for both, to which images are resized; multiples of the
            source's stride at the last critical point. Default: 128; for the dual variant 256. Not together with a
            pre-processor of your own.
        imagenet_normalization: normalise images with ImageNet's mean and deviation. Default: the dual variant does; the
            paper does so for CIFAR-10 only.
        epochs: train for this many epochs. Default: until the training loss has converged; for the dual variant, as
            many as make 1,400 steps. ``--trainer.max_epochs`` takes precedence (unless it is 1000, Lightning's own
            default), as an upper limit where ``epochs`` is not given.
        learning_rate: Adam's learning rate, by default 1e-3; for the dual variant Muon's, the highest of a cycle, 4e-3.
        image_score: for the dual variant, to be chosen before training: ``defects``, the mean of the highest hundredth
            of the map without its coarser scales; ``whole``, how far the image as a whole is from what the local cloner
            makes of it; ``auto``, what held-out normal images say.
        false_alarm_rate: for the dual variant: the fraction of normal images, above 0 and below 0.5, that exceed the
            normalised score 0.5, as told from held-out normal images. Not together with a post-processor of your own.
        cache: ``float32`` or ``float16``: in training read each image once and compute the source's features of it
            once, kept in that precision; null: in every epoch. Images that augmentation changes are never kept.
        cache_memory: GiB of memory for images, which may take half of it, and features; features that exceed it go
            into a file that vanishes with the training. The dual variant holds the features of up to 64 held-out
            images, and of as many out of focus and with painted defects, besides: a third of a GiB for ResNet-18 at 256
            pixels.
        cache_folder: folder of that file. Default: the system's folder for temporary files.
        seed: seed of the cloner's initial weights, of a random source, and, unless Lightning's ``seed_everything`` was
            called, of the order of the training images, which follows from seed and epoch.
        pre_processor: anomalib's pre-processor; true for resizing (and normalising, if asked for), false for none.
        post_processor: anomalib's post-processor; true for one that does not clamp scores (the dual variant's has its
            threshold from ``false_alarm_rate``), false for raw scores.
        evaluator: anomalib's evaluator; true for AUROC and F1 score of images and pixels.
        visualizer: anomalib's visualizer; false leaves out the pictures and the page about each test run.

    Raises:
        TypeError: if an argument has another type; numpy's numbers are none of Python's.
        ValueError: if an argument is out of range, or two of them contradict each other.
        RuntimeError: if the source's pre-trained weights cannot be had.
    """

    model: KdMultiresolutionModel | DualModel

    def __init__(
        self,
        source: str = "vgg16.tv_in1k",
        variant: Literal["paper", "dual"] = "paper",
        pretrained: bool = True,
        source_weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        score_points: Sequence[str] | None = None,
        cloner: Literal["compact", "equal"] = "compact",
        cloner_bias: bool = False,
        cloner_batch_norm: bool = True,
        terms: Literal["total", "value", "direction"] = "total",
        value_weight: float | Literal["auto"] = DEFAULT.value_weight,
        anomaly_map: Literal["gradient", "smooth_grad", "guided_backprop", "discrepancy"] | None = "gradient",
        attribution_path: Literal["both", "cloner"] = "both",
        smooth_grad_samples: int = 50,
        smooth_grad_noise: float = 0.05,
        smooth_grad_as_published: bool = False,
        explicit_backward: bool = False,
        chunk_size: int = CHUNK_SIZE,
        sigma: float = 4.0,
        percentile_scale: bool = False,
        image_size: int | tuple[int, int] | None = None,
        imagenet_normalization: bool | None = None,
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
    ) -> None:
        check_types(KdMultiresolution.__init__, locals())
        check_variant(variant, locals(), KdMultiresolution.__init__)
        check_seed("seed", seed)
        if isinstance(visualizer, ThresholdVisualizer) and (anomaly_map is None or post_processor is False):
            msg = (
                f"visualizer=ThresholdVisualizer(), anomaly_map={anomaly_map!r}, post_processor={post_processor!r}: it "
                "draws normalised maps. Use visualizer=False, or give it a map and a post-processor."
            )
            raise ValueError(msg)
        if pre_processor is not True and (image_size is not None or imagenet_normalization):
            msg = (
                f"image_size={image_size!r}, imagenet_normalization={imagenet_normalization!r}: both configure our own "
                f"pre-processor. Leave them out, or leave out pre_processor={pre_processor!r}."
            )
            raise ValueError(msg)
        if variant == "dual" and post_processor is not True and false_alarm_rate != FALSE_ALARM_RATE:
            msg = (
                f"false_alarm_rate={false_alarm_rate!r}: configures our own post-processor. Leave it out, or leave out "
                f"post_processor={post_processor!r}."
            )
            raise ValueError(msg)
        for name, number in (("epochs", epochs), ("learning_rate", learning_rate)):
            if number is not None and not 0 < number < float("inf"):
                msg = f"{name}={number!r}: expected a number above 0."
                raise ValueError(msg)
        learning_rate = learning_rate or (DUAL_LEARNING_RATE if variant == "dual" else LEARNING_RATE)
        if variant == "dual":
            check_dual_training(image_score, learning_rate)
        default_size = IMAGE_SIZE if variant == "dual" else DEFAULT.image_size
        size = default_size if image_size is None else image_size
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if imagenet_normalization is None:
            imagenet_normalization = variant == "dual" or DEFAULT.imagenet_normalization
        self.variant = variant
        self.false_alarm_rate = false_alarm_rate
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(size, imagenet_normalization=imagenet_normalization)
            resizes = True
        else:
            resizes = False
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.training_cache = TrainingCache(cache, memory=cache_memory, folder=cache_folder)
        self.seed = seed
        self._first_epoch = self._trained_epochs = 0
        self._dual: DualTraining | None = None
        weights_follow = _weights_follow.get()
        if variant == "dual":
            self.model = DualModel(
                source,
                pretrained=pretrained and not weights_follow,
                source_weights=None if weights_follow else source_weights,
                critical_points=critical_points,
                sigma=sigma,
                seed=seed,
            )
            self._dual = DualTraining(self.model, seed, image_score)
            if resizes:
                self.model.check_image_size(size)
            return
        self.model = KdMultiresolutionModel(
            source,
            pretrained=pretrained and not weights_follow,
            source_weights=None if weights_follow else source_weights,
            critical_points=critical_points,
            score_points=score_points,
            cloner=cloner,
            cloner_bias=cloner_bias,
            cloner_batch_norm=cloner_batch_norm,
            terms=terms,
            value_weight=value_weight,
            anomaly_map=anomaly_map,
            attribution_path=attribution_path,
            smooth_grad_samples=smooth_grad_samples,
            smooth_grad_noise=smooth_grad_noise,
            smooth_grad_as_published=smooth_grad_as_published,
            explicit_backward=explicit_backward,
            chunk_size=chunk_size,
            sigma=sigma,
            percentile_scale=percentile_scale,
            seed=seed,
        )
        if resizes:
            self.model.check_image_size(size)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Return the trainer's arguments that the method needs."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Return that the model learns from normal images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None, *, imagenet_normalization: bool = DEFAULT.imagenet_normalization
    ) -> PreProcessor:
        """Return a pre-processor that resizes images, to [0, 1] or with ImageNet's normalisation.

        Args:
            image_size: height and width in pixels; default: 128 x 128.
            imagenet_normalization: subtract ImageNet's mean and divide by its deviation.
        """
        # anomalib's exported models resize without antialiasing; trained and deployed models must see the same image.
        transforms: list[Transform] = [Resize(image_size or DEFAULT.image_size, antialias=False)]
        if imagenet_normalization:
            transforms.append(Normalize(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD))
        return PreProcessor(transform=Compose(transforms))

    def configure_post_processor(self) -> PostProcessor:
        """Return a post-processor that does not clamp scores."""
        return FalseAlarmPostProcessor(self.false_alarm_rate) if self.variant == "dual" else UnclampedPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return anomalib's default metrics, on scores whose order is kept."""
        metrics = [*AnomalibModule.configure_evaluator().test_metrics]
        for metric in metrics:
            # Without a post-processor there are no labels: F1 is left out then, and the other figures still come.
            metric.strict = False
        return RankEvaluator(test_metrics=metrics)

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's components, and the stop at convergence unless ``epochs`` or the user's own one rules."""
        components = super().configure_callbacks()
        callbacks = [components] if isinstance(components, Callback) else [*components]
        callbacks += [ImageFileCheck(), self.training_cache]
        if self.visualizer is not None:
            callbacks.append(Report())
        trainer_callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        own = any(isinstance(callback, ConvergenceStopping) for callback in trainer_callbacks)
        if self.epochs is None and not own and self._dual is None:
            callbacks.append(ConvergenceStopping())
        return callbacks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam over the cloner's weights, or Muon with one cycle of the rate over the dual variant's."""
        if self._dual is not None:
            # The cycle's length is that of the training; asking for it makes Lightning ask for the first batches.
            self._seed_epoch(self._first_epoch)
            self._set_epochs()
            return self._dual.optimizers(self.trainer, self.learning_rate)
        return adam(self._paper.cloner.parameters(), self.learning_rate)

    def on_fit_start(self) -> None:
        """Set the number of epochs if the user did not, and seed the first one."""
        logger.info("%s.", self.model.source)
        if self._dual is None:
            self._set_epochs()
            self._seed_epoch(self._first_epoch)  # Lightning asks for the first batches before the epoch starts

    def _set_epochs(self) -> None:
        # trainer_arguments would override the user's own; so only what Lightning falls back to is replaced.
        if self.trainer.max_epochs == LIGHTNING_MAX_EPOCHS and self.trainer.max_steps == -1:
            default = DEFAULT.epochs if self._dual is None else self._dual.epochs(self.trainer)
            self.trainer.fit_loop.max_epochs = self.epochs or default
        elif self.trainer.max_epochs in {None, -1} and self.epochs is not None:
            self.trainer.fit_loop.max_epochs = self.epochs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what anomalib keeps, what the model was built with, and what the dual variant takes for normal."""
        self.calibrate()  # the checkpoint's tensors are the model's own
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] = describe(self, self.model.source.critical_points)
        if self._dual is not None:
            checkpoint[CHECKPOINT_KEY]["held_out"] = self._dual.held_out_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what anomalib keeps, and remember in which epoch a resumed training begins.

        Raises:
            ValueError: if the checkpoint is another model's, a newer version's, or was built with other arguments.
        """
        check_checkpoint(checkpoint, self, self.model.source.critical_points)
        super().on_load_checkpoint(checkpoint)
        warn_of_other_images(checkpoint, self)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._first_epoch = checkpoint["epoch"] + 1
            if self._dual is not None:
                self._dual.held_out_before = (checkpoint.get(CHECKPOINT_KEY) or {}).get("held_out") or None
            return
        warn_of_other_calibration(checkpoint, self)
        if self.post_processor is not None:
            warn_of_other_scores(checkpoint, self)
        if checkpoint.get("epoch", self._trained_epochs) + 1 < self._trained_epochs:
            # anomalib's "train" resumes from --ckpt_path, and then loads the same file once more for its test.
            logger.warning(
                "What follows are the figures of the checkpoint, after epoch %d; the training has just ended with "
                "epoch %d. Test the checkpoint that it has written: anomalib test --ckpt_path.",
                checkpoint["epoch"] + 1,
                self._trained_epochs,
            )

    def on_train_start(self) -> None:
        """Find what is to be known before the first step.

        That is the dual variant's standardisation, or the value weight, if it is ``auto``; a resumed training has it.
        """
        if self._dual is not None:
            self._start_dual(self._dual)
        elif self._paper.value_weight is None:
            images = (self.model.checked_images(batch.image) for batch in self._training_batches())
            self._paper.value_weight = initial_value_weight(self._paper, images, self._sum_over_processes)
            logger.info("value_weight: auto = %.6g", self._paper.value_weight)

    def on_train_end(self) -> None:
        """Let the next training begin anew."""
        self._first_epoch = 0
        self._trained_epochs = self.trainer.current_epoch
        if self._dual is not None:
            self.calibrate()
            self._dual.end()
            cycle = cast("OneCycleLR", self.lr_schedulers())
            if cycle.last_epoch < cycle.total_steps:
                logger.warning(
                    "The training has ended after %d of %d steps; its rate, which falls to zero with the last one, was "
                    "still at %.2g. Give a shorter training fewer epochs or max_steps, so that the rate falls in time.",
                    cycle.last_epoch,
                    cycle.total_steps,
                    cycle.get_last_lr()[0],
                )

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, so that a resumed training sees what an uninterrupted one does, and decide on validation.

        Most epochs go without validation: it costs more than an epoch, and fits the post-processor alone.
        """
        if self.trainer.current_epoch != self._first_epoch or self._reads_anew():
            self._seed_epoch(self.trainer.current_epoch)
        if self._validates_sparsely():
            is_last = self.trainer.current_epoch + 1 == self.trainer.max_epochs
            self.trainer.check_val_every_n_epoch = 1 if is_last else VALIDATION_INTERVAL[self.variant]

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean discrepancy of the batch over all critical points."""
        del args, kwargs
        terms, loss = self._paper_losses(batch) if self._dual is None else self._dual_losses(self._dual, batch)
        losses = {"loss": loss.detach(), **{name: term.detach().mean() for name, term in terms.items()}}
        for name, mean in losses.items():
            self.log(
                f"train_{name}",
                mean,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=batch.batch_size,
                sync_dist=True,
            )
        return loss

    def _paper_losses(self, batch: ImageBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of the discrepancy, (N,) each, and what is minimised."""
        images = self.model.checked_images(cast("Tensor", batch.image))
        with torch.no_grad():
            features = self.training_cache.source_features(self.model.source, batch.image_path, images)
        terms = discrepancy_terms(features, self._paper.cloner(images), self._paper.terms)
        return terms, weighted_sum(terms, self._paper.known_value_weight).mean()

    def _dual_losses(self, dual: DualTraining, batch: ImageBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss of either cloner, and what is minimised."""
        paths = cast("list[str]", batch.image_path)
        fitted = dual.fitted(paths)
        # A batch of held-out images alone must not move the cloners, but other processes wait for its gradient.
        rows = fitted or [0]
        images = self.model.checked_images(cast("Tensor", batch.image)[rows])
        with torch.no_grad():
            features = self.training_cache.source_features(self.model.source, [paths[row] for row in rows], images)
        losses = dual_losses(dual.model, features)
        terms = {name: loss * bool(fitted) for name, loss in losses.items()}
        return terms, torch.stack([*terms.values()]).sum()

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: ImageBatch, batch_idx: int) -> None:
        """Validate in the epoch in which training stops."""
        del batch, batch_idx
        if self.trainer.is_last_batch:
            self._check_loss(cast("Mapping[str, Tensor]", outputs)["loss"])
        if self.trainer.should_stop and self._validates_sparsely():
            self.trainer.check_val_every_n_epoch = 1

    def on_validation_start(self) -> None:
        """Set what the dual variant takes for normal."""
        self.calibrate()

    def calibrate(self) -> None:
        """Let the dual variant, while it is trained, tell from held-out images what is normal to its cloners.

        Validation, a checkpoint and the end of a training ask for it; whoever else reads the model on the way has to.
        """
        if self._dual is None:
            return
        normal = self._dual.calibrate(self._trainer.global_step if self._trainer else 0, self._sum_over_processes)
        if normal is not None and isinstance(self.post_processor, FalseAlarmPostProcessor):
            self.post_processor.set_normal_scores(*normal)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps, for threshold and normalisation."""
        del args, kwargs
        try:
            predictions = self.model(batch.image)
        except NonFiniteError as error:
            raise NonFiniteError(error.reasons, batch.image_path) from error
        updated: STEP_OUTPUT = batch.update(**predictions._asdict())
        return updated

    def test_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return as :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx, *args, **kwargs)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Return as :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Say where the report and the pictures are."""
        if stage == "test" and self.visualizer is not None and self.trainer.is_global_zero:
            logger.info("Report: %s", Path(self.trainer.default_root_dir) / REPORT_FILE)
        scores_alone = isinstance(self.model, KdMultiresolutionModel) and self.model.anomaly_map is None
        if self.visualizer is None or scores_alone:
            return
        if stage in {"test", "predict"} and self.trainer.is_global_zero:
            folder = self.visualizer.output_dir or Path(self.trainer.default_root_dir) / "images"
            logger.info("Heat maps: %s (source: %s)", folder, self.model.source)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Export as anomalib does; refuse SmoothGrad, and a gradient through a source without backward rules."""
        self._check_exportable("onnx")
        # anomalib's default is 14, from which the exporter comes back to 18 with a page of errors.
        kwargs.setdefault("opset_version", 18)
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does; refuse SmoothGrad, and a gradient through a source without backward rules."""
        self._check_exportable("openvino")
        return super().to_openvino(*args, **kwargs)

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:
        """Quantise the source alone: with the cloner and the maps in INT8 as well, neither score nor map is left."""
        if datamodule is None:
            msg = "compression_type=INT8_PTQ: needs a data module, whose training images calibrate it."
            raise ValueError(msg)
        return quantize_source(model, datamodule)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> KdMultiresolution:
        """Load a model; the source's weights come from the checkpoint, not from a download or the original file.

        Args:
            *args: as anomalib's.
            **kwargs: as anomalib's.
        """
        token = _weights_follow.set(True)
        try:
            model = super().load_from_checkpoint(*args, **kwargs)
            return cast("KdMultiresolution", model)
        finally:
            _weights_follow.reset(token)

    @property
    def _paper(self) -> KdMultiresolutionModel:
        """The torch model of the paper's variant."""
        assert isinstance(self.model, KdMultiresolutionModel)
        return self.model

    def _start_dual(self, dual: DualTraining) -> None:
        """Let the dual variant choose its held-out images and see all training images once."""
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if isinstance(dataset, RememberedImages):
            paths = dataset.paths
        elif isinstance(dataset, AnomalibDataset):
            paths = dataset.samples.image_path.tolist()
        else:
            msg = f"variant='dual' holds out training images by their paths: use anomalib's data, not {dataset}."
            raise TypeError(msg)
        dual.check_cycle(cast("OneCycleLR", self.lr_schedulers()), self.trainer, self.learning_rate)
        dual.start(
            paths, self._training_features(), self._sum_over_processes, resumed=self._first_epoch > 0,
            precision=self.trainer.precision_plugin.train_step_context,
        )  # fmt: skip

    def _training_features(self) -> Iterator[tuple[Sequence[str], Tensor, list[Tensor]]]:
        """Yield paths, images and source features of all training batches."""
        for batch in self._training_batches():
            images = self.model.checked_images(batch.image)
            paths = cast("list[str]", batch.image_path)
            # As in a training step, which compares them with its own.
            with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
                features = self.training_cache.source_features(self.model.source, paths, images)
            yield paths, images, [level.to(images.dtype) for level in features]

    def _training_batches(self) -> Iterator[Any]:
        """Yield the batches of the training images, as a training step gets them."""
        loader = cast("Iterable[ImageBatch]", self.trainer.train_dataloader)
        for batch_on_host in loader:
            batch = self.trainer.strategy.batch_to_device(batch_on_host)
            if isinstance(self.pre_processor, Callback):
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, 0)
            yield batch

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return cast("Tensor", self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def _check_loss(self, loss: Tensor) -> None:
        """Check once per epoch that the loss is finite: nothing comes back from where it is not.

        Raises:
            ValueError: if it is not.
        """
        if bool(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").isfinite()):
            return
        sick = [
            path
            for batch in self._training_batches()
            for path, image in zip(batch.image_path or (), batch.image, strict=False)
            if not bool(image.isfinite().all())
        ]
        why = (
            f"{sick[0]}: {SICK_IMAGE}"
            if sick
            else f"learning_rate={self.learning_rate:g} may be too high, or the precision too low"
        )
        msg = f"The training loss is {float(loss)} after epoch {self.trainer.current_epoch + 1}. {why}."
        raise ValueError(msg)

    def _check_exportable(self, export_type: str) -> None:
        if not isinstance(self.model, KdMultiresolutionModel):
            return
        if self.model.anomaly_map == "smooth_grad":
            msg = (
                f"export_type={export_type!r}: anomaly_map='smooth_grad' draws random numbers and runs the networks "
                f"{self.model.smooth_grad_samples} times, which is not exported to this form. Use "
                "anomaly_map='gradient', 'guided_backprop' or 'discrepancy', or export_type='torch'."
            )
            raise NotImplementedError(msg)
        self.model.check_explicit_backward()

    def _reads_anew(self) -> bool:
        """Whether Lightning, having asked for the first batches of a resumed training, is going to ask again."""
        loop = self.trainer.fit_loop
        resuming = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)  # the latter from Lightning 2.6 on
        return self.trainer.current_epoch > 0 and not resuming

    def _validates_sparsely(self) -> bool:
        """Whether the user left validation at Lightning's default, and the last epoch can be told beforehand."""
        bounded = self.trainer.max_steps == -1 and self.trainer.max_epochs not in {None, -1}
        return bounded and self.trainer.check_val_every_n_epoch in {1, VALIDATION_INTERVAL[self.variant]}

    def _seed_epoch(self, epoch: int) -> None:
        # anomalib's command line takes --seed_everything, and does not call it.
        seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        torch.manual_seed(seed + EPOCH_SEEDS * epoch)


class kd_multiresolution(KdMultiresolution):  # noqa: N801
    """:class:`KdMultiresolution` for ``--model kd_multiresolution``: the command line takes names of classes only."""

    def __new__(cls, *args: Any, **kwargs: Any) -> KdMultiresolution:  # type: ignore[misc]
        """Return a :class:`KdMultiresolution`: checkpoints and result folders carry its name."""
        return KdMultiresolution(*args, **kwargs)


register_models(KdMultiresolution, kd_multiresolution)
