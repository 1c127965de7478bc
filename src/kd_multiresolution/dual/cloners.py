"""The two cloners, both fed by the source's own features (see ``docs/method.md``).

The paper's cloner (arXiv 2011.11108) starts at the image and has to learn what the source's first layers do. These
start at the first and at the last critical point, which the source has computed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from kd_multiresolution.dual.standardization import LevelConv, Standardization
from kd_multiresolution.source.network import Level

GRID = 4  # positions per side, over which the global cloner sees an image before it puts it into its code


class LocalCloner(nn.Module):
    """Predicts the deeper critical points from the first one, position by position with what lies around it.

    Args:
        levels: the critical points, at least two.
        width: channels at the first critical point; twice as many at each further one.
    """

    def __init__(self, levels: Sequence[Level], width: int = 32) -> None:
        super().__init__()
        first, *others = levels
        self.entry = LevelConv(first.channels, width)
        self.reductions, self.refinements, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        stride = first.stride
        for level in others:
            self.reductions.append(nn.Conv2d(width, 2 * width, 3, stride=level.stride // stride, padding=1))
            width, stride = 2 * width, level.stride
            self.refinements.append(nn.Conv2d(width, width, 3, padding=1))
            # Both convolutions' channels: one sees a smaller neighbourhood, the other a larger one.
            self.heads.append(LevelConv(2 * width, level.channels))

    def forward(self, features: Sequence[Tensor], units: Sequence[Standardization]) -> list[Tensor]:
        """Return the prediction of all critical points but the first, in the source's units.

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
            units: the standardisation of each.
        """
        x = self.entry.from_level(features[0], units[0]).relu_()
        predicted = []
        for reduction, refinement, head, level in zip(
            self.reductions, self.refinements, _heads(self), units[1:], strict=True
        ):
            reduced = reduction(x).relu_()
            x = refinement(reduced).relu_()
            predicted.append(head.to_level(torch.cat([reduced, x], 1), level))
        return predicted


class GlobalCloner(nn.Module):
    """Predicts the same critical points from a code of few numbers: how such an image looks as a whole.

    Args:
        levels: the critical points, at least two.
        code: how many numbers an image is put into.
        width: channels of encoder and decoder.
    """

    def __init__(self, levels: Sequence[Level], code: int = 64, width: int = 128) -> None:
        super().__init__()
        self.entry = LevelConv(levels[-1].channels, width // 2)
        self.encoder = nn.Sequential(
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.to_code = nn.Conv2d(width, code, GRID)
        self.from_code = nn.Conv2d(code, width * GRID * GRID, 1)
        self.decoder = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        finer = len(levels) - 2
        # Half the channels before there are four times as many positions: most of a step is spent here.
        self.reductions = nn.ModuleList(
            nn.Conv2d(width if i == finer - 1 else width // 2, width // 2, 1) for i in range(finer)
        )
        self.refinements = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 3, padding=1) for _ in range(finer))
        widths = [width // 2] * finer + [width]
        self.heads = nn.ModuleList(
            LevelConv(channels, level.channels) for channels, level in zip(widths, levels[1:], strict=True)
        )

    def forward(self, features: Sequence[Tensor], units: Sequence[Standardization]) -> list[Tensor]:
        """Return the prediction of all critical points but the first, in the source's units.

        Args:
            features: the source's, (N, C_i, H_i, W_i) per critical point.
            units: the standardisation of each.
        """
        height, width = features[-1].shape[-2:]
        x = self.encoder[:2](self.entry.from_level(features[-1], units[-1]).relu_())
        # Weights that see the border of a single position alone get no gradient in bfloat16, but what lay in memory.
        x = self.encoder[2:](resized(x, tuple(max(side, 2) for side in x.shape[-2:])) if 1 in x.shape[-2:] else x)
        code = self.to_code(F.adaptive_avg_pool2d(x, GRID))
        x = self.from_code(code).relu_().flatten(1).unflatten(1, (-1, GRID, GRID))
        first, *others = self.decoder
        x = first(x).relu_()
        for convolution, size in zip(others, ((height // 2, width // 2), (height, width)), strict=True):
            x = convolution(resized(x, size)).relu_()
        *finer_heads, last_head = _heads(self)
        predicted = [last_head.to_level(x, units[-1])]
        finer = zip(self.reductions, self.refinements, finer_heads, units[1:-1], features[1:-1], strict=True)
        for reduction, refinement, head, level, target in reversed([*finer]):
            x = refinement(resized(reduction(x), tuple(target.shape[-2:]))).relu_()
            predicted.insert(0, head.to_level(x, level))
        return predicted


def _heads(cloner: LocalCloner | GlobalCloner) -> list[LevelConv]:
    return cast("list[LevelConv]", [*cloner.heads])


def resized(features: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return features at another height and width, bilinearly."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
