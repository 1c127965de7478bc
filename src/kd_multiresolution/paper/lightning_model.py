"""The Lightning module: steps, optimiser and anomalib's components; at its end the registration with anomalib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from kd_multiresolution.paper.attribution import CHUNK_SIZE
from kd_multiresolution.paper.discrepancy import discrepancy_terms, weighted_sum
from kd_multiresolution.paper.presets import LEARNING_RATE, PRESETS
from kd_multiresolution.paper.torch_model import KdMultiresolutionModel
from kd_multiresolution.paper.value_weight import initial_value_weight
from kd_multiresolution.plugin.arguments import arguments_of, check_positive, check_seed, check_types
from kd_multiresolution.plugin.checkpoint import CheckpointEntry, check_variant
from kd_multiresolution.plugin.module import PluginModule
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor
from kd_multiresolution.plugin.pre_processor import check_unconfigured, resizing, sides, warn_of_other_normalization
from kd_multiresolution.plugin.registration import register_models
from kd_multiresolution.plugin.tiling import allow_tiles
from kd_multiresolution.results.drift import DriftWarning
from kd_multiresolution.results.report import Report
from kd_multiresolution.results.visualizer import FrameVisualizer, check_drawable
from kd_multiresolution.source.channel_moments import ChannelMoments
from kd_multiresolution.training.batches import batches_of_an_epoch, fork_rng, sum_over_processes
from kd_multiresolution.training.cache import TrainingCache
from kd_multiresolution.training.convergence import ConvergenceStopping
from kd_multiresolution.training.epochs import EpochLimit, EpochSeeds
from kd_multiresolution.training.learnt_pictures import LearntPictures
from kd_multiresolution.training.loss import EpochLosses, FiniteLoss
from kd_multiresolution.training.optimizer import adam
from kd_multiresolution.training.thresholds import Thresholds

logger = logging.getLogger(__name__)

DEFAULT = PRESETS["mvtec"]


class KdMultiresolution(PluginModule, AnomalibModule):
    """Multiresolution knowledge distillation: a small cloner imitates a frozen source on normal images.

    Where the two disagree the image is anomalous; the gradient of their discrepancy at the input shows where. Defaults
    are the paper's settings for MVTec AD (Salehi et al., CVPR 2021, arXiv 2011.11108).

    Args:
        source: the frozen network: any convolutional model of timm, such as ``vgg16.tv_in1k`` (the paper's) or
            ``resnet18.tv_in1k``; or ``efficientnet_lite0``, whose weights were installed with this package.
        pretrained: use the source's pre-trained weights, downloaded on first use unless they were installed. If false,
            and no file is given, the source is random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of the download.
        critical_points: names of the source's levels at which the cloner is trained, ``pool1`` to ``pool5`` for VGG,
            timm's feature levels otherwise (``layer1`` to ``layer4`` for ResNet, ``blocks.1``, ``blocks.2``,
            ``blocks.4`` and ``blocks.6`` for EfficientNet-Lite0). Default: the last four.
        score_points: the critical points that make up score and map. Default: the last three of them.
        cloner: ``compact`` as in the paper's Fig. 2, or ``equal`` in size to the source.
        cloner_bias: give the cloner's convolutions a bias. The paper has none.
        cloner_batch_norm: give the cloner batch norm, as the published code does.
        terms: terms of the discrepancy: ``total`` (both), ``value`` or ``direction``.
        value_weight: factor of the value term beside the direction term, above 0; or ``auto``, the paper's rule: equal
            initial size of both, measured on the first batches before the first step.
        scale_channels: divide each channel of the source by its root mean square over the training images, measured
            once, before the first step of the model's first training (a trial such as ``fast_dev_run`` is one), so that
            all channels and levels count alike. For the gradient map of another source than VGG-16, whose levels need
            none; see ``docs/anomaly_maps.md``.
        anomaly_map: ``gradient`` of the score at the input; ``smooth_grad``, its mean over noisy copies of the image;
            ``guided_backprop``, guided at the cloner's ReLUs; ``discrepancy`` of source and cloner at each position,
            which needs no gradient; null for image scores alone.
        attribution_path: whether the gradient runs through ``both`` networks, as in the published code, or through the
            ``cloner`` alone, as the paper has it.
        smooth_grad_samples: number of SmoothGrad's noisy copies.
        smooth_grad_noise: standard deviation of SmoothGrad's noise, as a fraction of the image's range.
        smooth_grad_as_published: average scaled maps under the published code's noise, (noise / range) squared, instead
            of gradients.
        explicit_backward: compute gradients by the operators that an exported model has, not by autograd: same values.
        chunk_size: most images, or noisy copies, whose gradient is computed at once; it bounds the memory.
        sigma: standard deviation of the anomaly map's Gaussian blur, in pixels.
        percentile_scale: scale every map to [0, 1] by its own 99th percentile, as for the paper's pixel figures. Maps
            of different images are then not comparable.
        image_size: height and width in pixels, or one number for both, to which images are resized; multiples of the
            source's stride at the last critical point. Default: 128. Not together with a pre-processor of your own.
        imagenet_normalization: normalise images with the mean and deviation that the source was trained with:
            ImageNet's for torchvision's networks, 0.5 and 0.5 for ``efficientnet_lite0``. Default: no; the paper does
            so for CIFAR-10 only.
        region: file of a mask, such as a PNG, as large as the image files it was drawn on: white is judged, of all else
            nothing is seen, learnt from, scored or marked. Kept in checkpoints and exported files. Default: everything.
        epochs: train for this many epochs. Default: until the training loss has converged. ``--trainer.max_epochs``
            takes precedence (unless it is 1000, Lightning's own default), as an upper limit where this is not given.
        learning_rate: Adam's learning rate. Default: 1e-3.
        cache: ``float32`` or ``float16``: in training read each image once and compute the source's features of it
            once, kept in that precision; null: in every epoch. Images that augmentation changes are never kept, nor
            are those that a data set reads by a ``__getitem__`` of your own, nor is any where the trainer limits the
            batches of an epoch.
        cache_memory: GiB of the training device's memory, a GPU's on a GPU, for images, which may take half of it, and
            features; features that exceed it go into a file that vanishes with the training, those of validation images
            into a second one.
        cache_folder: folder of these files. Default: the system's folder for temporary files.
        seed: seed of the cloner's initial weights, of a random source, and, unless Lightning's ``seed_everything`` was
            called, of the order of the training images, which follows from seed and epoch.
        pre_processor: anomalib's pre-processor; true for resizing (and normalising, if asked for), false for none.
        post_processor: anomalib's post-processor; true for one that does not clamp scores, false for raw scores.
        evaluator: anomalib's evaluator; true for AUROC and F1 score of images and pixels.
        visualizer: anomalib's visualizer; false leaves out the pictures, and the page about
            each test and prediction; the table of scores stays.
        variant: no argument any more: ``dual`` is the model ``KdMultiresolutionDual``.

    Raises:
        TypeError: if an argument has another type; numpy's numbers are none of Python's.
        ValueError: if an argument is out of range, or two of them contradict each other.
        RuntimeError: if the source's pre-trained weights cannot be had.
    """

    model: KdMultiresolutionModel

    checkpoint_entry = CheckpointEntry(
        model="KdMultiresolution",
        format=4,
        oldest_format=0,
        built=("source", "cloner", "cloner_bias", "cloner_batch_norm", "scale_channels"),
        built_before={"scale_channels": False},
        scoring=(
            "terms", "value_weight", "score_points", "anomaly_map", "attribution_path", "sigma", "percentile_scale",
        ),
        calibration={},
        remedy="validated anew (anomalib validate, Engine.validate)",
    )  # fmt: skip

    def __init__(
        self,
        source: str = "vgg16.tv_in1k",
        pretrained: bool = True,
        source_weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        score_points: Sequence[str] | None = None,
        cloner: Literal["compact", "equal"] = "compact",
        cloner_bias: bool = False,
        cloner_batch_norm: bool = True,
        terms: Literal["total", "value", "direction"] = "total",
        value_weight: float | Literal["auto"] = DEFAULT.value_weight,
        scale_channels: bool = False,
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
        region: str | Path | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
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
        check_types(KdMultiresolution.__init__, given)
        check_variant(variant, "KdMultiresolution")
        check_seed("seed", seed)
        check_drawable(visualizer, post_processor, has_maps=anomaly_map is not None)
        check_unconfigured(pre_processor, image_size, imagenet_normalization)
        check_positive("epochs", epochs)
        check_positive("learning_rate", learning_rate)
        size = DEFAULT.image_size if image_size is None else sides(image_size)
        resizes = pre_processor is True
        if resizes:
            pre_processor = self.configure_pre_processor(
                size, imagenet_normalization=imagenet_normalization, source=source
            )
        else:
            warn_of_other_normalization(pre_processor, source)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.hparams.pop("variant")
        self.epochs = epochs
        self.learning_rate = learning_rate or LEARNING_RATE
        self.training_cache = TrainingCache(cache, memory=cache_memory, folder=cache_folder)
        self.epoch_seeds = EpochSeeds(seed)
        self.epoch_losses = EpochLosses()
        self.thresholds = Thresholds()
        self.model = KdMultiresolutionModel(**arguments_of(KdMultiresolutionModel, given))
        allow_tiles(self.model)
        if resizes:
            self.model.check_image_size(size)
        self.judge_within(region)

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        *,
        imagenet_normalization: bool | None = None,
        source: str = "vgg16.tv_in1k",
    ) -> PreProcessor:
        """Return a pre-processor that resizes images, to [0, 1] or as the source was trained.

        Args:
            image_size: height and width in pixels; default: 128 x 128.
            imagenet_normalization: subtract the mean and divide by the deviation that the source was trained with;
                default: no.
            source: name of the source.

        Raises:
            ValueError: if timm does not have the source, or does not say how it was trained.
        """
        normalizes = DEFAULT.imagenet_normalization if imagenet_normalization is None else imagenet_normalization
        return resizing(image_size or DEFAULT.image_size, normalized_for=source if normalizes else None)

    def configure_post_processor(self) -> PostProcessor:
        """Return a post-processor that does not clamp scores."""
        return UnclampedPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> FrameVisualizer:
        """Return anomalib's pictures, of what the model saw."""
        return FrameVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's components, and the stop at convergence unless ``epochs`` or the user's own one rules."""
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
            EpochLimit(self.epochs, lambda _: DEFAULT.epochs),
        ]
        callbacks.append(report)
        trainer_callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        own = any(isinstance(callback, ConvergenceStopping) for callback in trainer_callbacks)
        if self.epochs is None and not own:
            callbacks.append(ConvergenceStopping())
        return self.configured([*callbacks, self.thresholds])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over the cloner's weights."""
        return adam(self.model.cloner.parameters(), self.learning_rate)

    def on_train_start(self) -> None:
        """Measure the channels' scale, and the value weight if it is ``auto``; a resumed training has both."""
        scale = self.model.channel_scale
        if scale is not None and not scale.is_measured:
            scale.measure(mean_square for _, mean_square in self._channel_moments())
        if self.model.value_weight is None:
            images = (self.model.checked_images(batch.image) for batch in batches_of_an_epoch(self.trainer, self))
            self.model.value_weight = initial_value_weight(
                lambda images: self.model.in_units(self.model.source(images)),
                self.model.cloner,
                images,
                lambda tensor: sum_over_processes(self.trainer, tensor),
            )
            logger.info("value_weight: auto = %.6g", self.model.value_weight)

    def _channel_moments(self) -> list[tuple[Tensor, Tensor]]:
        """Return mean and mean square of the source's channels over the training images."""
        moments = ChannelMoments()
        with fork_rng(self.device):
            for batch in batches_of_an_epoch(self.trainer, self):
                moments.add(self._source_features(batch, self.model.checked_images(batch.image)))
        return moments.of_levels(lambda tensor: sum_over_processes(self.trainer, tensor))

    def _source_features(self, batch: Any, images: Tensor) -> list[Tensor]:
        """Return the source's features of training images, checked before, from the cache if they are there."""
        paths = getattr(batch, "image_path", None)  # batches of videos have none
        with torch.no_grad():
            return self.training_cache.source_features(self.model.source, paths, images)

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean discrepancy of the batch over all critical points (Eq. 4)."""
        del args, kwargs
        images = self.model.checked_images(cast("Tensor", batch.image))
        features = self.model.in_units(self._source_features(batch, images))
        terms = discrepancy_terms(features, self.model.cloner(images), self.model.terms)
        loss = weighted_sum(terms, self.model.known_value_weight).mean()
        self.epoch_losses.add(loss, terms, batch.batch_size)
        return loss

    @property
    def validates_scores_alone(self) -> bool:
        """Whether the validation under way goes without maps: they are gradients, and nobody takes them."""
        return self.model.takes_gradient and self.thresholds.scores_suffice(self.trainer)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Return the batch with raw scores and maps, or with scores alone where nobody takes the maps."""
        del args, kwargs
        return self.predicted(batch, partial(self._scored, batch) if self.validates_scores_alone else None)

    def _scored(self, batch: Any, images: Tensor) -> InferenceBatch:
        checked = self.model.checked_images(images)
        paths = getattr(batch, "image_path", None)  # batches of videos have none
        with torch.autocast(images.device.type, enabled=False):  # as the scores beside gradients
            features = self.training_cache.validation_features(self.model.source, paths, checked)
            return self.model.scored(checked, features)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what anomalib keeps, what the model was built with, and thresholds that fit the weights."""
        if self._trainer is not None:
            self.thresholds.complete(self._trainer, self)  # the checkpoint's tensors are the model's own
        super().on_save_checkpoint(checkpoint)

    @property
    def tiled_networks(self) -> Sequence[nn.Module]:
        """Source and cloner.

        Raises:
            ValueError: if the map is made of their operators, one by one, which know no tiles.
        """
        if self.model.anomaly_map == "guided_backprop" or self.model.explicit_backward:
            model = self.model
            msg = (
                f"tiler: anomaly_map={model.anomaly_map!r}, explicit_backward={model.explicit_backward}: this map "
                "is computed operator by operator, without tiles. Use anomaly_map='gradient' or 'discrepancy'."
            )
            raise ValueError(msg)
        return [self.model.source, self.model.cloner]

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Export as anomalib does; refuse SmoothGrad, and a gradient through a source without backward rules."""
        self.model.check_exportable("onnx")
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export as :meth:`to_onnx`."""
        self.model.check_exportable("openvino")
        return super().to_openvino(*args, **kwargs)


class kd_multiresolution(KdMultiresolution):  # noqa: N801
    """:class:`KdMultiresolution` for ``--model kd_multiresolution``: the command line takes names of classes only."""

    def __new__(cls, *args: Any, **kwargs: Any) -> KdMultiresolution:  # type: ignore[misc]
        """Return a :class:`KdMultiresolution`: checkpoints and result folders carry its name."""
        return KdMultiresolution(*args, **kwargs)


register_models(KdMultiresolution, kd_multiresolution)
