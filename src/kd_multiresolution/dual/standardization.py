"""Features in units of their deviation on normal images, so that each channel of a level counts alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from kd_multiresolution.source.channel_moments import ChannelMoments, Reduce, without_dead_channels
from kd_multiresolution.source.derived import Derived


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
        # No channel is divided by what half precision would round to nothing.
        self.deviation.copy_(without_dead_channels(deviation).clamp_min(torch.finfo(self.deviation.dtype).eps))


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


def standardize(levels: Iterable[Standardization], moments: ChannelMoments, reduce: Reduce) -> None:
    """Set the units of each level from the sums over all processes."""
    for units, (mean, mean_square) in zip(levels, moments.of_levels(reduce), strict=True):
        units.set(mean, mean_square)
