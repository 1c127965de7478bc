"""What is normal at each position of a level, for parts that lie alike in every image.

The cloners tell what belongs beside what, wherever it is; this tells what belongs here. It is PaDiM's question (arXiv
2011.08785), answered with variances alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_multiresolution.dual.cloners import resized
from kd_multiresolution.paper.discrepancy import wide
from kd_multiresolution.source.channel_moments import Reduce, exact, without_dead_channels

SHARE = 0.03  # of a channel's variance over all positions, which is added to that of each


class PositionMoments:
    """Sums over images of each channel at each position of a level."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Add the features of some images, (N, C, H, W); those of another size than the first are resized."""
        level = exact(features)
        if self.sums is None:
            self.sums = level.new_zeros(3, *level.shape[1:])
        if level.shape[1:] != self.sums.shape[1:]:
            level = resized(level, self.sums.shape[-2:])
        self.sums += torch.stack([torch.full_like(self.sums[0], len(level)), level.sum(0), level.square().sum(0)])


class PositionError(nn.Module):
    """Squared difference from the mean of normal images at the same position, in units of its variance there.

    0 until it is known what is normal. Images of another size are compared with statistics that are resized.

    Args:
        channels: number of channels, C.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.zeros(1, channels, 1, 1))
        self.register_buffer("offset", torch.zeros(1, channels, 1, 1))

    def _make_room(self, size: tuple[int, ...]) -> None:
        """Make room for statistics of as many positions, height and width."""
        shape = (*self.factor.shape[:2], *size)
        if self.factor.shape != shape:
            self.factor, self.offset = (_laid_out(self.factor.new_zeros(shape)) for _ in range(2))

    def set(self, moments: PositionMoments, reduce: Reduce) -> None:
        """Set what is normal from the sums over all processes."""
        assert moments.sums is not None
        count, total, squares = reduce(moments.sums)
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        of_channels = (squares / count).mean((1, 2)) - mean.mean((1, 2)).square()
        deviation = without_dead_channels(of_channels.clamp_min(0).sqrt())[:, None, None]
        factor = (len(mean) * (variance + SHARE * deviation.square())).rsqrt()
        # Of images that hardly vary both must still be numbers of the model's type.
        factor = factor.clamp_max(torch.finfo(self.factor.dtype).max / mean.abs().clamp_min(1))
        self._make_room(mean.shape[-2:])
        self.factor.copy_(factor)
        self.offset.copy_(-mean * factor)

    def difference(self, features: Tensor) -> Tensor:
        """Return the difference of each channel, (N, C, H, W), whose squares :meth:`forward` adds up."""
        factor, offset = wide([self.factor, self.offset])
        if factor.shape[-2:] not in {(1, 1), features.shape[-2:]}:
            factor, offset = (resized(part, features.shape[-2:]) for part in (factor, offset))
        return torch.addcmul(offset, features, factor)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean over channels: (N, C, H, W) to (N, 1, H, W), >= 0."""
        return self.difference(features).square().sum(1, keepdim=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        factor = state_dict.get(f"{prefix}factor")
        if factor is not None and factor.ndim == 4 and factor.shape[:2] == self.factor.shape[:2]:
            # Of the size of the images it was trained on.
            self._make_room(factor.shape[-2:])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _laid_out(level: Tensor) -> Tensor:
    """Return a tensor in the order of the features that it is compared with."""
    return level.contiguous(memory_format=torch.channels_last)
