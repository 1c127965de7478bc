"""Attribution of a score to the pixels of the input (Eq. 5 and Sec. 3.3.4 of arXiv 2011.11108)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def input_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's score and its gradient at the input, for a whole batch in one backward pass.

    It works under ``torch.no_grad()`` and ``torch.inference_mode()``. Nothing is left behind: parameters get no
    gradient, there are no hooks, and the results are detached.

    Args:
        score: maps (N, C, H, W) images to (N,) scores; an image's score must not depend on the other images.
        images: (N, C, H, W), float; not changed.

    Returns:
        The scores (N,) and the gradients (N, C, H, W).

    Example:
        >>> input_gradient(lambda x: x.square().sum((1, 2, 3)), torch.full((1, 1, 1, 2), 3.0))
        (tensor([18.]), tensor([[[[6., 6.]]]]))
    """
    # Tensors made in inference mode cannot take part in autograd; and gradients of a mean over 100,000 activations are
    # too small for the half precision that autocast would compute them in.
    no_autocast = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(mode=False), torch.enable_grad(), no_autocast:
        leaf = images.detach().clone().requires_grad_()
        scores = score(leaf)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return scores.detach(), gradient
