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
from torchvision.tv_tensors import TVTensor

from kd_multiresolution.anomaly_map import AnomalyMapGenerator, discrepancy_map
from kd_multiresolution.arguments import check_types
from kd_multiresolution.attribution import CHUNK_SIZE, guided_relu, input_gradient, smooth_grad
from kd_multiresolution.backward import RecordedNetwork, discrepancy_gradient
from kd_multiresolution.cloner import Cloner
from kd_multiresolution.discrepancy import discrepancy, normalize_terms
from kd_multiresolution.finite import checked_predictions
from kd_multiresolution.source import Source

ANOMALY_MAPS = ("gradient", "smooth_grad", "guided_backprop", "discrepancy")
ATTRIBUTION_PATHS = ("both", "cloner")
NUM_SCORE_POINTS = 3  # The published code trains on pool2 to pool5, and scores on pool3 to pool5.


class KdMultiresolutionModel(nn.Module):
    """Source, cloner and their discrepancy (arXiv 2011.11108).

    In training mode it returns the activations of both networks, in evaluation mode anomalib's ``InferenceBatch``.

    Args:
        source: ``light_vgg`` or any convolutional model of timm.
        pretrained: use the source's pre-trained weights; if false, and no file is given, they are random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of a download.
        critical_points: where source and cloner are compared in training; default: the source's last four levels.
        score_points: which of them make up score and map; default: the last three.
        cloner: ``compact`` or ``equal`` (in size to the source).
        cloner_bias: give the cloner's convolutions a bias.
        cloner_batch_norm: give the cloner batch norm.
        terms: ``total``, ``value`` or ``direction``.
        value_weight: factor of the value term, > 0; ``auto``: the paper's rule, set at the start of training.
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
            _check_choice("anomaly_map", anomaly_map, ANOMALY_MAPS)
        _check_choice("attribution_path", attribution_path, ATTRIBUTION_PATHS)
        if smooth_grad_samples < 1:
            msg = f"smooth_grad_samples={smooth_grad_samples!r}: expected a number of noisy copies, 1 or more."
            raise ValueError(msg)
        if chunk_size < 1:
            msg = f"chunk_size={chunk_size!r}: expected a number of images, 1 or more."
            raise ValueError(msg)
        if not 0 <= smooth_grad_noise < float("inf"):
            msg = f"smooth_grad_noise={smooth_grad_noise!r}: expected a fraction of the image's range, 0 or more."
            raise ValueError(msg)
        self.terms = normalize_terms(terms)
        self.value_weight = _checked_value_weight(value_weight)
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
        self.score_points = self._checked_score_points(score_points)
        self.cloner = Cloner(self.source.levels, size=cloner, bias=cloner_bias, batch_norm=cloner_batch_norm, seed=seed)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma, percentile_scale=percentile_scale)
        self.to(memory_format=torch.channels_last)
        if explicit_backward:
            self.check_explicit_backward()

    def features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the activations of source and cloner at the critical points.

        Args:
            images: (N, 3, H, W) or (N, 1, H, W), float, H and W multiples of the source's stride.

        Returns:
            Two lists of (N, C_i, H_i, W_i), the source's without a graph.

        Raises:
            ValueError: if the images have another shape.
        """
        images = self.checked_images(images)
        with torch.no_grad():
            source_features = self.source(images)
        return source_features, self.cloner(images)

    def forward(self, images: Tensor) -> InferenceBatch | tuple[list[Tensor], list[Tensor]]:
        """Return :meth:`features` in training mode, scores and maps in evaluation mode.

        Args:
            images: (N, 3, H, W) or (N, 1, H, W), float, H and W multiples of the source's stride.

        Returns:
            In evaluation mode an ``InferenceBatch``: ``pred_score`` (N,), the raw discrepancy, >= 0 and unbounded;
            ``anomaly_map`` (N, 1, H, W), >= 0, or ``None``.

        Raises:
            ValueError: if the images have another shape.
            NonFiniteError: in evaluation mode, if a score or map is not finite.
            RuntimeError: in evaluation mode, if ``value_weight`` is ``auto`` and was never set by training.
        """
        if self.training:
            return self.features(images)
        images = self.checked_images(images)
        if self.anomaly_map in {None, "discrepancy"}:
            with torch.no_grad():
                return checked_predictions(self._predict_forward(images), images)
        scores, attribution = self._attribution(images)
        with torch.no_grad():
            maps = self.anomaly_map_generator(attribution)
            return checked_predictions(InferenceBatch(pred_score=scores, anomaly_map=maps), images)

    def _predict_forward(self, images: Tensor) -> InferenceBatch:
        """Return the scores, and the discrepancy map if one is wanted, from one pass through both networks."""
        source_features, cloner_features = self._score_features(images)
        weight, terms = self.known_value_weight, self.terms
        scores = discrepancy(source_features, cloner_features, value_weight=weight, terms=terms)
        if self.anomaly_map is None:
            return InferenceBatch(pred_score=scores)
        height, width = images.shape[-2:]
        maps = discrepancy_map(source_features, cloner_features, (height, width), value_weight=weight, terms=terms)
        return InferenceBatch(pred_score=scores, anomaly_map=self.anomaly_map_generator(maps))

    def _attribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores, (N,), and what the pixels contribute to them, (N, C, H, W)."""
        if self.anomaly_map != "smooth_grad":
            return self._gradient(images)
        with torch.no_grad():
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
        if torch.compiler.is_exporting():
            with torch.no_grad():
                return self._explicit_gradient(images)
        if self.explicit_backward:
            # Gradients are too small for half precision, as in input_gradient.
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                parts = [self._explicit_gradient(part) for part in torch.split(images, self.chunk_size)]
                scores, gradients = zip(*parts, strict=True)
                return torch.cat(scores), torch.cat(gradients)
        return input_gradient(self._score, images, chunk_size=self.chunk_size)

    def _explicit_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Do as :func:`input_gradient`, with forward operators alone."""
        cloner, cloner_results = self.recorded_cloner.forward(images)
        through_both = self.attribution_path == "both"
        source, source_results = self.recorded_source.forward(images) if through_both else (self.source(images), {})
        source_features, cloner_features = self._scored(source), self._scored(cloner)
        weight, terms = self.known_value_weight, self.terms
        scores = discrepancy(source_features, cloner_features, value_weight=weight, terms=terms)
        at_source, at_cloner = discrepancy_gradient(source_features, cloner_features, value_weight=weight, terms=terms)
        guided = self.anomaly_map == "guided_backprop"
        gradient = self.recorded_cloner.backward(cloner_results, self._unscored(at_cloner), guided=guided)
        if through_both:
            gradient = gradient + self.recorded_source.backward(source_results, self._unscored(at_source))
        return scores, gradient

    def check_explicit_backward(self) -> None:
        """Check that the anomaly map can be computed by forward operators alone.

        Raises:
            ValueError: if the gradient leads through a source that has an operator without a backward rule.
        """
        if self.anomaly_map not in {None, "discrepancy"} and self.attribution_path == "both":
            _ = self.recorded_source

    @cached_property
    def recorded_cloner(self) -> RecordedNetwork:
        """The cloner's operators."""
        return RecordedNetwork(self.cloner)

    @cached_property
    def recorded_source(self) -> RecordedNetwork:
        """The source's operators.

        Raises:
            ValueError: if one of them has no backward rule.
        """
        try:
            return RecordedNetwork(self.source)
        except ValueError as error:
            msg = (
                f"source={self.source.name!r}: {error} Its gradient can be taken by autograd, but not by explicit "
                "operators, as in an exported model. Use attribution_path='cloner' or anomaly_map='discrepancy'."
            )
            raise ValueError(msg) from error

    def _score_features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the activations of source and cloner at the score points."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.attribution_path == "both"):
            source_features = self.source(images)
        if self.anomaly_map == "guided_backprop" and torch.is_grad_enabled():
            cloner_features, _ = self.recorded_cloner.forward(images, rectify=guided_relu)
        else:
            cloner_features = self.cloner(images)
        return self._scored(source_features), self._scored(cloner_features)

    def _scored(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return those of the critical points' activations that make up the score."""
        return list(compress(features, [point in self.score_points for point in self.source.critical_points]))

    def _unscored(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the score points' gradients with ``None`` at the other critical points."""
        scored = iter(gradients)
        return [next(scored) if point in self.score_points else None for point in self.source.critical_points]

    def _score(self, images: Tensor) -> Tensor:
        """Return the discrepancy at the score points, (N,)."""
        return discrepancy(*self._score_features(images), value_weight=self.known_value_weight, terms=self.terms)

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

    def _checked_score_points(self, score_points: Sequence[str] | None) -> tuple[str, ...]:
        trained = self.source.critical_points
        if score_points is None:
            return trained[-NUM_SCORE_POINTS:]
        if not score_points or not set(score_points) <= set(trained):
            msg = f"score_points={list(score_points)!r}: expected some of the critical_points, {', '.join(trained)}."
            raise ValueError(msg)
        if len(set(score_points)) < len(score_points):
            msg = f"score_points={list(score_points)!r}: name each critical point once."
            raise ValueError(msg)
        return tuple(point for point in trained if point in score_points)

    def check_image_size(self, image_size: Sequence[int]) -> None:
        """Check that every level of the source covers the image exactly, and the blur of a map fits into it.

        Raises:
            ValueError: if not.
        """
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
        if self.value_weight is None:
            self.value_weight = state["value_weight"]
        self.source.weights = state["source_weights"]


def checked_images(images: Tensor, source: Source, dtype: torch.dtype) -> Tensor:
    """Return the images as plain tensors of a type, with three channels; grey images are repeated.

    Raises:
        ValueError: if they are not float (N, 3, H, W) or (N, 1, H, W), H and W multiples of the source's stride.
    """
    if images.ndim != 4 or images.shape[1] not in {1, 3} or not images.is_floating_point():
        form = f"{images.dtype} {tuple(images.shape)}"
        msg = f"images: expected float tensors (N, 3, H, W) or (N, 1, H, W), not {form}."
        raise ValueError(msg)
    check_image_size(tuple(images.shape[-2:]), source)
    # anomalib's tv_tensors would wrap every intermediate result; and torch.export cannot follow as_subclass.
    plain = images.as_subclass(Tensor) if isinstance(images, TVTensor) else images
    # Convolutions are faster with the channels last.
    return plain.to(dtype).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def check_image_size(image_size: Sequence[int], source: Source, positions: int = 1) -> None:
    """Check that every level of the source covers the image exactly.

    Args:
        image_size: height and width in pixels.
        source: the network.
        positions: of the last level, per side, that the size in the error has at least.

    Raises:
        ValueError: if height or width is not a positive multiple of the source's stride.
    """
    stride = source.stride
    if any(side < stride or side % stride for side in image_size):
        fitting = tuple(max(round(side / stride), positions) * stride for side in image_size)
        msg = (
            f"image_size={tuple(image_size)}: height and width must be multiples of {stride}, the stride of source "
            f"{source.name!r} at {source.levels[-1].name}; for example {fitting}."
        )
        raise ValueError(msg)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        msg = f"{name}={value!r}: expected one of {', '.join(choices)}."
        raise ValueError(msg)


def _checked_value_weight(value_weight: float | str) -> float | None:
    """Return the weight as a number, or ``None`` while ``auto`` has not found it."""
    if value_weight == "auto":
        return None
    if isinstance(value_weight, str) or not 0 < value_weight < float("inf"):
        msg = f"value_weight={value_weight!r}: expected a number above 0, or 'auto'."
        raise ValueError(msg)
    return float(value_weight)
