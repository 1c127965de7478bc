"""Attribution of a score to the pixels of the input (Eq. 5 and Sec. 3.3.4 of arXiv 2011.11108)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kd_multiresolution.paper.anomaly_map import scale_to_percentile

CHUNK_SIZE = 32  # images whose graph is in memory at a time, as many as a batch of anomalib's


def input_gradient(
    score: Callable[[Tensor], Tensor], images: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Return each image's score and its gradient at the input, for a whole chunk of the batch in one backward pass.

    It works under ``torch.no_grad()`` and ``torch.inference_mode()``. Nothing is left behind: parameters get no
    gradient, there are no hooks, and the results are detached.

    Args:
        score: maps (N, C, H, W) images to (N,) scores; an image's score must not depend on the other images.
        images: (N, C, H, W), float; not changed.
        chunk_size: largest number of images that ``score`` gets at once; it bounds the memory.

    Returns:
        The scores (N,) and the gradients (N, C, H, W).

    Example:
        >>> input_gradient(lambda x: x.square().sum((1, 2, 3)), torch.full((1, 1, 1, 2), 3.0))
        (tensor([18.]), tensor([[[[6., 6.]]]]))
    """
    # Tensors made in inference mode cannot take part in autograd; and gradients of a mean over 100,000 activations are
    # too small for the half precision that autocast would compute them in.
    no_autocast = torch.autocast(images.device.type, enabled=False)
    scores: list[Tensor] = []
    gradients: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad(), no_autocast:
        for part in torch.split(images.detach(), chunk_size):
            leaf = part.clone().requires_grad_()
            of_part = score(leaf)
            gradients += torch.autograd.grad(of_part.sum(), leaf)
            scores.append(of_part.detach())
    return torch.cat(scores), torch.cat(gradients)


def smooth_grad(
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    samples: int = 50,
    noise: float = 0.05,
    as_published: bool = False,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
) -> Tensor:
    """Return the mean of the gradients at noisy copies of each image (SmoothGrad, Smilkov et al., arXiv 1706.03825).

    All images get the same noise, each scaled by its own range, so that an image's result depends neither on the other
    images nor on the chunks. The global random generator is not used.

    Args:
        gradient: maps (n, C, H, W) images to their gradients of the same shape.
        images: (N, C, H, W), float.
        samples: number of noisy copies, 1 or more.
        noise: standard deviation of the noise, as a fraction of the image's range (maximum minus minimum), >= 0.
        as_published: do as the paper's published code does: the deviation is ``(noise / range) ** 2``, and the mean is
            that of the maps after :func:`~kd_multiresolution.paper.anomaly_map.scale_to_percentile`, not of gradients.
        chunk_size: largest number of noisy images that ``gradient`` gets at once; it bounds the memory.
        seed: seed of the noise.

    Returns:
        (N, C, H, W), or as published (N, 1, H, W) in [0, 1]. A flat image, which has no range, gets no noise.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_smooth_grad(samples, noise, chunk_size)
    means = []
    for part in torch.split(images, chunk_size):
        span = part.amax((1, 2, 3), keepdim=True) - part.amin((1, 2, 3), keepdim=True)
        deviation = torch.where(span > 0, (noise / span) ** 2, 0.0) if as_published else noise * span
        # On the CPU, whatever the device, so that every device sees the same noise.
        generator = torch.Generator().manual_seed(seed)
        copies = max(chunk_size // max(len(part), 1), 1)
        total: Tensor | float = 0.0
        for start in range(0, samples, copies):
            draws = [torch.randn(part.shape[1:], generator=generator) for _ in range(min(copies, samples - start))]
            noisy = torch.cat([part + deviation * draw.to(part) for draw in draws])
            gradients = gradient(noisy)
            if as_published:
                gradients = scale_to_percentile(gradients.abs().sum(1, keepdim=True))
            total = total + gradients.reshape(len(draws), len(part), *gradients.shape[1:]).sum(0)
        means.append(cast("Tensor", total) / samples)
    return torch.cat(means)


def check_smooth_grad(samples: int, noise: float, chunk_size: int) -> None:
    """Check the arguments of :func:`smooth_grad`.

    Raises:
        ValueError: if one is out of range.
    """
    if samples < 1:
        msg = f"smooth_grad_samples={samples!r}: expected a number of noisy copies, 1 or more."
        raise ValueError(msg)
    if chunk_size < 1:
        msg = f"chunk_size={chunk_size!r}: expected a number of images, 1 or more."
        raise ValueError(msg)
    if not 0 <= noise < float("inf"):
        msg = f"smooth_grad_noise={noise!r}: expected a fraction of the image's range, 0 or more."
        raise ValueError(msg)


class _GuidedRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.where(y > 0, torch.relu(gradients[0]), 0.0)


def guided_relu(x: Tensor) -> Tensor:
    """Return ``relu(x)``; a negative gradient does not pass back through it (guided backpropagation, arXiv 1412.6806).

    Example:
        >>> x = torch.tensor([-1.0, 1.0, 1.0], requires_grad=True)
        >>> torch.autograd.grad(guided_relu(x), x, torch.tensor([1.0, 1.0, -1.0]))
        (tensor([0., 1., 0.]),)
    """
    return cast("Tensor", _GuidedRelu.apply(x))
