"""Score and discrepancy map without gradients, in few operators: both told from three norms per critical point.

Of two vectors s and c with lengths |s| and |c|, one minus the cosine is (|s - c|² - (|s| - |c|)²) / (2 |s| |c|), which
keeps the digits of small angles. Lengths are in float64, or it would lose digits where one is many times the other. The
values are those of ``discrepancy`` and ``anomaly_map``, but for the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kd_multiresolution.paper.discrepancy import checked_features, normalize_terms

HAVE_FLOAT64 = ("cpu", "cuda")  # types of devices for which this is
TINY = 1e-30  # of a product of two lengths; one of them is zero


def fast_scores(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    *,
    value_weight: float,
    terms: str | Sequence[str],
) -> Tensor:
    """Return the discrepancy of each image, (N,), as :func:`kd_multiresolution.paper.discrepancy.discrepancy`."""
    source, cloner = checked_features(source_features, cloner_features)
    levels = [*source, *cloner, *torch._foreach_sub(source, cloner)]
    images = [image for level in levels for image in level.unbind()]
    if not images:
        return source[0].new_zeros(0)
    lengths = torch.stack(torch._foreach_norm(images, dtype=torch.float64))
    lengths = lengths.view(3, len(source), -1).movedim(2, 0)  # (N, 3, levels)
    return _discrepancies(lengths, value_weight, normalize_terms(terms), [], _whole(source)).sum(
        1, dtype=source[0].dtype
    )


def fast_scores_and_maps(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    value_weight: float,
    terms: str | Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Return the discrepancy of each image, (N,), and of each of its positions, (N, 1, H, W).

    As :func:`kd_multiresolution.paper.anomaly_map.discrepancy_map`, and ``discrepancy``.
    """
    names = normalize_terms(terms)
    source, cloner = checked_features(source_features, cloner_features)
    levels = [*source, *cloner, *torch._foreach_sub(source, cloner)]
    positions = [level.shape[2:].numel() for level in source]
    local = torch.cat([torch.linalg.vector_norm(level, dim=1, dtype=torch.float64).flatten(1) for level in levels], 1)
    local = local.view(len(local), 3, sum(positions))  # (N, 3, positions of all levels)
    parts = torch.split(local, positions, 2)
    lengths = torch.cat([local, *(torch.linalg.vector_norm(part, dim=2, keepdim=True) for part in parts)], 2)
    channels = [(level.shape[1], count) for level, count in zip(source, positions, strict=True)]
    found = _discrepancies(lengths, value_weight, names, channels, _whole(source))
    *maps, of_levels = torch.split(found[:, None].to(source[0].dtype), [*positions, len(source)], 2)
    upsampled = [
        F.interpolate(part.view(-1, 1, *level.shape[2:]), image_size, mode="bilinear", align_corners=False)
        for part, level in zip(maps, source, strict=True)
    ]
    return of_levels.sum((1, 2)), reduce(torch.Tensor.add_, upsampled)


def local_directions(near: Tensor, far: Tensor, apart: Tensor) -> Tensor:
    """Return one minus the cosine of vectors, as ``local_direction``, from their lengths and those of differences."""
    longer = near - far
    twice = 2 * near * far
    directions = (apart.square() - longer.square()).div_(twice)
    return torch.where(twice <= TINY, 0.5 * (apart > 0), directions).clamp_min_(0)


def _whole(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[1:].numel(), 1) for level in levels]


def _discrepancies(
    lengths: Tensor,
    value_weight: float,
    names: Sequence[str],
    positions: Sequence[tuple[int, int]],
    levels: Sequence[tuple[int, int]],
) -> Tensor:
    """Return discrepancies of pairs of vectors, (N, P).

    Args:
        lengths: of the source's, of the cloner's, and of their differences, (N, 3, P).
        value_weight: as for the discrepancy.
        names: of the terms.
        positions: how many numbers those vectors have that are single positions, and how many vectors have as many. One
            without a length is at 1/2 from every other, and at 0 from another one.
        levels: likewise of those behind them, which are whole levels. There it is at 1, as torch's cosine has it.
    """
    near, far, apart = lengths.unbind(1)
    squares = apart.square()
    weight = value_weight if "direction" in names else 1.0
    factors = _constant(
        tuple((weight / size, count) for size, count in (*positions, *levels)), apart.dtype, apart.device
    )
    if "direction" not in names:
        return squares * factors
    longer = near - far
    twice = 2 * near * far
    directions = (squares - longer.square()).div_(twice)
    if positions:
        counts = [sum(count for _, count in part) for part in (positions, levels)]
        one, both = (
            _constant(((number, counts[0]), (1.0, counts[1])), apart.dtype, apart.device) for number in (0.5, 0.0)
        )
        directions = torch.where(twice <= TINY, torch.where(apart == 0, both, one), directions)
    else:
        directions.masked_fill_(twice <= TINY, 1)
    directions.clamp_min_(0)
    return directions.addcmul_(squares, factors) if "value" in names else directions


@lru_cache(maxsize=64)
def _constant(runs: tuple[tuple[float, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, each as often as counted."""
    with torch.inference_mode(False):
        numbers = [number for number, count in runs for _ in range(count)]
        return torch.tensor(numbers, dtype=dtype, device=device)
