"""The cloner: a small network that imitates the source on normal images (Fig. 2 of arXiv 2011.11108)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_multiresolution.source.network import Level

SIZES = ("compact", "equal")


class Cloner(nn.Module):
    """A VGG-like network with one block per level of the source, built from the source's levels.

    For VGG-16 the compact cloner is exactly Fig. 2's: 3x3 convolutions of widths 16 16 M 16 128 M 16 16 256 M
    16 16 512 M 16 16 512 M. The last width of every block is the source's, save that of a first block without a
    critical point.

    Args:
        levels: the source's levels up to the last critical point.
        size: ``compact`` (the paper's), or ``equal``: all convolutions of a block have the source's width.
        bias: give the convolutions a bias. The paper has none, since with one the cloner can learn constants.
        batch_norm: put a batch norm after every convolution except the last of a block, as the published code does.
        inner_width: width of the convolutions of a compact cloner that are not the last of their block.
        seed: seed of the initial weights (Xavier uniform); the global random generator is not used.

    Raises:
        ValueError: if ``size`` is not one of the two.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        size: str = "compact",
        bias: bool = False,
        batch_norm: bool = True,
        inner_width: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            msg = f"cloner={size!r}: expected one of {', '.join(SIZES)}."
            raise ValueError(msg)
        self.critical = [level.critical for level in levels]
        self.blocks = nn.ModuleList()
        channels, stride = 3, 1
        for index, level in enumerate(levels):
            inner = level.channels if size == "equal" else inner_width
            last = inner_width if size == "compact" and index == 0 and not level.critical else level.channels
            widths = [*[inner] * (level.convolutions - 1), last]
            self.blocks.append(
                _block(channels, widths, level, level.stride // stride, bias=bias, batch_norm=batch_norm)
            )
            channels, stride = last, level.stride
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the activations at the critical points, of the same shapes as the source's.

        Args:
            images: (N, 3, H, W), float, H and W multiples of the last level's stride.

        Returns:
            One (N, C_i, H_i, W_i) tensor per critical point, from the finest to the coarsest.
        """
        features = []
        for block, critical in zip(self.blocks, self.critical, strict=True):
            images = block(images)
            if critical:
                features.append(images)
        return features


def _block(
    channels: int, widths: Sequence[int], level: Level, pool: int, *, bias: bool, batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        is_last = index == len(widths) - 1
        layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=bias))
        if batch_norm and not is_last:
            layers.append(nn.BatchNorm2d(width))
        # Before the ReLU: a maximum of rectified numbers is the rectified maximum, and of these there are fewer.
        if is_last and pool > 1:
            layers.append(nn.MaxPool2d(pool))
        # A source whose activations there can be negative must not be imitated behind a ReLU.
        if level.rectified or not is_last:
            layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers)
