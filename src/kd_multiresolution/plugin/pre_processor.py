"""The pre-processor of either model: images resized, and normalised where the source wants it."""

from __future__ import annotations

import logging

from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from kd_multiresolution.plugin.pictures import normalizations
from kd_multiresolution.source.images import normalization_of

logger = logging.getLogger(__name__)


def resizing(image_size: tuple[int, int], *, normalized_for: str | None) -> PreProcessor:
    """Return a pre-processor that resizes images, to [0, 1] or with the normalisation that a source was trained with.

    Args:
        image_size: height and width in pixels.
        normalized_for: name of the source; ``None``: no normalisation.

    Raises:
        ValueError: if timm does not have the source, or does not say how it was trained.
    """
    # anomalib's exported models resize without antialiasing; trained and deployed models must see the same image.
    resize = Resize(image_size, antialias=False)
    if normalized_for is None:
        # Not in a Compose of its own: anomalib's tiled ensemble takes the size out, and an empty one is refused.
        return PreProcessor(transform=resize)
    mean, deviation = normalization_of(normalized_for)
    return PreProcessor(transform=Compose([resize, Normalize(mean=mean, std=deviation)]))


def check_unconfigured(
    pre_processor: PreProcessor | bool, image_size: int | tuple[int, int] | None, imagenet_normalization: bool | None
) -> None:
    """Check that nothing is asked of our own pre-processor where another one, or none, is given.

    Raises:
        ValueError: if a size or a normalisation is.
    """
    if pre_processor is not True and (image_size is not None or imagenet_normalization):
        msg = (
            f"image_size={image_size!r}, imagenet_normalization={imagenet_normalization!r}: both configure our own "
            f"pre-processor. Leave them out, or leave out pre_processor={pre_processor!r}."
        )
        raise ValueError(msg)


def warn_of_other_normalization(pre_processor: PreProcessor | bool, source: str) -> None:
    """Say in the log if a pre-processor of the user's own normalises images, but not as the source was trained."""
    try:
        mean, deviation = normalization_of(source)
    except ValueError:
        return  # nothing is known to hold it against
    for step in normalizations(getattr(pre_processor, "transform", None)):
        theirs = [tuple(numbers) * (3 if len(numbers) == 1 else 1) for numbers in (step.mean, step.std)]
        if theirs != [mean, deviation]:
            logger.warning(
                "pre_processor: it normalises images with mean %s and deviation %s, source %r was trained with %s and "
                "%s; configure_pre_processor(..., source=%r) has these.",
                *theirs, source, mean, deviation, source,
            )  # fmt: skip


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels, of which one number is both."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
