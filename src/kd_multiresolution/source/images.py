"""What images a source takes."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import Tensor
from torchvision.tv_tensors import TVTensor

from kd_multiresolution.source.network import Source
from kd_multiresolution.source.region import check_region, within
from kd_multiresolution.source.stages import timm_name_of


def checked_images(images: Tensor, source: Source, dtype: torch.dtype) -> Tensor:
    """Return the images as plain tensors of a type, with three channels, and zeros outside the region of interest.

    Grey images are repeated.

    Raises:
        ValueError: if they are not float (N, 3, H, W) or (N, 1, H, W), H and W multiples of the source's stride and
            those of the region, if there is one.
    """
    if images.ndim != 4 or images.shape[1] not in {1, 3} or not images.is_floating_point():
        form = f"{images.dtype} {tuple(images.shape)}"
        msg = f"images: expected float tensors (N, 3, H, W) or (N, 1, H, W), not {form}."
        raise ValueError(msg)
    check_image_size(tuple(images.shape[-2:]), source)
    check_region(images.shape[-2:], source.region)
    # anomalib's tv_tensors would wrap every intermediate result; and torch.export cannot follow as_subclass.
    plain = images.as_subclass(Tensor) if isinstance(images, TVTensor) else images
    # Convolutions are faster with the channels last.
    return within(plain.to(dtype), source.region).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def check_image_size(image_size: Sequence[int], source: Source, positions: int = 1) -> None:
    """Check that every level of the source covers the image exactly.

    Args:
        image_size: height and width in pixels.
        source: the network.
        positions: of the last level, per side, that the size in the error has at least.

    Raises:
        ValueError: if height or width is not a positive multiple of the source's stride.
    """
    stride = source.stride
    if any(side < stride or side % stride for side in image_size):
        fitting = tuple(max(round(side / stride), positions) * stride for side in image_size)
        msg = (
            f"image_size={tuple(image_size)}: height and width must be multiples of {stride}, the stride of source "
            f"{source.name!r} at {source.levels[-1].name}; for example {fitting}."
        )
        raise ValueError(msg)


def normalization_of(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the deviation of each channel, of images in [0, 1], that a source was trained with.

    Args:
        source: its name.

    Raises:
        ValueError: if timm does not have it, or does not say how it was trained.
    """
    name = timm_name_of(source)
    try:
        trained = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that timm does not have
        trained = None
    if trained is None:
        msg = (
            f"source={source!r}: timm {timm.__version__} does not say how its images were normalised in training. Use "
            "imagenet_normalization=false, or a pre_processor of your own."
        )
        raise ValueError(msg)
    return tuple(trained.mean), tuple(trained.std)
