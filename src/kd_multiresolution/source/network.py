"""The source: a frozen, pre-trained network and its critical points (Sec. 3.1 and 3.2 of arXiv 2011.11108).

VGG-like networks are tapped after their max pools, as in the paper; all others at timm's feature levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_multiresolution.source import efficientnet_lite0
from kd_multiresolution.source.stages import LevelStages, build_stages, critical_points_of
from kd_multiresolution.source.weights import are_weights_following, load, read_file


@dataclass(frozen=True)
class Level:
    """One level of the source, as the cloner must reproduce it.

    Attributes:
        name: name of the point, ``pool1`` to ``pool5`` for VGG, timm's module name otherwise.
        channels: number of channels of the activations there.
        stride: pixels of the input per position.
        convolutions: how many convolutions the cloner's block has.
        rectified: whether the activations are never negative.
        critical: whether it is a critical point.
    """

    name: str
    channels: int
    stride: int
    convolutions: int
    rectified: bool
    critical: bool


class Source(nn.Module):
    """A frozen network that returns its activations at the critical points.

    Args:
        name: any convolutional model of timm, e.g. ``vgg16.tv_in1k`` or ``resnet18.tv_in1k``; or
            ``efficientnet_lite0``, timm's ``tf_efficientnet_lite0`` with weights that were installed with this package
            (what timm itself calls so, with other weights and another padding, is ``efficientnet_lite0.ra_in1k`` here).
        pretrained: load the model's pre-trained weights; if false, and no file is given, the weights are random.
        weights: a local weight file (``.safetensors``, or a state dict as ``.pth`` or ``.pt``) instead.
        critical_points: names of the levels to return, in any order; default: the last four.
        seed: seed of random weights.

    Attributes:
        region: which pixels are judged, (1, 1, H, W), bool; ``None``: all. It comes with the checkpoint.

    Raises:
        ValueError: if the model or a critical point is unknown, a weight file does not fit, or the levels of the model
            cannot be followed by a cloner.
        RuntimeError: if pre-trained weights were asked for and cannot be had.
    """

    region: Tensor | None

    def __init__(
        self,
        name: str = "vgg16.tv_in1k",
        *,
        pretrained: bool = True,
        weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if are_weights_following():
            pretrained, weights = False, None
        self.name = name
        self.register_buffer("region", None)
        self.weights = str(weights) if weights is not None else "pre-trained" if pretrained else "random"
        # Random weights are seeded apart from the global generator, which is left as found.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            installed = name == efficientnet_lite0.NAME
            download = pretrained and weights is None and not installed
            names, self.stages = build_stages(name, critical_points, download=download)
        network = self.stages.network.model if isinstance(self.stages, LevelStages) else self.stages
        if weights is not None:
            found = read_file(Path(weights))
            found = efficientnet_lite0.renamed(found) if installed else found
            load(network, found, f"source_weights={str(weights)!r} does not fit source={name!r}")
        elif pretrained and installed:
            load(network, efficientnet_lite0.packaged_weights(), f"{efficientnet_lite0.FILE} does not fit {name}")
        self.critical_points = critical_points_of(names, critical_points, source=name)
        self.requires_grad_(requires_grad=False)
        self.eval()
        self.levels = self._probe(names)

    @property
    def stride(self) -> int:
        """Pixels of the input per position of the last critical point; image sizes must be multiples of it."""
        return self.levels[-1].stride

    def __str__(self) -> str:
        """Return a line for people: which network, with which weights, compared where."""
        return f"{self.name} with weights {self.weights}, critical points {', '.join(self.critical_points)}"

    def train(self, mode: bool = True) -> Source:  # noqa: ARG002 - nn.Module's signature
        """Stay in evaluation mode: the source is frozen."""
        return super().train(mode=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the activations at the critical points.

        Args:
            images: (N, 3, H, W), float, H and W multiples of :attr:`stride`.

        Returns:
            One (N, C_i, H_i, W_i) tensor per critical point, from the finest to the coarsest.
        """
        features = self.stages(images)
        return [feature for level, feature in zip(self.levels, features, strict=True) if level.critical]

    def _probe(self, names: Sequence[str]) -> tuple[Level, ...]:
        """Measure the levels on a small picture of noise instead of trusting declared strides."""
        size = 64
        noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                features = self.stages(noise)
        except Exception as error:  # transformers of timm assert their image size
            msg = (
                f"source={self.name!r}: cannot process a {size} x {size} image ({error}); choose a convolutional model."
            )
            raise ValueError(msg) from error
        levels = []
        previous = 1
        for name, feature, convolutions in zip(names, features, self.stages.convolutions, strict=True):
            height, width = feature.shape[-2:]
            stride = size // height
            if height != width or stride * height != size or stride % previous:
                msg = (
                    f"source={self.name!r}: level {name} of a {size} x {size} image is {height} x {width}. A cloner "
                    "needs levels whose strides divide the image size, each a multiple of the one before; choose "
                    "another model."
                )
                raise ValueError(msg)
            levels.append(
                Level(
                    name,
                    channels=feature.shape[1],
                    stride=stride,
                    convolutions=convolutions,
                    rectified=bool(feature.min() >= 0),
                    critical=name in self.critical_points,
                )
            )
            previous = stride
        return tuple(levels)
