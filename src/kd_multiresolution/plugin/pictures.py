"""What a picture is like, in three numbers: how bright it is, how rich in contrast, how sharp."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2 import Normalize

STATISTICS = ("brightness", "contrast", "sharpness")
SMALLEST_CONTRAST = 1e-3  # a quarter of a grey value of 255: below it there is nothing to be sharp


def picture_statistics(
    images: Tensor, transform: object = None, region: Tensor | None = None
) -> dict[str, list[float]]:
    """Return what pictures are like, by the names of :data:`STATISTICS`, one number per picture.

    Brightness is the mean and contrast the deviation of the grey values, both 0 to 1. Sharpness is the mean difference
    of neighbouring pixels in units of the contrast, so that it does not change with light or exposure.

    Args:
        images: as the model was given them, (N, C, H, W).
        transform: what they went through; its normalisation is undone.
        region: which pixels are looked at, (1, 1, H, W), bool; ``None``: all.
    """
    images = images.detach().as_subclass(Tensor).float()
    for step in reversed([*normalizations(transform)]):
        mean, deviation = (images.new_tensor([*values]).reshape(-1, 1, 1) for values in (step.mean, step.std))
        images = images * deviation + mean
    grey = images.mean(1)
    judged = torch.ones_like(grey[:1], dtype=torch.bool) if region is None else region[0]
    brightness = _mean(grey, judged)
    contrast = _mean((grey - brightness[:, None, None]).square(), judged).sqrt()
    down = _mean(grey.diff(dim=1).abs(), judged[:, 1:] & judged[:, :-1])
    right = _mean(grey.diff(dim=2).abs(), judged[:, :, 1:] & judged[:, :, :-1])
    steps = (down + right) / 2
    found = torch.stack([brightness, contrast, steps / contrast.clamp_min(SMALLEST_CONTRAST)])
    return dict(zip(STATISTICS, found.tolist(), strict=True))


def normalizations(transform: object) -> Iterator[Normalize]:
    """Yield the normalisations of a transform."""
    if isinstance(transform, Normalize):
        yield transform
    for step in getattr(transform, "transforms", ()):
        yield from normalizations(step)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean over the positions that count: (N, H, W) and (1, H, W) to (N,)."""
    return torch.where(where, values, 0).sum((1, 2)) / where.sum().clamp_min(1)
