"""The optimisers: Adam for weights of any type, and Muon without bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the odd quintic polynomials that take every singular value between about 0.002 and 1 to about 1, one after another;
# found by You Jiacheng for Muon's Newton-Schulz iteration, and the default of timm's.
POLYNOMIALS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
NOTHING = 1e-20  # a gradient whose numbers are all smaller; its quotients would not be numbers
ROOT_MEAN_SQUARE = 0.2  # of a step, in units of the rate: what Adam's steps have (arXiv 2502.16982)


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Return Adam for weights of any floating-point type, all of the same.

    Args:
        parameters: the weights.
        learning_rate: its rate.
    """
    weights = list(parameters)
    # Adam's own 1e-8 is zero in float16, where a weight with a small gradient would then be divided by zero.
    return torch.optim.Adam(weights, lr=learning_rate, eps=max(1e-8, torch.finfo(weights[0].dtype).tiny))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: all directions of a weight matrix move at the same pace (Jordan et al., 2024).

    The matrix of a convolution has a row per output channel; a bias is a matrix of one column. torch's and timm's Muon
    iterate in bfloat16, which takes longer than the rest of a step on processors without it; this one iterates on the
    small Gram matrix, in float32.

    Args:
        parameters: the weights.
        lr: a step has a root mean square of 0.2 times this.
        momentum: the earlier gradients' share in the sum that is orthogonalised.
        weight_decay: every step multiplies a weight by 1 - lr * weight_decay.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; return what the closure returns, which computes the gradients.

        A weight without a gradient, or whose gradient is zero, stays: its momentum alone would move it by a whole step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight, dtype=_wide(weight))
                summed = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                direction = orthogonalized(_matrix(summed))
                length = group["lr"] * ROOT_MEAN_SQUARE * max(direction.shape) ** 0.5
                matrix = _matrix(weight)
                kept = (1 - group["lr"] * group["weight_decay"]) * matrix.to(direction.dtype)
                moved = kept.sub_(direction, alpha=length)  # in the wider type: rounded once
                moved = torch.where(weight.grad.abs().amax() == 0, matrix, moved)
                weight.copy_(moved.view_as(weight.movedim(1, -1)).movedim(-1, 1) if weight.ndim > 1 else moved[:, 0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; torch alone would round the momentum to the type of the weights."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, weight in zip(indices, weights, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                self.state[weight]["momentum"] = saved["momentum"].to(weight.device, _wide(weight), copy=True)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values near one (0.97 to 1.04), but for those of less than 0.3 % of its norm.

    Args:
        matrix: (M, N), of any scale; what is 1e-20 at most throughout becomes zero.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    largest = x.abs().amax()
    # Neither squares nor their sum can then leave the range. What is not a number stays so, and ends the training.
    x = x * torch.where(largest <= NOTHING, 0.0, 1 / largest)
    # Every step multiplies by a polynomial of x xᵀ, and those commute: x itself is needed at the start and at the end.
    gram = x @ x.mT
    square = gram.trace().clamp_min(torch.finfo(x.dtype).tiny)  # of the norm
    gram = gram / square
    first, *others = POLYNOMIALS
    product = step = _polynomial(gram, *first)
    for coefficients in others:
        gram = step @ gram @ step
        step = _polynomial(gram, *coefficients)
        product = step @ product
    x = torch.mm(product * square.rsqrt(), x)
    return x if wide else x.mT


def _matrix(weights: Tensor) -> Tensor:
    """Return a row per output channel, in the order in which a convolution's weights lie in memory (channels last)."""
    return weights.movedim(1, -1).flatten(1) if weights.ndim > 1 else weights[:, None]


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal().add_(a)
    return polynomial


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
