"""Large images in anomalib's tiles: a network sees tiles, and what it says of them is put together again.

As anomalib's own models do it, so that scores and maps are of whole images. ``TilerConfigurationCallback`` sets a
model's attribute ``tiler``, or the user does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Tiling:
    """What happens before and after a network."""

    def __init__(self, tiler: Tiler) -> None:
        self.tiler = copy.copy(tiler)  # it remembers the images that it cut

    def cut(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Return the tiles of images, (N, C, H, W), as one batch."""
        del network
        (images,) = arguments
        return (self.tiler.tile(images).to(images),)

    def joined(self, network: nn.Module, arguments: tuple[Tensor, ...], features: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of whole images; where tiles overlap their mean."""
        del network, arguments
        return [self.tiler.untile(level).to(level) for level in features]


def allow_tiles(model: nn.Module) -> None:
    """Give a torch model the attribute by which anomalib knows that it takes tiles."""
    cast("Any", model).tiler = None


def in_tiles(networks: Iterable[nn.Module], tiler: Tiler) -> list[RemovableHandle]:
    """Let networks see images in tiles; return what takes that back."""
    handles = []
    for network in networks:
        tiling = _Tiling(tiler)
        handles += [network.register_forward_pre_hook(tiling.cut), network.register_forward_hook(tiling.joined)]
    return handles


def described(tiler: Tiler | None) -> dict[str, list[int]] | None:
    """Return a tiler as plain data, of which :func:`restored` makes one."""
    if tiler is None:
        return None
    return {
        "tile_size": [int(tiler.tile_size_h), int(tiler.tile_size_w)],
        "stride": [int(tiler.stride_h), int(tiler.stride_w)],
    }


def restored(description: dict[str, list[int]]) -> Tiler:
    """Return the tiler that was described."""
    return Tiler(description["tile_size"], description["stride"])


def check_tiler(tiler: Tiler, image_size: Sequence[int] | None, stride: int) -> None:
    """Check that tiles cover an image exactly, and that features of tiles make features of the image.

    Args:
        tiler: anomalib's.
        image_size: height and width in pixels of the images that the model sees; ``None``: not known.
        stride: pixels per position of the features.

    Raises:
        ValueError: if not.
    """
    tile, step = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    said = f"tiler: tile_size={tile}, stride={step}"
    if tiler.remove_border_count or ImageUpscaleMode(tiler.mode) != ImageUpscaleMode.PADDING:
        msg = (
            f"{said}, remove_border_count={tiler.remove_border_count}, mode={str(tiler.mode)!r}: tiles are put "
            "together by their features, without borders of their own. Leave out remove_border_count and mode."
        )
        raise ValueError(msg)
    if any(side % stride for side in (*tile, *step)):
        msg = f"{said}: expected multiples of {stride}, the source's stride at its last critical point."
        raise ValueError(msg)
    sides = () if image_size is None else tuple(zip(image_size, tile, step, strict=True))
    if any(whole < part or (whole - part) % by for whole, part, by in sides):
        fitting = tuple(part + max(round((whole - part) / by), 0) * by for whole, part, by in sides)
        msg = (
            f"{said}: they do not cover images of {tuple(image_size or ())} pixels exactly. For example image_size="
            f"{fitting}."
        )
        raise ValueError(msg)
