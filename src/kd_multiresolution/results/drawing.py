"""Pictures of one image side by side: what the model saw, masks, and the heat map laid over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.visualization.image.functional import overlay_image, visualize_anomaly_map
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

ALPHA = 0.5  # opacity of a heat map, as anomalib's


def heat_map(picture: Image.Image, colours: Tensor, inside: Tensor | None) -> Image.Image:
    """Return a picture under its heat map.

    Args:
        picture: of what the model saw.
        colours: the map, (H, W), in [0, 1].
        inside: where it is laid over the picture, (H, W), bool or in [0, 1] with 0.5 as the border; everywhere if
            ``None``.
    """
    picture = picture.convert("RGB")
    heat = visualize_anomaly_map(_resized(colours, picture).clamp(0, 1))
    covered = overlay_image(picture, heat, alpha=ALPHA).convert("RGB")
    if inside is None:
        return covered
    shown = (_resized(inside.float(), picture) >= 1 / 2).to(torch.uint8) * 255
    return Image.composite(covered, picture, to_pil_image(shown))


def mask(values: Tensor, picture: Image.Image) -> Image.Image:
    """Return a mask, (H, W), bool, in white on black, of a picture's size."""
    drawn: Image.Image = to_pil_image(values.to(torch.uint8) * 255)
    return drawn.resize(picture.size, Image.Resampling.NEAREST)


def together(pictures: Sequence[Image.Image], *, below: bool = False) -> Image.Image:
    """Return pictures of one size side by side, or one below the other."""
    width, height = pictures[0].size
    right, down = (0, height) if below else (width, 0)
    sheet = Image.new("RGB", (width + right * (len(pictures) - 1), height + down * (len(pictures) - 1)))
    for number, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB"), (right * number, down * number))
    return sheet


def _resized(values: Tensor, picture: Image.Image) -> Tensor:
    width, height = picture.size
    values = values.reshape(1, 1, *values.shape[-2:])
    return F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
