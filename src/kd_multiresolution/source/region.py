"""The part of an image that is judged: a source is shown nothing of the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def within(images: Tensor, region: Tensor | None) -> Tensor:
    """Return images or maps, (N, C, H, W), with zeros outside a region, (1, 1, H, W), bool, if there is one."""
    return images if region is None else torch.where(region, images, 0)


def check_region(image_size: Sequence[int], region: Tensor | None) -> None:
    """Check that a region was made for images of a size.

    Raises:
        ValueError: if it has another one.
    """
    if region is not None and tuple(image_size) != tuple(region.shape[-2:]):
        msg = (
            f"images: {tuple(image_size)} pixels reach the model, its region has {tuple(region.shape[-2:])}. Resize "
            "them as in its training."
        )
        raise ValueError(msg)
