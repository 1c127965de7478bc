"""Features in units of their deviation on normal images, so that each channel of a level counts alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from kd_multiresolution.source.derived import Derived

SMALLEST_DEVIATION = 0.01  # of a channel, as a fraction of its level's mean; a dead channel must not be blown up

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the host where its device has no such numbers: long sums keep their digits."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):  # Apple's and some of Intel's
        return tensor.cpu().double()


class Standardization(nn.Module):
    """Mean and deviation of each channel of one level over the normal images; 0 and 1 before they are known.

    Args:
        channels: number of channels, C.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def set(self, mean: Tensor, mean_square: Tensor) -> None:
        """Set the statistics from the first two moments, (C,) each."""
        deviation = (mean_square - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        smallest = (SMALLEST_DEVIATION * deviation.mean()).clamp_min(torch.finfo(torch.float32).eps)
        self.deviation.copy_(deviation.clamp_min(smallest))


class LevelConv(nn.Conv2d):
    """A 1x1 convolution from, or to, a level in the source's own units that learns as if the level were standardised.

    The standardisation is folded into the weights: no pass over the features is spent on it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        self._folded: Derived[tuple[Tensor, Tensor]] = Derived()

    def from_level(self, features: Tensor, level: Standardization) -> Tensor:
        """Return the convolution of (features - mean) / deviation."""
        return F.conv2d(features, *self._weights(level, self._from_level))

    def to_level(self, trunk: Tensor, level: Standardization) -> Tensor:
        """Return mean + deviation * convolution."""
        return F.conv2d(trunk, *self._weights(level, self._to_level))

    def _weights(
        self, level: Standardization, fold: Callable[[Standardization], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return fold(level)
        return self._folded.get([self.weight, self._offset, level.mean, level.deviation], lambda: fold(level))

    def _from_level(self, level: Standardization) -> tuple[Tensor, Tensor]:
        weight = self.weight / level.deviation[None, :, None, None]
        return weight, self._offset - weight.flatten(1) @ level.mean

    def _to_level(self, level: Standardization) -> tuple[Tensor, Tensor]:
        return self.weight * level.deviation[:, None, None, None], self._offset * level.deviation + level.mean

    @property
    def _offset(self) -> Tensor:
        assert self.bias is not None
        return self.bias


class ChannelMoments:
    """Sums over images and positions of each channel of each critical point, for mean and deviation."""

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

    def standardize(self, levels: Iterable[Standardization], reduce: Reduce) -> None:
        """Set the units of each level from the sums over all processes."""
        for units, sums in zip(levels, self.sums, strict=True):
            count, total, squares = reduce(sums)
            units.set(total / count, squares / count)
