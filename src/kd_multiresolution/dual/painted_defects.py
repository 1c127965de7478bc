"""Defects painted on normal images, and normal images out of focus: what a map is worth can be told from them.

A patch of another normal image is pasted, as in CutPaste (arXiv 2104.04015), here as a soft ellipse and where there is
something to see: on a flat background defects would be easy to find, and real ones are seldom there. A map that a
slight lack of focus raises as much as a defect is not to be trusted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from kornia.filters import gaussian_blur2d, sobel
from torch import Tensor

from kd_multiresolution.source.region import within

SMALLEST, LARGEST = 0.015, 0.1  # half axes, as fractions of the image's shorter side
LEAST_SMALL, LEAST_LARGE = 3.0, 6.0  # pixels: below, of little pictures, the soft edge would be all there is
FAINTEST = 0.35  # opacity
FOCUS = 0.7  # pixels: standard deviation of a blur that is hardly seen


def painted(images: Tensor, generator: torch.Generator, region: Tensor | None = None) -> Tensor:
    """Return each image with an elliptic patch of the next one pasted in.

    Args:
        images: (N, C, H, W), of any range; a single image lends the patch to itself.
        generator: on the CPU; place, shape and opacity of the patches are drawn from it.
        region: where patches may lie and come from, (1, 1, H, W), bool; ``None``: anywhere.

    Returns:
        (N, C, H, W).
    """
    count, _, height, width = images.shape
    if not count:
        return images
    donors = images.roll(1, 0)
    row, column = _structured_places(images, generator, region)
    donor_row, donor_column = _structured_places(donors, generator, region)

    def drawn(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1).uniform_(low, high, generator=generator)

    side = min(height, width)
    small, large = max(SMALLEST * side, LEAST_SMALL), max(LARGEST * side, LEAST_LARGE)
    half_axes = (drawn(small, large), drawn(small, large))
    angle, opacity = drawn(0, math.pi), drawn(FAINTEST, 1)
    down = torch.arange(height)[None, :, None] - row[:, None, None]
    right = torch.arange(width)[None, None, :] - column[:, None, None]
    along, across = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    distance = ((along / half_axes[0]).square() + (across / half_axes[1]).square()).sqrt()
    # The edge is about a pixel wide.
    mask = opacity * torch.sigmoid((1 - distance) * torch.minimum(*half_axes))
    rows = (torch.arange(height) + (donor_row - row)[:, None]) % height
    columns = (torch.arange(width) + (donor_column - column)[:, None]) % width
    moved = donors[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return torch.lerp(images, moved, mask[:, None].to(images))


def out_of_focus(images: Tensor) -> Tensor:
    """Return images, (N, C, H, W), slightly blurred."""
    if not len(images):
        return images
    size = 2 * math.ceil(3 * FOCUS) + 1
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    blurred: Tensor = gaussian_blur2d(wide, (size, size), (FOCUS, FOCUS), border_type="replicate")
    return blurred.to(images)


def _structured_places(images: Tensor, generator: torch.Generator, region: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw a row and a column per image, likelier where edges are near."""
    width = images.shape[-1]
    sigma = 0.04 * min(images.shape[-2:])
    # The edge of the region, two pixels wide, is none of the part's.
    inner = None if region is None else F.max_pool2d((~region).float(), 5, 1, 2) == 0
    edges = within(sobel(images.float().mean(1, keepdim=True)), inner)
    size = 2 * max(round(3 * sigma), 1) + 1
    near = gaussian_blur2d(edges, (size, size), (sigma, sigma), border_type="replicate").clamp_min(1e-6)
    place = torch.multinomial(within(near, region).flatten(1).cpu(), 1, generator=generator)[:, 0]
    return place // width, place % width
