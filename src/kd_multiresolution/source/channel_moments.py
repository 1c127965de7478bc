"""Mean and mean square of each channel of the source over the normal images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_DEVIATION = 0.01  # of a channel, as a fraction of its level's mean; a dead channel must not be blown up

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the host where its device has no such numbers: long sums keep their digits."""
    try:
        return tensor.double()
    except torch.OutOfMemoryError:  # which is a RuntimeError
        raise
    except (TypeError, RuntimeError):  # Apple's and some of Intel's
        return tensor.cpu().double()


def without_dead_channels(deviation: Tensor) -> Tensor:
    """Return what channels are divided by, (C,), none of it far below the others."""
    smallest = (SMALLEST_DEVIATION * deviation.mean()).clamp_min(torch.finfo(torch.float32).eps)
    return deviation.clamp_min(smallest)


class ChannelMoments:
    """Sums over images and positions of each channel of each critical point."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, features: Sequence[Tensor]) -> None:
        """Add the features of some images, one (N, C_i, H_i, W_i) tensor per critical point."""
        sums = []
        for level in features:
            wide = exact(level)
            count = wide.new_full((level.shape[1],), level.numel() / level.shape[1])
            sums.append(torch.stack([count, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def of_levels(self, reduce: Reduce) -> list[tuple[Tensor, Tensor]]:
        """Return mean and mean square of each critical point, (C_i,) each, from the sums over all processes."""
        moments = []
        for sums in self.sums:
            count, total, squares = reduce(sums)
            moments.append((total / count, squares / count))
        return moments
