"""The source's features in units of each channel, for sources whose levels have other scales than VGG-16's.

Not in the paper, whose source needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kd_multiresolution.source.channel_moments import without_dead_channels


class ChannelScale(nn.Module):
    """Divides each channel of each critical point by its root mean square on normal images, which is 1 until measured.

    The cloner imitates what comes out, so that each channel counts alike in loss, score and gradient.

    Args:
        channels: number of channels of each critical point, C_i.
    """

    is_measured: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self._names = [f"factor{index}" for index in range(len(channels))]
        for name, count in zip(self._names, channels, strict=True):
            self.register_buffer(name, torch.ones(1, count, 1, 1))
        self.register_buffer("is_measured", torch.tensor(False))

    @property
    def factors(self) -> list[Tensor]:
        """What each critical point is multiplied by, (1, C_i, 1, 1) each."""
        return [self.get_buffer(name) for name in self._names]

    def measure(self, mean_squares: Iterable[Tensor]) -> None:
        """Set the units from the mean square of each channel of each critical point, (C_i,) each."""
        for factor, mean_square in zip(self.factors, mean_squares, strict=True):
            factor.copy_(without_dead_channels(mean_square.sqrt()).reciprocal().view_as(factor))
        self.is_measured.fill_(True)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return features in these units, one (N, C_i, H_i, W_i) tensor per critical point."""
        return [level * factor for level, factor in zip(features, self.factors, strict=True)]

    def pulled_back(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients at the features from those at the result; ``None`` where there is none."""
        pairs = zip(gradients, self.factors, strict=True)
        return [None if gradient is None else gradient * factor for gradient, factor in pairs]
