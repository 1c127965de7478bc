"""What the page shows of an image: small pictures and outlines, and the room that all of a page's may take."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

LARGEST, SMALLEST = 512, 32  # pixels per side, of a square picture
BYTES_PER_PIXEL = 0.2  # about what WebP takes for a texture
WEBP_SIDE = 16383  # pixels, the most that the format has
HEAT_SIDE = 96  # pixels; maps are smooth
QUALITY, HEAT_QUALITY = 78, 60
SHRINKING = 0.8
SPARE = 0.9  # of the room, where pictures are left out, so that this is not done for each image anew
BASE64 = 4 / 3
OTHERS = 300  # characters that the page has of an image besides pictures, outlines and names
FAINT, FULL, OPACITY = 0.2, 0.6, 0.8  # values of a map below which it is not seen, from which it covers most


@dataclass(frozen=True)
class Tile:
    """What the page shows of an image, in the proportions of what the model saw.

    Attributes:
        width: of the picture, in pixels.
        height: of the picture.
        picture: WebP; empty if there was no room for it.
        heat: the heat map, to be laid over it, WebP with transparency; empty if there is none.
        mask: where it is defective, as an SVG path whose x and y go from 0 to 1000; ``None`` if that is not known.
        outline: what was marked, likewise.
        own_range: whether the colours of its heat map are no other image's.
    """

    width: int
    height: int
    picture: bytes
    heat: bytes = b""
    mask: str | None = None
    outline: str | None = None
    own_range: bool = False

    @property
    def length(self) -> int:
        """How many characters of the page it takes."""
        return round(BASE64 * (len(self.picture) + len(self.heat))) + len(self.mask or "") + len(self.outline or "")

    def shrunk(self) -> Tile:
        """Return it with smaller pictures."""
        width, height = (max(1, round(side * SHRINKING)) for side in (self.width, self.height))
        picture = _webp(_decoded(self.picture).resize((width, height)), QUALITY) if self.picture else b""
        heat = self.heat
        if heat and max(width, height) < HEAT_SIDE:
            heat = _webp(_decoded(heat).resize((width, height)), HEAT_QUALITY)
        return replace(self, width=width, height=height, picture=picture, heat=heat)

    def without_pictures(self) -> Tile:
        """Return it without its pictures and outlines."""
        return replace(self, picture=b"", heat=b"", mask=None, outline=None)


def pictured(picture: Image.Image, colours: Tensor | None) -> Tile:
    """Return a tile.

    Args:
        picture: of what the model saw.
        colours: its map, (H, W), in [0, 1], if there is one.
    """
    picture = picture.convert("RGB")
    picture.thumbnail((WEBP_SIDE, WEBP_SIDE))  # of very wide ones
    heat = b"" if colours is None else _webp(heat_layer(colours), HEAT_QUALITY)
    return Tile(picture.width, picture.height, _webp(picture, QUALITY), heat)


def side_for(count: int | None, room: int) -> int:
    """Return the side, in pixels, of the square pictures of so many images for which there is so much room."""
    if not count:
        return LARGEST // 2
    pixels = max(room / count - OTHERS, 0) / BASE64 / BYTES_PER_PIXEL
    return min(LARGEST, max(SMALLEST, round(math.sqrt(pixels))))


def fit(tiles: Sequence[Tile], room: int) -> list[Tile]:
    """Return tiles for which there is room.

    All pictures are made smaller by the same factor. Where even the smallest are too many, the last tiles lose theirs.

    Args:
        tiles: those first that are most worth keeping.
        room: in characters.
    """
    fitted = [*tiles]
    while sum(tile.length for tile in fitted) > room:
        largest = max(math.sqrt(tile.width * tile.height) for tile in fitted)
        if largest * SHRINKING < SMALLEST:
            ends = np.cumsum([tile.length for tile in fitted])
            return [
                tile if end <= SPARE * room else tile.without_pictures() for tile, end in zip(fitted, ends, strict=True)
            ]
        fitted = [tile.shrunk() for tile in fitted]
    return fitted


def heat_layer(colours: Tensor) -> Image.Image:
    """Return a heat map to be laid over a picture: the higher the value, the brighter and the less transparent.

    Args:
        colours: (H, W), in [0, 1].
    """
    values = colours.float()[None, None]
    size = (min(values.shape[-2], HEAT_SIDE), min(values.shape[-1], HEAT_SIDE))
    plane = F.adaptive_avg_pool2d(values, size)[0, 0].clamp(0, 1).numpy()
    # From blue over orange to yellow, ever lighter: told apart by those who see no red or green, too.
    layer = matplotlib.colormaps["plasma"](plane)
    layer[..., 3] = OPACITY * np.clip((plane - FAINT) / (FULL - FAINT), 0, 1)
    return Image.fromarray((layer * 255).round().astype(np.uint8), "RGBA")


def _webp(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=2)
    return file.getvalue()


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture
