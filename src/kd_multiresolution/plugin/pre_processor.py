"""The pre-processor of either model: images resized, and normalised where the source wants it."""

from __future__ import annotations

from anomalib.pre_processing import PreProcessor
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import Compose, Normalize, Resize


def resizing(image_size: tuple[int, int], *, imagenet_normalization: bool) -> PreProcessor:
    """Return a pre-processor that resizes images, to [0, 1] or with ImageNet's normalisation.

    Args:
        image_size: height and width in pixels.
        imagenet_normalization: subtract ImageNet's mean and divide by its deviation.
    """
    # anomalib's exported models resize without antialiasing; trained and deployed models must see the same image.
    resize = Resize(image_size, antialias=False)
    if not imagenet_normalization:
        # Not in a Compose of its own: anomalib's tiled ensemble takes the size out, and an empty one is refused.
        return PreProcessor(transform=resize)
    return PreProcessor(transform=Compose([resize, Normalize(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)]))


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


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels, of which one number is both."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
