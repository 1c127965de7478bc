"""Scores and map of the dual model without gradients, in few operators.

All families of maps are sums of squares over channels: of the difference of source and local cloner, of that of the two
cloners, and, one minus a cosine being half the squared distance of unit vectors, of that of the unit vectors. So one
convolution with a kernel of one position makes their weighted sum, and only sums are resized.
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

EPS = 1e-8  # as local_direction: a shorter vector has no direction


class MapWeights(NamedTuple):
    """Kernels that make weighted sums of maps, from what :func:`_squares` returns.

    Two channels come out, the whole sum and that without the coarser scales; of the last level a third one, the
    direction of neighbourhood means.
    """

    fine: list[Tensor]
    coarse: list[Tensor]
    last: Tensor


def map_weights(
    family_weight: Tensor, value: Sequence[ChannelError], disagreement: Sequence[ChannelError]
) -> MapWeights:
    """Return the kernels.

    Args:
        family_weight: of each map, (K,).
        value: errors of the local cloner, per level but the last.
        disagreement: errors between the cloners, per level.
    """
    weights = iter(family_weight.unbind())

    def kernel(near: ChannelError | None, far: ChannelError) -> Tensor:
        """Return a row of weights of squares: of value, disagreement and direction."""
        of_value = torch.zeros_like(far.root_mean_square) if near is None else next(weights) * near.weights
        of_direction = next(weights).expand_as(of_value) / 2
        return torch.stack([of_value, next(weights) * far.weights, of_direction])  # (3, C)

    levels = [*zip_longest(value, disagreement)]
    *fine, last = [kernel(*level) for level in levels]
    coarse = [torch.stack([kernel(*level), kernel(*level)]) for level in levels[:-1]]
    nothing = torch.zeros_like(last)
    mean_direction = torch.stack([nothing[0], nothing[0], torch.full_like(nothing[0], 0.5)])
    return MapWeights(
        [_as_kernel(torch.stack([level, level])[:, None]) for level in fine],
        [_as_kernel(torch.stack([level, torch.zeros_like(level)])) for level in coarse],
        _as_kernel(torch.stack([torch.stack(pair) for pair in (
            (last, nothing), (last, nothing), (nothing, mean_direction))])),
    )  # fmt: skip


def _as_kernel(rows: Tensor) -> Tensor:
    """Return (outputs, scales, 3, C) weights as a kernel for the order of :func:`_squares`."""
    differences, directions = rows[:, :, :2].flatten(1), rows[:, :, 2].flatten(1)
    return torch.cat([differences, directions], 1)[:, :, None, None]


def _squares(scales: Tensor, count: int) -> Tensor:
    """Return squares of differences: of source and local cloner, of both cloners, of the first two's unit vectors.

    Args:
        scales: (N, count * 3 * C, H, W), of each scale the source's features and both predictions.
        count: number of scales.

    Returns:
        (N, count * 3 * C, H, W), the differences of unit vectors behind all others.
    """
    images, channels, height, width = scales.shape
    parts = scales.view(images, count, 3, channels // (3 * count), height, width)
    differences = parts[:, :, :2] - parts[:, :, 1:]
    directed = parts[:, :, :2]
    units = directed / torch.linalg.vector_norm(directed, dim=3, keepdim=True).clamp_min_(EPS)
    of_units = units[:, :, 0] - units[:, :, 1]
    return torch.cat([differences.flatten(1, 3), of_units.flatten(1, 2)], 1).square_()


def weighted_maps(
    features: Sequence[Tensor],
    local: Sequence[Tensor],
    overall: Sequence[Tensor],
    weights: MapWeights,
    coarsenings: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """Return weighted sums of maps, and how far images are as a whole from what the local cloner makes of them.

    Args:
        features: the source's, at all critical points but the first.
        local: what the local cloner predicts of them.
        overall: what the global cloner does.
        weights: of :func:`map_weights`.
        coarsenings: of each level but the last, positions per side that make one of the next.

    Returns:
        One (N, 2, H_i, W_i) tensor per size, to be resized and added: the sum of all maps, and of those without coarser
        scales; and (N,), from 0 to 2.
    """
    levels = [torch.cat(wide(level), 1) for level in zip(features, local, overall, strict=True)]
    *finer, last = levels
    sums = [F.conv2d(_squares(level, 1), kernel) for level, kernel in zip(finer, weights.fine, strict=True)]
    coarsest = torch.cat([last, neighbourhood_mean(last)], 1)
    of_last, whole = torch.split(F.conv2d(_squares(coarsest, 2), weights.last), [2, 1], 1)
    sums.append(of_last)
    for index, (level, coarsening, kernel) in enumerate(zip(finer, coarsenings, weights.coarse, strict=True), start=1):
        coarse = F.avg_pool2d(level, coarsening)
        both = torch.cat([coarse, neighbourhood_mean(coarse)], 1)
        sums[index] = sums[index] + F.conv2d(_squares(both, 2), kernel)
    return sums, whole.mean((1, 2, 3))
