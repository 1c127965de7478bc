"""The torch model: images in, features (training) or anomaly scores and maps (evaluation) out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from kd_multiresolution.paper.anomaly_map import AnomalyMapGenerator, discrepancy_map
from kd_multiresolution.paper.attribution import CHUNK_SIZE, check_smooth_grad, guided_relu, input_gradient, smooth_grad
from kd_multiresolution.paper.backward import RecordedNetwork, explicit_gradient, recorded_source
from kd_multiresolution.paper.channel_scale import ChannelScale
from kd_multiresolution.paper.cloner import Cloner
from kd_multiresolution.paper.discrepancy import discrepancy, normalize_terms
from kd_multiresolution.paper.evaluation import HAVE_FLOAT64, fast_scores, fast_scores_and_maps
from kd_multiresolution.paper.value_weight import checked_value_weight
from kd_multiresolution.plugin.arguments import check_choice, check_types
from kd_multiresolution.source.folding import Folding
from kd_multiresolution.source.images import check_image_size, checked_images
from kd_multiresolution.source.network import Source
from kd_multiresolution.source.region import within
from kd_multiresolution.source.stages import score_points_of

ANOMALY_MAPS = ("gradient", "smooth_grad", "guided_backprop", "discrepancy")
ATTRIBUTION_PATHS = ("both", "cloner")


class KdMultiresolutionModel(nn.Module):
    """Source, cloner and their discrepancy (arXiv 2011.11108).

    In training mode it returns the activations of both networks, in evaluation mode anomalib's ``InferenceBatch``.

    Args:
        source: any convolutional model of timm, or ``efficientnet_lite0``.
        pretrained: use the source's pre-trained weights; if false, and no file is given, they are random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of a download.
        critical_points: where source and cloner are compared in training; default: the source's last four levels.
        score_points: which of them make up score and map; default: the last three.
        cloner: ``compact`` or ``equal`` (in size to the source).
        cloner_bias: give the cloner's convolutions a bias.
        cloner_batch_norm: give the cloner batch norm.
        terms: ``total``, ``value`` or ``direction``.
        value_weight: factor of the value term, > 0; ``auto``: the paper's rule, set at the start of training.
        scale_channels: divide each channel of the source by its root mean square on normal images, which
            ``channel_scale.measure`` is told at the start of training.
        anomaly_map: ``gradient`` of the score at the input, ``smooth_grad`` (its mean over noisy copies of the image),
            ``guided_backprop`` (guided at the cloner's ReLUs); ``discrepancy`` of each position, which needs no
            gradient; or ``None`` for scores alone.
        attribution_path: take the gradient through ``both`` networks (published code) or the ``cloner`` (paper).
        smooth_grad_samples: number of noisy copies.
        smooth_grad_noise: standard deviation of the noise as a fraction of the image's range.
        smooth_grad_as_published: average scaled maps, under the published code's noise.
        explicit_backward: compute gradients by the operators that an exported model has, instead of by autograd.
        chunk_size: largest number of images, or of their noisy copies, whose gradient is computed at once, 1 or more.
        sigma: standard deviation of the map's Gaussian blur in pixels.
        percentile_scale: scale each map to its 99th percentile, as the paper does; maps are then not comparable.
        seed: seed of the cloner's initial weights, and of a random source.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, or two of them contradict each other.
        RuntimeError: if the source's pre-trained weights cannot be had.
    """

    def __init__(
        self,
        source: str = "vgg16.tv_in1k",
        *,
        pretrained: bool = True,
        source_weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        score_points: Sequence[str] | None = None,
        cloner: str = "compact",
        cloner_bias: bool = False,
        cloner_batch_norm: bool = True,
        terms: str | Sequence[str] = "total",
        value_weight: float | str = 0.5,
        scale_channels: bool = False,
        anomaly_map: str | None = "gradient",
        attribution_path: str = "both",
        smooth_grad_samples: int = 50,
        smooth_grad_noise: float = 0.05,
        smooth_grad_as_published: bool = False,
        explicit_backward: bool = False,
        chunk_size: int = CHUNK_SIZE,
        sigma: float = 4.0,
        percentile_scale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_types(KdMultiresolutionModel.__init__, locals())
        if anomaly_map is not None:
            check_choice("anomaly_map", anomaly_map, ANOMALY_MAPS)
        check_choice("attribution_path", attribution_path, ATTRIBUTION_PATHS)
        check_smooth_grad(smooth_grad_samples, smooth_grad_noise, chunk_size)
        self.terms = normalize_terms(terms)
        self.value_weight = checked_value_weight(value_weight)
        self._finds_value_weight = self.value_weight is None
        self.anomaly_map = anomaly_map
        self.attribution_path = attribution_path
        self.smooth_grad_samples = smooth_grad_samples
        self.smooth_grad_noise = smooth_grad_noise
        self.smooth_grad_as_published = smooth_grad_as_published
        self.explicit_backward = explicit_backward
        self.chunk_size = chunk_size
        self.seed = seed
        self.source = Source(
            source, pretrained=pretrained, weights=source_weights, critical_points=critical_points, seed=seed
        )
        self.score_points = score_points_of(self.source.critical_points, score_points)
        channels = [level.channels for level in self.source.levels if level.critical]
        self.channel_scale = ChannelScale(channels) if scale_channels else None
        self.cloner = Cloner(self.source.levels, size=cloner, bias=cloner_bias, batch_norm=cloner_batch_norm, seed=seed)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma, percentile_scale=percentile_scale)
        self._is_recorded: bool | None = None
        self._folded_source, self._folded_cloner = Folding(), Folding()
        self.to(memory_format=torch.channels_last)
        if explicit_backward:
            self.check_explicit_backward()

    def train(self, mode: bool = True) -> KdMultiresolutionModel:
        """Set the mode; in evaluation mode ``torch.compile`` finds the operators of a gradient, if they have rules."""
        super().train(mode)
        if not mode and self.takes_gradient and self._is_recorded is None:
            try:
                self.check_explicit_backward()
                self._is_recorded = self.recorded_cloner is not None
            except ValueError:  # where the gradient begins, a compiled graph is broken
                self._is_recorded = False
        return self

    def features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the activations of source and cloner at the critical points, two lists of (N, C_i, H_i, W_i).

        The source's, in the units of :meth:`in_units`, have no graph. Images and errors are those of :meth:`forward`.
        """
        images = self.checked_images(images)
        with torch.no_grad():
            source_features = self.in_units(self.source(images))
        return source_features, self.cloner(images)

    def in_units(self, source_features: Sequence[Tensor]) -> list[Tensor]:
        """Return the source's features as the cloner imitates them: scaled, if they are, or as they are."""
        return [*source_features] if self.channel_scale is None else self.channel_scale(source_features)

    def forward(self, images: Tensor) -> InferenceBatch | tuple[list[Tensor], list[Tensor]]:
        """Return :meth:`features` in training mode, scores and maps in evaluation mode.

        Args:
            images: (N, 3, H, W) or (N, 1, H, W), float, H and W multiples of the source's stride.

        Returns:
            In evaluation mode an ``InferenceBatch``: ``pred_score`` (N,), the raw discrepancy, >= 0 and unbounded;
            ``anomaly_map`` (N, 1, H, W), >= 0, or ``None``.

        Raises:
            ValueError: if the images have another shape.
            RuntimeError: in evaluation mode, if ``value_weight`` is ``auto`` and was never set by training.
        """
        if self.training:
            return self.features(images)
        images = self.checked_images(images)
        if not self.takes_gradient:
            with torch.no_grad():
                return self._predict_forward(images)
        scores, attribution = self._attribution(images)
        with torch.no_grad():
            maps = within(self.anomaly_map_generator(attribution), self.source.region)
            return InferenceBatch(pred_score=scores, anomaly_map=maps)

    @property
    def takes_gradient(self) -> bool:
        """Whether the anomaly map is made of gradients."""
        return self.anomaly_map not in {None, "discrepancy"}

    @torch.no_grad()
    def scored(self, images: Tensor, source_features: Sequence[Tensor]) -> InferenceBatch:
        """Return scores alone, from source features that are known.

        Args:
            images: as :meth:`checked_images` returns them.
            source_features: the source's own at the critical points.
        """
        return InferenceBatch(
            pred_score=self._discrepancy(self.in_units(source_features), self._folded_cloner.of(self.cloner)(images))
        )

    def _predict_forward(self, images: Tensor) -> InferenceBatch:
        """Return the scores, and the discrepancy map if one is wanted, from one pass through both networks."""
        features = self._features(images)
        if self.anomaly_map is None:
            return InferenceBatch(pred_score=self._discrepancy(*features))
        source, cloner = ([*compress(part, self._is_scored)] for part in features)
        weight, (height, width) = self.known_value_weight, images.shape[-2:]
        if torch.compiler.is_compiling() or images.device.type not in HAVE_FLOAT64:
            scores = self._discrepancy(*features)
            maps = discrepancy_map(source, cloner, (height, width), value_weight=weight, terms=self.terms)
        else:
            scores, maps = fast_scores_and_maps(source, cloner, (height, width), value_weight=weight, terms=self.terms)
        maps = within(self.anomaly_map_generator(maps), self.source.region)
        return InferenceBatch(pred_score=scores, anomaly_map=maps)

    def _attribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores, (N,), and what the pixels contribute to them, (N, C, H, W)."""
        if self.anomaly_map != "smooth_grad":
            return self._gradient(images)
        # In the precision of the other gradients' scores.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            scores = self._score(images)
        mean = smooth_grad(
            lambda noisy: self._gradient(noisy)[1],
            images,
            samples=self.smooth_grad_samples,
            noise=self.smooth_grad_noise,
            as_published=self.smooth_grad_as_published,
            chunk_size=self.chunk_size,
            seed=self.seed,
        )
        return scores, mean

    def _gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and their gradient at the input."""
        # Gradients are too small for half precision, as in input_gradient.
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and self._is_recorded):
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                return self._explicit_gradient(images)
        if self.explicit_backward:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                parts = [self._explicit_gradient(part) for part in torch.split(images, self.chunk_size)]
                scores, gradients = zip(*parts, strict=True)
                return torch.cat(scores), torch.cat(gradients)
        return input_gradient(self._score, images, chunk_size=self.chunk_size)

    def _explicit_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Do as :func:`input_gradient`, with forward operators alone."""
        return explicit_gradient(
            images,
            self.recorded_source if self.attribution_path == "both" else self.source,
            self.recorded_cloner,
            self._is_scored,
            value_weight=self.known_value_weight,
            terms=self.terms,
            guided=self.anomaly_map == "guided_backprop",
            channel_scale=self.channel_scale,
        )

    def check_exportable(self, export_type: str) -> None:
        """Check that the model can be exported to ``onnx`` or ``openvino``.

        Raises:
            NotImplementedError: if its map is SmoothGrad's.
            ValueError: as :meth:`check_explicit_backward`.
        """
        if self.anomaly_map == "smooth_grad":
            msg = (
                f"export_type={export_type!r}: anomaly_map='smooth_grad' draws random numbers and runs the networks "
                f"{self.smooth_grad_samples} times, which is not exported to this form. Use anomaly_map='gradient', "
                "'guided_backprop' or 'discrepancy', or export_type='torch'."
            )
            raise NotImplementedError(msg)
        self.check_explicit_backward()

    def check_explicit_backward(self) -> None:
        """Raise a ``ValueError`` if the gradient leads through a source with an operator without a backward rule."""
        if self.takes_gradient and self.attribution_path == "both":
            _ = self.recorded_source

    @cached_property
    def recorded_cloner(self) -> RecordedNetwork:
        """The cloner's operators."""
        return RecordedNetwork(self.cloner)

    @cached_property
    def recorded_source(self) -> RecordedNetwork:
        """The source's operators, as :func:`recorded_source`."""
        return recorded_source(self.source)

    def _features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the activations of source and cloner at the critical points, with gradients where they are taken."""
        if not torch.is_grad_enabled():
            source_features = self.in_units(self._folded_source.of(self.source)(images))
            return source_features, self._folded_cloner.of(self.cloner)(images)
        # Not folded: the last digit can decide which of two equal activations of a max pool gets the gradient.
        with torch.set_grad_enabled(self.attribution_path == "both"):
            source_features = self.in_units(self.source(images))
        if self.anomaly_map == "guided_backprop":
            return source_features, self.recorded_cloner.forward(images, rectify=guided_relu)[0]
        return source_features, self.cloner(images)

    @property
    def _is_scored(self) -> list[bool]:
        """Which of the critical points make up the score."""
        return [point in self.score_points for point in self.source.critical_points]

    def _score(self, images: Tensor) -> Tensor:
        return self._discrepancy(*self._features(images))

    def _discrepancy(self, source_features: Sequence[Tensor], cloner_features: Sequence[Tensor]) -> Tensor:
        """Return the discrepancy at the score points, (N,)."""
        scored = [[*compress(part, self._is_scored)] for part in (source_features, cloner_features)]
        in_few_operators = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        in_few_operators &= scored[0][0].device.type in HAVE_FLOAT64
        function = fast_scores if in_few_operators else discrepancy
        return function(*scored, value_weight=self.known_value_weight, terms=self.terms)

    @property
    def known_value_weight(self) -> float:
        """The value weight.

        Raises:
            RuntimeError: if it is ``auto`` and was never set by training.
        """
        if self.value_weight is None:
            msg = "value_weight='auto' is set at the start of training: train the model first, or give a number."
            raise RuntimeError(msg)
        return self.value_weight

    def check_image_size(self, image_size: Sequence[int]) -> None:
        """Raise a ``ValueError`` unless each level of the source covers the image exactly, and a map's blur fits in."""
        check_image_size(image_size, self.source)
        if self.anomaly_map is not None:
            self.anomaly_map_generator.check_image_size(image_size)

    def checked_images(self, images: Tensor) -> Tensor:
        """Return the images as plain tensors with three channels; grey images are repeated.

        Raises:
            ValueError: if they have another shape than :meth:`forward` takes.
        """
        return checked_images(images, self.source, next(self.cloner.parameters()).dtype)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the weights: the value weight, and where the source's come from."""
        return {"value_weight": self.value_weight, "source_weights": self.source.weights}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`; a value weight that was given as a number stays."""
        if self._finds_value_weight:
            self.value_weight = state["value_weight"]
        self.source.weights = state["source_weights"]
