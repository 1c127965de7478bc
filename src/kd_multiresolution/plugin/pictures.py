"""What a picture is like, in three numbers: how bright it is, how rich in contrast, how sharp."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2 import Normalize

STATISTICS = ("brightness", "contrast", "sharpness")
SMALLEST_CONTRAST = 1e-3  # a quarter of a grey value of 255: below it there is nothing to be sharp


def picture_statistics(images: Tensor, transform: object = None) -> dict[str, list[float]]:
    """Return what pictures are like, by the names of :data:`STATISTICS`, one number per picture.

    Brightness is the mean and contrast the deviation of the grey values, both 0 to 1. Sharpness is the mean difference
    of neighbouring pixels in units of the contrast, so that it does not change with light or exposure.

    Args:
        images: as the model was given them, (N, C, H, W).
        transform: what they went through; its normalisation is undone.
    """
    images = images.detach().as_subclass(Tensor).float()
    for step in reversed([*normalizations(transform)]):
        mean, deviation = (images.new_tensor([*values]).reshape(-1, 1, 1) for values in (step.mean, step.std))
        images = images * deviation + mean
    grey = images.mean(1)
    brightness, contrast = grey.mean((1, 2)), grey.std((1, 2), correction=0)
    steps = torch.stack([grey.diff(dim=axis).abs().mean((1, 2)) for axis in (1, 2)]).mean(0)
    found = (brightness, contrast, steps / contrast.clamp_min(SMALLEST_CONTRAST))
    return {name: values.tolist() for name, values in zip(STATISTICS, found, strict=True)}


def normalizations(transform: object) -> Iterator[Normalize]:
    """Yield the normalisations of a transform."""
    if isinstance(transform, Normalize):
        yield transform
    for step in getattr(transform, "transforms", ()):
        yield from normalizations(step)
