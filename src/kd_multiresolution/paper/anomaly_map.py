"""From an attribution to the anomaly map: channel sum, Gaussian blur, opening (Eq. 6 of arXiv 2011.11108).

And an attribution that needs no gradient: the discrepancy itself, position by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F  # noqa: N812
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor, nn

from kd_multiresolution.paper.discrepancy import local_discrepancy
from kd_multiresolution.source.derived import Derived

TRUNCATE = 4.0  # standard deviations, as scipy.ndimage.gaussian_filter
PERCENTILE = 0.99


class AnomalyMapGenerator(nn.Module):
    """Turns attributions into anomaly maps.

    Args:
        sigma: standard deviation of the Gaussian in pixels; 0 leaves the blur out.
        opening: open the map with the 3x3 cross. Opening the grey map is the same as opening the binary map at every
            threshold, which is what the published code does at 1,000 of them.
        percentile_scale: scale each map before the blur: minus its minimum, over its 99th percentile minus its minimum,
            clipped to [0, 1]. The paper's pixel figures use it; it makes maps of different images incomparable.
        stride: pixels of the image per position of the attribution.

    Raises:
        ValueError: if ``sigma`` is negative or not finite.
    """

    kernel: Tensor

    def __init__(
        self, sigma: float = 4.0, *, opening: bool = True, percentile_scale: bool = False, stride: int = 1
    ) -> None:
        super().__init__()
        check_sigma(sigma)
        self.sigma = sigma
        self.opening = opening
        self.percentile_scale = percentile_scale
        self.stride = stride
        radius = int(TRUNCATE * sigma / stride + 0.5)
        # In double precision: a sum of 33 rounded weights would be off in the seventh digit.
        width = 2 * radius + 1
        kernel = get_gaussian_kernel1d(width, sigma / stride, dtype=torch.float64) if radius else torch.ones(1, 1)
        self.register_buffer("kernel", kernel.float(), persistent=False)
        self._of_columns: Derived[Tensor] = Derived()
        self._of_rows: Derived[Tensor] = Derived()

    def forward(self, attribution: Tensor) -> Tensor:
        """Return the anomaly maps.

        Args:
            attribution: (N, C, H, W), any sign; H and W at least ``4 * sigma / stride``.

        Returns:
            (N, 1, H, W), >= 0, float32 or wider.

        Raises:
            ValueError: if the images are too small for the blur.
        """
        # Half precision, of the attribution, the model or autocast, loses the map's small differences.
        with torch.autocast(attribution.device.type, enabled=False):
            maps = attribution.to(torch.promote_types(self.kernel.dtype, torch.float32)).abs()
            return self._maps(maps.sum(1, keepdim=True) if maps.shape[1] > 1 else maps)

    def check_image_size(self, image_size: Sequence[int]) -> None:
        """Check that images are large enough for the blur.

        Raises:
            ValueError: if height or width in pixels is below ``4 * sigma``.
        """
        least = self.stride * (self.kernel.shape[-1] // 2)
        if min(image_size) < least:
            msg = (
                f"sigma={self.sigma}: the blur needs images of at least {least} pixels, not {tuple(image_size)}. Use a "
                "smaller sigma, or a larger image_size."
            )
            raise ValueError(msg)

    def _maps(self, maps: Tensor) -> Tensor:
        maps = self.blurred(scale_to_percentile(maps) if self.percentile_scale else maps)
        return opened(maps) if self.opening else maps

    def blurred(self, maps: Tensor) -> Tensor:
        """Return maps, (N, K, H, W), each blurred on its own."""
        radius = self.kernel.shape[-1] // 2
        if radius:
            self.check_image_size([self.stride * side for side in maps.shape[-2:]])
            weights = self.kernel[0, radius:]
            height, width = (
                kept.get([self.kernel], partial(_blur_matrix, side, weights), key=side)
                for kept, side in zip((self._of_columns, self._of_rows), maps.shape[-2:], strict=True)
            )
            maps = height.to(maps) @ maps @ width.to(maps)
        return maps


def check_sigma(sigma: float) -> None:
    """Check a blur's standard deviation.

    Raises:
        ValueError: if it is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        msg = f"sigma={sigma!r}: expected a number of pixels, 0 or more."
        raise ValueError(msg)


def _blur_matrix(side: int, weights: Tensor) -> Tensor:
    """Return what blurs a column of this many pixels, or a row from the right; the image is mirrored at its border.

    Two products of matrices are several times as fast as convolutions of a single channel, up to about 1,000 pixels.

    Args:
        side: number of pixels, as many as the weights less one, or more.
        weights: the kernel from its centre on.

    Returns:
        (side, side), symmetric.
    """
    weights = F.pad(weights, (0, 2 * side - len(weights)))
    rows = torch.arange(side, device=weights.device)[:, None]
    columns = rows.T
    # The mirror repeats the border pixel, as scipy's "reflect": pixel -1 is pixel 0.
    before_the_first = weights[rows + columns + 1]
    return weights[(rows - columns).abs()] + before_the_first + before_the_first.flip(0, 1)


def opened(maps: Tensor) -> Tensor:
    """Open each map with OpenCV's 3x3 "ellipse", a cross; pixels outside the image are ignored.

    Maxima of shifted maps are many times as fast as kornia's general morphology and as max pools of a single channel,
    and every runtime has them.

    Args:
        maps: (N, 1, H, W).

    Returns:
        (N, 1, H, W).
    """
    return _of_cross(torch.maximum, _of_cross(torch.minimum, maps, math.inf), -math.inf)


def _of_cross(function: Callable[[Tensor, Tensor], Tensor], maps: Tensor, outside: float) -> Tensor:
    padded = F.pad(maps, (1, 1, 1, 1), value=outside)
    above, below = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    return reduce(function, (above, below, left, right), maps)


def discrepancy_map(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    value_weight: float | Tensor,
    terms: str | Sequence[str] = "total",
) -> Tensor:
    """Return the discrepancy at each position, upsampled bilinearly and summed over the critical points.

    It is no method of the paper: where its maps are gradients of the discrepancy, this is the discrepancy itself
    before it is summed over positions, with the channels of one position as the vector of the direction term.

    Args:
        source_features: the source's activations, one (N, C_i, H_i, W_i) tensor per critical point.
        cloner_features: the cloner's, of the same shapes.
        image_size: height H and width W of the images.
        value_weight: as :func:`kd_multiresolution.paper.discrepancy.discrepancy` takes it.
        terms: as :func:`kd_multiresolution.paper.discrepancy.discrepancy` takes them.

    Returns:
        (N, 1, H, W), >= 0; zero where source and cloner agree.

    Raises:
        ValueError: as :func:`kd_multiresolution.paper.discrepancy.discrepancy`.
    """
    maps = local_discrepancy(source_features, cloner_features, value_weight=value_weight, terms=terms)
    upsampled = [F.interpolate(level, size=image_size, mode="bilinear", align_corners=False) for level in maps]
    return torch.stack(upsampled).sum(0)


def scale_to_percentile(maps: Tensor) -> Tensor:
    """Scale each map: minus its minimum, over its 99th percentile minus its minimum, clipped to [0, 1].

    Args:
        maps: (N, 1, H, W).

    Returns:
        (N, 1, H, W), in [0, 1]; zero where a map is constant.
    """
    # torch.quantile refuses more than 2**24 elements; this is its (and numpy's) linear interpolation.
    ordered = maps.flatten(1).sort(dim=1).values
    position = PERCENTILE * (ordered.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[1] - 1)
    high = torch.lerp(ordered[:, below], ordered[:, above], position - below)
    low = ordered[:, 0]
    low, span = (column[:, None, None, None] for column in (low, high - low))
    # A constant map has no span: its scaled map is zero, not 0 / 0.
    return ((maps - low) / span.clamp_min(torch.finfo(maps.dtype).tiny)).clamp(0, 1)
