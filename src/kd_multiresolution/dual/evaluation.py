"""Scores and map of the dual model without gradients, in few operators.

Value and disagreement are weighted sums over channels of squared differences, so that one convolution with a kernel of
one position adds up all maps of a size; directions follow from the lengths of three vectors. Only sums are resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kd_multiresolution.dual.maps import ChannelError, neighbourhood_mean
from kd_multiresolution.paper.discrepancy import wide
from kd_multiresolution.paper.evaluation import local_directions


class MapWeights(NamedTuple):
    """Kernels that make weighted sums of the maps of some scales of a level, of three or four outputs.

    The first is the anomaly map's sum, the second the score's, the third the map of the positions; the last level has a
    fourth one, the direction of its neighbourhood means.

    Attributes:
        squares: (outputs, scales * 2 * C, 1, 1), of the squared differences of source and local cloner, and of both
            cloners; of the first level C more, of the squared difference from what is normal at a position.
        directions: (outputs, scales, 1, 1).
    """

    squares: Tensor
    directions: Tensor


def map_weights(
    family_weight: Tensor, position_weight: Tensor, value: Sequence[ChannelError], disagreement: Sequence[ChannelError]
) -> list[MapWeights]:
    """Return the kernels: of all levels, then of the coarser scales of all but the last.

    Args:
        family_weight: of each map in the anomaly map and in the score, (2, K).
        position_weight: of the positions in the score, ().
        value: errors of the local cloner, per level but the last.
        disagreement: errors between the cloners, per level.
    """
    family_weight, position_weight = wide([family_weight, position_weight])
    # The score is a sum of two parts, of which a mean is taken.
    family_weight = torch.stack([family_weight[0], 2 * family_weight[1]])
    weights = iter(family_weight.unbind(1))

    def scale(near: ChannelError | None, far: ChannelError) -> tuple[Tensor, Tensor]:
        """Return what squares, (3, 2 * C), and directions, (3, 1), count at the next scale."""
        of_value = far.weights.new_zeros(2, len(far.weights)) if near is None else next(weights)[:, None] * near.weights
        direction = next(weights)
        squares = torch.cat([of_value, next(weights)[:, None] * far.weights], 1)
        return F.pad(squares, (0, 0, 0, 1)), F.pad(direction[:, None], (0, 0, 0, 1))

    levels = [*zip_longest(value, disagreement)]
    *fine, (squares, direction) = [scale(*level) for level in levels]
    # The last level's fourth output is the direction at its second scale, which takes no part in the others.
    squares, direction = F.pad(squares, (0, squares.shape[1], 0, 1)), F.pad(direction, (0, 1, 0, 1))
    direction[-1, -1] = 1
    (squares, direction), *others = [*fine, (squares, direction)]
    of_positions = F.pad(2 * position_weight.expand(1, len(disagreement[0].weights)), (0, 0, 2, len(squares) - 3))
    found = [_kernels(*level) for level in ((torch.cat([squares, of_positions], 1), direction), *others)]
    coarser = (zip(scale(*level), scale(*level), strict=True) for level in levels[:-1])
    return [*found, *(_kernels(*(torch.cat(part, 1) for part in scales)) for scales in coarser)]


def _kernels(squares: Tensor, directions: Tensor) -> MapWeights:
    return MapWeights(squares[:, :, None, None], directions[:, :, None, None])


def weighted_maps(
    features: Sequence[Tensor],
    local: Sequence[Tensor],
    overall: Sequence[Tensor],
    positions: Tensor,
    weights: Sequence[MapWeights],
    coarsenings: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """Return weighted sums of maps, and how far images are as a whole from what the local cloner makes of them.

    Args:
        features: the source's, at all critical points but the first.
        local: what the local cloner predicts of them.
        overall: what the global cloner does.
        positions: difference of the first of these points from what is normal at its positions, (N, C_2, H_2, W_2).
        weights: of :func:`map_weights`.
        coarsenings: of each level but the last, positions per side that make one of the next.

    Returns:
        One (N, 3, H_i, W_i) tensor per size, to be resized and added: the anomaly map's sum, the score's, and the
        positions' map; and (N,), from 0 to 2.
    """
    # A level's differences are summed before the next one's are made: memory beyond what the C library keeps would be
    # mapped and cleared anew for every batch, which takes longer than the sums.
    *of_levels, of_deepest = weights[: len(features)]
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    coarser: list[Tensor] = []
    more: Tensor | None = positions
    *finer, last = zip(features, local, overall, strict=True)
    for level, kernels, coarsening in zip(finer, of_levels, coarsenings, strict=True):
        scale = torch.cat(wide(level), 1)
        coarser.append(F.avg_pool2d(scale, coarsening))
        found.append(_compared(scale, 1, kernels.squares, more))
        more = None
    wholes = (torch.cat(wide(last), 1), *coarser)
    for scale, kernels in zip(wholes, (of_deepest, *weights[len(features) :]), strict=True):
        found.append(_compared(torch.cat([scale, neighbourhood_mean(scale)], 1), 2, kernels.squares, more))
        more = None
    lengths = zip(*(lengths for _, *lengths in found), strict=True)
    directions = local_directions(
        *(torch.cat([scale.flatten(1) for level in part for scale in level.unbind(1)], 1) for part in lengths)
    )
    parts = torch.split(directions, [near.shape[1:].numel() for _, near, *_ in found], 1)
    sums = [
        squares + F.conv2d(part.view(near.shape), kernels.directions)
        for (squares, near, *_), part, kernels in zip(found, parts, weights, strict=True)
    ]
    of_last, whole = torch.split(sums[len(finer)], [3, 1], 1)
    sums[len(finer)] = of_last
    for index in range(len(finer)):
        sums[index + 1] = sums[index + 1] + sums.pop(len(features))
    return sums, whole.mean((1, 2, 3))


def _compared(scales: Tensor, count: int, kernel: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sums of squared differences, and lengths of source's, local cloner's and differences' vectors.

    Args:
        scales: (N, count * 3 * C, H, W), of each scale the source's features and both predictions.
        count: number of scales.
        kernel: of the sums, :attr:`MapWeights.squares`.
        more: other differences, (N, C, H, W), to be squared with these.

    Returns:
        (N, outputs, H, W), and (N, count, H, W) thrice.
    """
    images, channels, height, width = scales.shape
    parts = scales.view(images, count, 3, channels // (3 * count), height, width)
    differences = parts[:, :, :2] - parts[:, :, 1:]
    near, far = torch.linalg.vector_norm(parts[:, :, :2], dim=3).unbind(2)
    apart = torch.linalg.vector_norm(differences[:, :, 0], dim=2)
    differences = differences.flatten(1, 3)
    if more is not None:
        differences = torch.cat([differences, more], 1)
    return F.conv2d(differences.square_(), kernel), near, far, apart
