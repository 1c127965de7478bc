"""The source: a frozen, pre-trained network and its critical points (Sec. 3.1 and 3.2 of arXiv 2011.11108).

All sources but our own light one come from timm: it has VGG-16 and every other convolutional backbone under one
interface, with safetensors weights. VGG-like networks are tapped after their max pools, as in the paper; all others at
timm's feature levels.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from kd_multiresolution.light_vgg import WEIGHTS, load_light_vgg

LIGHT_VGG = "light_vgg"
NUM_CRITICAL_POINTS = 4  # "the four final layers of each convolutional block"


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
        name: ``light_vgg`` or any convolutional model of timm, e.g. ``vgg16.tv_in1k`` or ``resnet18.tv_in1k``.
        pretrained: load the model's pre-trained weights; if false, and no file is given, the weights are random.
        weights: a local weight file (``.safetensors``, or a state dict as ``.pth`` or ``.pt``) instead of a download.
        critical_points: names of the levels to return, in any order; default: the last four.
        seed: seed of random weights.

    Raises:
        ValueError: if the model or a critical point is unknown, a weight file does not fit, or the levels of the model
            cannot be followed by a cloner.
        RuntimeError: if pre-trained weights were asked for and cannot be had.
    """

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
        self.name = name
        self.weights = str(weights) if weights is not None else "pre-trained" if pretrained else "random"
        # Random weights are seeded apart from the global generator, which is left as found.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            names, self.stages = _build(name, critical_points, download=pretrained and weights is None)
        if weights is not None:
            _load_file(self.stages, name, Path(weights))
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


class _PoolStages(nn.Module):
    """A VGG-like network, tapped after each max pool (``pool1``, ``pool2``, ...)."""

    def __init__(self, features: nn.Sequential, pools: int) -> None:
        """Keep what leads to the first ``pools`` max pools, under the original parameter names."""
        super().__init__()
        ends = [i for i, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
        self.features = features[: ends[pools - 1] + 1]

    @property
    def convolutions(self) -> list[int]:
        """Number of convolutions before each pool."""
        counts = [0]
        for module in self.features:
            counts[-1] += isinstance(module, nn.Conv2d)
            if isinstance(module, nn.MaxPool2d):
                counts.append(0)
        return counts[:-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the output of every max pool."""
        outputs = []
        for module in self.features:
            images = module(images)
            if isinstance(module, nn.MaxPool2d):
                outputs.append(images)
        return outputs


class _LevelStages(nn.Module):
    """Any other timm model, tapped at its own feature levels."""

    network: Any  # timm's FeatureGetterNet

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network = network
        # Fig. 2's cloner has two convolutions in its first two blocks and three in the others.
        self.convolutions = [2 if level < 2 else 3 for level in range(levels)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the activations of every level."""
        return list(self.network(images))


def _build(
    name: str, critical_points: Sequence[str] | None, *, download: bool
) -> tuple[list[str], _PoolStages | _LevelStages]:
    """Return the names of the levels up to the last critical point, and the network up to there."""
    if name == LIGHT_VGG:
        light = load_light_vgg(WEIGHTS if download else None)
        names = _pool_names(light.features)
        names = names[: 1 + max(names.index(point) for point in critical_points_of(names, critical_points, name))]
        return names, _PoolStages(light.features, len(names))

    plan = _timm_model(name, device="meta")
    pools = isinstance(plan, timm.models.VGG)
    names = _pool_names(plan.features) if pools else [info["module"] for info in plan.feature_info]
    last = max(names.index(point) for point in critical_points_of(names, critical_points, name))
    # The getter form keeps the parameter names of weight files and drops what lies behind the last level.
    network = _timm_model(
        name,
        features_only=True,
        feature_cls="getter",
        out_indices=[len(plan.feature_info) - 1] if pools else list(range(last + 1)),
        pretrained=download,
    )
    names = names[: last + 1]
    if pools:
        return names, _PoolStages(network.model.features, len(names))
    return names, _LevelStages(network, len(names))


def critical_points_of(levels: Sequence[str], critical_points: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """Return the critical points in the order of the levels; by default the last four.

    Raises:
        ValueError: if there is none, one is not a level of the source, or one is named twice.
    """
    if critical_points is None:
        return tuple(levels[-NUM_CRITICAL_POINTS:])
    unknown = [point for point in critical_points if point not in levels]
    if unknown or not critical_points:
        msg = f"critical_points={list(critical_points)!r}: source {source!r} has the levels {', '.join(levels)}."
        raise ValueError(msg)
    if len(set(critical_points)) < len(critical_points):
        msg = f"critical_points={list(critical_points)!r}: name each level once."
        raise ValueError(msg)
    return tuple(level for level in levels if level in critical_points)


def levels_of_strides(name: str, strides: Sequence[int]) -> tuple[str, ...]:
    """Return the names of a source's levels that have one of the strides, in pixels of the input per position.

    Args:
        name: as :class:`Source`.
        strides: in any order.

    Raises:
        ValueError: if the model is unknown, or has no level of one of the strides.
    """
    if name == LIGHT_VGG:
        with torch.random.fork_rng(devices=[]):
            names = _pool_names(load_light_vgg(None).features)
        reductions = [2 ** (i + 1) for i in range(len(names))]
    else:
        plan = _timm_model(name, device="meta")
        pools = isinstance(plan, timm.models.VGG)
        names = _pool_names(plan.features) if pools else [info["module"] for info in plan.feature_info]
        reductions = [2 ** (i + 1) if pools else plan.feature_info[i]["reduction"] for i in range(len(names))]
    by_stride = dict(zip(reductions, names, strict=True))
    missing = [stride for stride in strides if stride not in by_stride]
    if missing:
        msg = f"source={name!r}: no level of stride {missing[0]}, only of {reductions}. Name critical_points."
        raise ValueError(msg)
    return tuple(by_stride[stride] for stride in sorted(strides))


def _pool_names(features: nn.Sequential) -> list[str]:
    pools = sum(isinstance(module, nn.MaxPool2d) for module in features)
    return [f"pool{i + 1}" for i in range(pools)]


def _timm_model(name: str, *, device: str = "cpu", pretrained: bool = False, **options: Any) -> Any:
    """Create a timm model, with errors that tell a user what to do."""
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.split(".")[0], [LIGHT_VGG, *timm.list_models()], n=3)
        msg = (
            f"source={name!r}: not a model of timm {timm.__version__}. Use {LIGHT_VGG!r} or any convolutional model "
            f"that timm.list_models() names{', for example ' + ' or '.join(similar) if similar else ''}."
        )
        raise ValueError(msg)
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            msg = f"source={name!r}: timm cannot give this model's feature levels ({error}). Choose another model."
            raise ValueError(msg) from error
        msg = (
            f"source={name!r}: its pre-trained weights could not be had ({type(error).__name__}). Three ways out: "
            "(1) run once with access to the Hugging Face hub, or copy a filled cache and point HF_HOME to it; "
            "(2) source_weights=<file>, a .safetensors or .pth file of this model; "
            f"(3) source={LIGHT_VGG!r}, whose weights come with this package, or pretrained=false for a random source."
        )
        raise RuntimeError(msg) from error


def _load_file(stages: _PoolStages | _LevelStages, name: str, path: Path) -> None:
    """Load a local weight file into the network; what the file holds beyond the last critical point is left out."""
    if not path.is_file():
        msg = f"source_weights={str(path)!r}: no such file."
        raise ValueError(msg)
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)  # timm 1.0.15 would run any pickle
    except Exception as error:
        msg = f"source_weights={str(path)!r}: not a readable .safetensors file or .pth state dict ({error})."
        raise ValueError(msg) from error
    network: nn.Module = stages.network.model if isinstance(stages, _LevelStages) else stages
    expected = {key: tensor.shape for key, tensor in network.state_dict().items() if "num_batches_tracked" not in key}
    missing = [key for key in expected if key not in weights]
    misfits = [key for key, shape in expected.items() if key in weights and weights[key].shape != shape]
    if missing or misfits:
        msg = (
            f"source_weights={str(path)!r} does not fit source={name!r}: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(misfits)} have another shape ({', '.join(misfits[:3])}). If the file ends before the last "
            "critical point, choose earlier critical_points."
        )
        raise ValueError(msg)
    network.load_state_dict({key: weights[key] for key in network.state_dict() if key in weights}, strict=False)
