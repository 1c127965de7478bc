"""Three families of maps of where source, local and global cloner disagree.

- *value*: squared difference of source and local cloner, each channel by its mean on normal images;
- *direction*: one minus the cosine of source and local cloner, position by position;
- *disagreement*: squared difference of the two cloners, each channel by its mean on normal images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from kd_multiresolution.paper.discrepancy import local_direction, wide
from kd_multiresolution.source.channel_moments import SMALLEST_DEVIATION

FAMILIES = ("value", "direction", "disagreement")
COARSER_SCALES = 2  # at which all critical points but the last are read as well
TOP_SHARE = 100  # an image's score is the mean of one in so many positions of its map, the highest
NEIGHBOURS = 3  # positions per side, over which features are averaged


class ChannelError(nn.Module):
    """Squared difference, each channel in units of its mean over the positions of normal images; 1 at first.

    Args:
        channels: number of channels, C.
    """

    root_mean_square: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("root_mean_square", torch.ones(channels))

    def set(self, mean_square: Tensor) -> None:
        """Set the mean squared difference of normal images, (C,)."""
        smallest = (SMALLEST_DEVIATION**2 * mean_square.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        root = mean_square.clamp_min(smallest).sqrt()
        self.root_mean_square.copy_(root.clamp_min(torch.finfo(self.root_mean_square.dtype).tiny))

    def forward(self, difference: Tensor) -> Tensor:
        """Return the mean over channels: (N, C, H, W) to (N, 1, H, W), >= 0, 1 on average over normal images.

        Averaged over neighbouring positions beforehand, a normal image's difference comes out smaller.
        """
        return F.conv2d(difference.square(), self.weights.to(difference.dtype)[None, :, None, None])

    @property
    def weights(self) -> Tensor:
        """Of each channel's square in the mean, (C,), float32 or wider."""
        (root,) = wide([self.root_mean_square])
        return 1 / (len(root) * root.square())


def families_of(level: Sequence[Tensor], value: nn.Module, disagreement: nn.Module) -> Tensor:
    """Return the three maps of a level, (N, 3, H, W), in the order of :data:`FAMILIES`.

    Args:
        level: the source's features, the local and the global cloner's prediction of them, (N, C, H, W) each.
        value: the level's :class:`ChannelError` of the local cloner.
        disagreement: that of the cloners' difference.
    """
    source, near, far = level
    return torch.cat((value(source - near), local_direction(source, near), disagreement(near - far)), 1)


def coarser_scales(level: Sequence[Tensor], coarsening: int) -> Iterable[list[Tensor]]:
    """Return a level's tensors averaged to the positions of the next level, and over 3 x 3 of those."""
    coarse = [F.avg_pool2d(part, coarsening) for part in level]
    return coarse, [neighbourhood_mean(part) for part in coarse]


def neighbourhood_mean(features: Tensor) -> Tensor:
    """Return the mean of each position and those around it, at the border of those that there are."""
    return F.avg_pool2d(features, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False)


def top_mean(maps: Tensor) -> Tensor:
    """Return the mean of the highest hundredth of each map: (N, K, H, W) to (N, K)."""
    return highest(maps).mean(-1)


def highest(maps: Tensor) -> Tensor:
    """Return the highest hundredth of each map: (N, K, H, W) to (N, K, H * W / 100), one value at least."""
    positions = maps.flatten(2)
    return positions.topk(max(positions.shape[-1] // TOP_SHARE, 1), dim=-1, sorted=False).values
