"""The networks that a source can be: VGG-like ones, tapped after their max pools, and all others at timm's levels.

They come from timm: it has VGG-16 and every other convolutional backbone under one interface, with safetensors weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from kd_multiresolution.source import efficientnet_lite0

NUM_CRITICAL_POINTS = 4  # "the four final layers of each convolutional block"
NUM_SCORE_POINTS = 3  # The published code trains on pool2 to pool5, and scores on pool3 to pool5.


class PoolStages(nn.Module):
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


class LevelStages(nn.Module):
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


def build_stages(
    name: str, critical_points: Sequence[str] | None, *, download: bool
) -> tuple[list[str], PoolStages | LevelStages]:
    """Return the names of the levels up to the last critical point, and the network up to there.

    Args:
        name: as :class:`kd_multiresolution.source.network.Source`.
        critical_points: as there.
        download: with timm's trained weights, else with random ones.

    Raises:
        ValueError: if the model or a critical point is unknown, or timm cannot tap the model.
        RuntimeError: if trained weights cannot be had.
    """
    names = [*level_strides(name)]
    last = max(names.index(point) for point in critical_points_of(names, critical_points, name))
    names = names[: last + 1]
    plan = _timm_model(name, device="meta")
    pools = isinstance(plan, timm.models.VGG)
    # The getter form keeps the parameter names of weight files and drops what lies behind the last level.
    network = _timm_model(
        name,
        features_only=True,
        feature_cls="getter",
        out_indices=[len(plan.feature_info) - 1] if pools else list(range(last + 1)),
        pretrained=download,
    )
    return names, PoolStages(network.model.features, len(names)) if pools else LevelStages(network, len(names))


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


def score_points_of(critical_points: Sequence[str], score_points: Sequence[str] | None) -> tuple[str, ...]:
    """Return those critical points that make up the score, in their order; by default the last three.

    Raises:
        ValueError: if there is none, one is not a critical point, or one is named twice.
    """
    if score_points is None:
        return tuple(critical_points[-NUM_SCORE_POINTS:])
    if not score_points or not set(score_points) <= set(critical_points):
        msg = (
            f"score_points={list(score_points)!r}: expected some of the critical_points, {', '.join(critical_points)}."
        )
        raise ValueError(msg)
    if len(set(score_points)) < len(score_points):
        msg = f"score_points={list(score_points)!r}: name each critical point once."
        raise ValueError(msg)
    return tuple(point for point in critical_points if point in score_points)


def levels_of_strides(name: str, strides: Sequence[int]) -> tuple[str, ...]:
    """Return the names of a source's levels that have one of the strides, in pixels of the input per position.

    Args:
        name: as :class:`kd_multiresolution.source.network.Source`.
        strides: in any order.

    Raises:
        ValueError: if the model is unknown, or has no level of one of the strides.
    """
    by_stride = {stride: level for level, stride in level_strides(name).items()}
    missing = [stride for stride in strides if stride not in by_stride]
    if missing:
        msg = f"source={name!r}: no level of stride {missing[0]}, only of {[*by_stride]}. Name critical_points."
        raise ValueError(msg)
    return tuple(by_stride[stride] for stride in sorted(strides))


def level_strides(name: str) -> dict[str, int]:
    """Return the stride of each level of a source by its name, from the finest to the coarsest.

    Raises:
        ValueError: if the model is unknown.
    """
    plan = _timm_model(name, device="meta")  # draws no random numbers
    if isinstance(plan, timm.models.VGG):
        pools = sum(isinstance(module, nn.MaxPool2d) for module in plan.features)
        return {f"pool{i + 1}": 2 ** (i + 1) for i in range(pools)}
    return {info["module"]: info["reduction"] for info in plan.feature_info}


def timm_name_of(name: str) -> str:
    """Return timm's name of a source.

    Raises:
        ValueError: if timm does not have it.
    """
    if name == efficientnet_lite0.NAME:
        return efficientnet_lite0.ARCHITECTURE
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        msg = (
            f"source={name!r}: not a model of timm {timm.__version__}. Use {efficientnet_lite0.NAME!r}, whose weights "
            "were installed with this package, or any convolutional model that timm.list_models() names"
            f"{', for example ' + ' or '.join(similar) if similar else ''}."
        )
        raise ValueError(msg)
    return name


def _timm_model(name: str, *, device: str = "cpu", pretrained: bool = False, **options: Any) -> Any:
    """Create a timm model, with errors that tell a user what to do."""
    timm_name = timm_name_of(name)
    try:
        with torch.device(device):
            return timm.create_model(timm_name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            msg = f"source={name!r}: timm cannot give this model's feature levels ({error}). Choose another model."
            raise ValueError(msg) from error
        msg = (
            f"source={name!r}: its pre-trained weights could not be had ({type(error).__name__}). Three ways out: "
            "(1) run once with access to the Hugging Face hub, or copy a filled cache and point HF_HOME to it; "
            "(2) source_weights=<file>, a .safetensors or .pth file of this model; "
            f"(3) source={efficientnet_lite0.NAME!r}, whose weights were installed with this package, or "
            "pretrained=false for a random source."
        )
        raise RuntimeError(msg) from error
