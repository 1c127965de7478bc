"""The torch model: a local and a global cloner of one source, and the map of where the three disagree.

Not the paper's (arXiv 2011.11108): it keeps the frozen source, its critical points, and the discrepancy's two terms.
The second cloner and its disagreement with the first follow EfficientAD (arXiv 2303.14535). See ``docs/method.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from kd_multiresolution.dual.cloners import GlobalCloner, LocalCloner, resized
from kd_multiresolution.dual.evaluation import MapWeights, map_weights, weighted_maps
from kd_multiresolution.dual.maps import (
    COARSER_SCALES,
    FAMILIES,
    ChannelError,
    coarser_scales,
    families_of,
    highest,
    neighbourhood_mean,
    top_mean,
)
from kd_multiresolution.dual.position import PositionError
from kd_multiresolution.dual.standardization import Standardization
from kd_multiresolution.paper.anomaly_map import AnomalyMapGenerator, check_sigma
from kd_multiresolution.paper.discrepancy import local_direction, wide
from kd_multiresolution.plugin.arguments import check_types
from kd_multiresolution.source.derived import Derived
from kd_multiresolution.source.folding import Folding
from kd_multiresolution.source.images import check_image_size, checked_images
from kd_multiresolution.source.network import Source
from kd_multiresolution.source.region import within
from kd_multiresolution.source.stages import levels_of_strides

SMALLEST_SIDE = 2  # positions at the last critical point; the global cloner starts from half as many
STRIDES = (4, 8, 16)  # of the levels compared by default; ResNet's layer1 to layer3


class KdMultiresolutionDualModel(nn.Module):
    """Source, local and global cloner, and the map of their disagreements.

    In training mode it returns the source's activations and both predictions of them, in evaluation mode anomalib's
    ``InferenceBatch``. Every critical point but the first is read in the three families of maps of
    :mod:`kd_multiresolution.dual.maps`; of the last one not the value, without which images are ranked better.

    All of these critical points but the last are read at two coarser scales as well: averaged to the positions of the
    next one, and over 3 x 3 of those. The anomaly map is a weighted sum of all. Images are judged by their *defects*,
    the mean of the highest hundredth of a sum with weights of its own; or as a *whole*, by the direction at the last
    critical point, averaged over the image: where whole images differ more than a defect could make them, as in one
    class against others. The score by defects has a second part, the highest hundredth of how unusual the first
    predicted critical point is for its positions (:mod:`kd_multiresolution.dual.position`).

    What "normal" means, what each family counts, and how images are judged, is set by
    :mod:`kd_multiresolution.dual.calibration`; all of it is kept in the state dict.

    Args:
        source: any convolutional model of timm, or ``efficientnet_lite0``.
        pretrained: use the source's pre-trained weights; if false, and no file is given, they are random.
        source_weights: a local weight file of the source (``.safetensors`` or ``.pth``) instead of a download.
        critical_points: at least two; the cloners start from the first and the last, and predict all but the first.
            Default: the source's levels of strides 4, 8 and 16.
        sigma: standard deviation of the map's Gaussian blur in pixels.
        seed: seed of the cloners' initial weights, and of a random source.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range.
        RuntimeError: if the source's pre-trained weights cannot be had.
    """

    family_weight: Tensor
    position_weight: Tensor
    judged_as_whole: Tensor

    def __init__(
        self,
        source: str = "resnet18.tv_in1k",
        *,
        pretrained: bool = True,
        source_weights: str | Path | None = None,
        critical_points: Sequence[str] | None = None,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_types(KdMultiresolutionDualModel.__init__, locals())
        check_sigma(sigma)
        points = levels_of_strides(source, STRIDES) if critical_points is None else critical_points
        self.source = Source(source, pretrained=pretrained, weights=source_weights, critical_points=points, seed=seed)
        levels = [level for level in self.source.levels if level.critical]
        if len(levels) < 2:
            msg = f"critical_points={list(points)!r}: the cloners predict all but the first; expected two or more."
            raise ValueError(msg)
        self.units = nn.ModuleList(Standardization(level.channels) for level in levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.local_cloner = LocalCloner(levels)
            self.global_cloner = GlobalCloner(levels)
        self.value = nn.ModuleList(ChannelError(level.channels) for level in levels[1:-1])
        self.disagreement = nn.ModuleList(ChannelError(level.channels) for level in levels[1:])
        # Of each predicted level but the last: how many positions per side make one of the next level.
        self.coarsenings = [after.stride // level.stride for level, after in pairwise(levels[1:])]
        self.maps = [*FAMILIES * len(self.coarsenings), *FAMILIES[1:]]
        self.fine = len(self.maps)  # the coarser scales' maps come after these
        self.maps += FAMILIES * COARSER_SCALES * len(self.coarsenings)
        self.register_buffer("family_weight", torch.ones(2, len(self.maps)))  # in the anomaly map, and in the score
        self.position = PositionError(levels[1].channels)
        self.register_buffer("position_weight", torch.tensor(0.0))  # in the score
        self.register_buffer("judged_as_whole", torch.tensor(False))
        # The map is blurred where it is computed, in positions of the first level: a sixteenth of the pixels.
        self.anomaly_map_generator = AnomalyMapGenerator(sigma, opening=False, stride=levels[0].stride)
        self._folded_source = Folding()
        self._map_weights: Derived[list[MapWeights]] = Derived()
        self.to(memory_format=torch.channels_last)

    @property
    def levels_units(self) -> list[Standardization]:
        """The standardisation of each critical point."""
        return cast("list[Standardization]", [*self.units])

    def predictions(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the local and the global cloner predict, both for all critical points but the first.

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
        """
        return self.local_cloner(features, self.levels_units), self.global_cloner(features, self.levels_units)

    def families(self, features: Sequence[Tensor], local: Sequence[Tensor], overall: Sequence[Tensor]) -> Tensor:
        """Return all maps at the first critical point's size, in the order of ``maps``.

        Position by position, level by level; then at the coarser scales, where what a cloner fails to predict of a
        normal image averages out, but not what a larger defect changes.

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
            local: what the local cloner predicts of all but the first.
            overall: what the global cloner does.

        Returns:
            (N, K, H_1, W_1), >= 0, K being the number of maps.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            maps = self._families(*(wide(part) for part in (features[1:], local, overall)))
            return torch.cat([resized(level, features[0].shape[-2:]) for level in maps], 1)

    def _families(self, features: Sequence[Tensor], local: Sequence[Tensor], overall: Sequence[Tensor]) -> list[Tensor]:
        *finer, last = zip(features, local, overall, strict=True)
        readings = [*zip(self.value, self.disagreement[:-1], strict=True)]
        maps = [families_of(level, *reading) for level, reading in zip(finer, readings, strict=True)]
        source, near, far = last
        maps.append(torch.cat((local_direction(source, near), self.disagreement[-1](near - far)), 1))
        for level, reading, coarsening in zip(finer, readings, self.coarsenings, strict=True):
            maps += [families_of(scale, *reading) for scale in coarser_scales(level, coarsening)]
        return maps

    def blurred(self, families: Tensor) -> Tensor:
        """Return each map of (N, K, H, W) blurred on its own."""
        blurred: Tensor = self.anomaly_map_generator(families.flatten(0, 1)[:, None])
        return blurred.view_as(families)

    def fused(self, families: Tensor) -> Tensor:
        """Return the anomaly map at the maps' size, their blurred sum: (N, K, H, W) to (N, 1, H, W), >= 0."""
        return self._summed(families, self.family_weight[0])

    def _summed(self, families: Tensor, weight: Tensor) -> Tensor:
        summed: Tensor = self.anomaly_map_generator(families * weight[:, None, None])
        return summed

    def positions(self, features: Sequence[Tensor]) -> Tensor:
        """Return how unusual the first predicted critical point is for its positions, (N, 1, H_1, W_1).

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return resized(self.position(*wide(features[1:2])), features[0].shape[-2:])

    def of_defects(self, families: Tensor, positions: Tensor) -> Tensor:
        """Return the scores of images that are judged by their defects, (N,).

        The mean of the highest hundredth of the maps' sum for images, and that of the positions' map, both blurred.

        Args:
            families: those of :meth:`families`.
            positions: those of :meth:`positions`.
        """
        of_maps, of_positions = self.tops(families, positions)
        return of_maps + self.position_weight * of_positions

    def tops(self, families: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return both parts of :meth:`of_defects`, (N,) each, the second without its weight."""
        of_maps = self._summed(families, self.family_weight[1])
        return top_mean(of_maps)[:, 0], top_mean(self.anomaly_map_generator(positions))[:, 0]

    def as_a_whole(self, features: Sequence[Tensor], local: Sequence[Tensor]) -> Tensor:
        """Return how far images are as a whole from what the local cloner makes of them: (N,), from 0 to 2.

        The direction at the last critical point, of features averaged over 3 x 3 positions, on average over the image.

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
            local: what the local cloner predicts of all but the first.
        """
        with torch.autocast(features[-1].device.type, enabled=False):
            source, near = (neighbourhood_mean(level) for level in wide((features[-1], local[-1])))
            return local_direction(source, near).mean((1, 2, 3))

    def read(self, families: Tensor, positions: Tensor, whole: Tensor, image_size: tuple[int, int]) -> InferenceBatch:
        """Return scores and maps as :meth:`forward`.

        Args:
            families: those of :meth:`families`.
            positions: those of :meth:`positions`.
            whole: the scores of :meth:`as_a_whole`.
            image_size: of the map, height and width in pixels.
        """
        scores = torch.where(self.judged_as_whole, whole, self.of_defects(families, positions))
        maps = within(resized(self.fused(families), image_size), self.source.region)
        return InferenceBatch(pred_score=scores, anomaly_map=maps)

    def forward(self, images: Tensor) -> InferenceBatch | tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the activations in training mode, scores and maps in evaluation mode.

        Args:
            images: (N, 3, H, W) or (N, 1, H, W), float, H and W multiples of the source's stride.

        Returns:
            In training mode the source's activations at all critical points but the first, the local and the global
            cloner's; in evaluation mode an ``InferenceBatch``: ``anomaly_map`` (N, 1, H, W), >= 0, and ``pred_score``
            (N,), unbounded, :meth:`of_defects` or :meth:`as_a_whole`.

        Raises:
            ValueError: if the images have another shape.
        """
        images = self.checked_images(images)
        if self.training:
            with torch.no_grad():
                features = self.source(images)
            return features[1:], *self.predictions(features)
        with torch.no_grad():
            features = self._folded_source.of(self.source)(images)
            return self._evaluated(features, *self.predictions(features), images.shape[-2:])

    def _evaluated(
        self,
        features: Sequence[Tensor],
        local: Sequence[Tensor],
        overall: Sequence[Tensor],
        image_size: tuple[int, ...],
    ) -> InferenceBatch:
        """Return what :meth:`read` does, in fewer operators."""
        value, disagreement = (cast("list[ChannelError]", [*part]) for part in (self.value, self.disagreement))
        errors = [error.root_mean_square for error in (*value, *disagreement)]
        with torch.autocast(features[0].device.type, enabled=False):
            weights = self._map_weights.get(
                [self.family_weight, self.position_weight, *errors],
                lambda: map_weights(self.family_weight, self.position_weight, value, disagreement),
            )
            positions = self.position.difference(*wide(features[1:2]))
            sums, whole = weighted_maps(features[1:], local, overall, positions, weights, self.coarsenings)
            maps = reduce(torch.add, (resized(level, features[0].shape[-2:]) for level in sums))
            whole_map, of_defects = torch.split(self.anomaly_map_generator.blurred(maps), [1, 2], 1)
            scores = torch.where(self.judged_as_whole, whole, highest(of_defects).mean((1, 2)))
            maps = within(resized(whole_map, image_size), self.source.region)
            return InferenceBatch(pred_score=scores, anomaly_map=maps)

    def check_image_size(self, image_size: Sequence[int]) -> None:
        """Check that every level of the source covers the image exactly, and cloner and blur fit into it.

        Raises:
            ValueError: if not.
        """
        check_dual_image_size(image_size, self.source)
        self.anomaly_map_generator.check_image_size(image_size)

    def checked_images(self, images: Tensor) -> Tensor:
        """Return the images as plain tensors with three channels; grey images are repeated.

        Raises:
            ValueError: if they have another shape than :meth:`forward` takes.
        """
        images = checked_images(images, self.source, self.family_weight.dtype)
        self.check_image_size(images.shape[-2:])
        return images

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours = {"position_weight": self.position_weight}
        ours |= {f"position.{name}": part for name, part in self.position.named_buffers()}
        if f"{prefix}family_weight" in state_dict and not any(f"{prefix}{name}" in state_dict for name in ours):
            # Trained before there was a map of the positions, and goes without it.
            state_dict.update({f"{prefix}{name}": torch.zeros_like(part) for name, part in ours.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the weights: where the source's come from."""
        return {"source_weights": self.source.weights}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`."""
        self.source.weights = state["source_weights"]


def check_dual_image_size(image_size: Sequence[int], source: Source) -> None:
    """Check that every level of the source covers the image exactly, and the global cloner fits into it.

    Raises:
        ValueError: if not.
    """
    check_image_size(image_size, source, SMALLEST_SIDE)
    least = SMALLEST_SIDE * source.stride
    if min(image_size) < least:
        msg = f"image_size={tuple(image_size)}: KdMultiresolutionDual needs images of at least {least} pixels."
        raise ValueError(msg)
