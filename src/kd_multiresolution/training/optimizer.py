"""The optimisers: Adam for weights of any type, and Muon without bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from kd_multiresolution.training.orthogonalization import orthogonalized

FUSED = ("cpu", "cuda", "xpu")  # devices with one kernel for all that Adam does to all weights
ROOT_MEAN_SQUARE = 0.2  # of a step, in units of the rate: what Adam's steps have (arXiv 2502.16982)


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Return Adam for weights of any floating-point type, all of the same.

    Args:
        parameters: the weights.
        learning_rate: its rate.
    """
    weights = list(parameters)
    device, dtype = weights[0].device.type, weights[0].dtype
    # In half precision the fused kernels take other steps.
    fused = device in FUSED and dtype in {torch.float32, torch.float64}
    # Adam's own 1e-8 is zero in float16, where a weight with a small gradient would then be divided by zero.
    optimizer = torch.optim.Adam(weights, lr=learning_rate, eps=max(1e-8, torch.finfo(dtype).tiny), fused=fused)
    # Fused kernels leave torch's counter of changes as it was, by which Derived knows that weights have moved.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(weights))
    return optimizer


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: all directions of a weight matrix move at the same pace (Jordan et al., 2024).

    The matrix of a convolution has a row per output channel; a bias is a matrix of one column. torch's and timm's Muon
    take one weight after another, and leave biases to another optimiser; torch's iterates in bfloat16, which takes
    longer than the rest of a step on processors without it. This one takes all weights together.

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
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((weight.device, weight.dtype), []).append(weight)
            for weights in alike.values():
                self._move(weights, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _move(self, weights: list[Tensor], rate: float, momentum: float, decay: float) -> None:
        """Move weights of one type and device, in a number of operators that hardly depends on theirs."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, dtype=_wide(weight))
        gradients = [cast("Tensor", weight.grad) for weight in weights]
        summed = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_mul_(summed, momentum)
        torch._foreach_add_(summed, gradients)
        matrices = [_matrix(tensor) for tensor in summed]
        moving = (torch.stack(torch._foreach_norm(gradients, torch.inf)) != 0).to(_wide(weights[0]))
        lengths = [-rate * ROOT_MEAN_SQUARE * max(matrix.shape) ** 0.5 for matrix in matrices]
        steps = orthogonalized(matrices, torch.stack(torch._foreach_mul([*moving.unbind()], lengths)))
        moved = [weight.to(moving.dtype) for weight in weights]  # half precision is rounded once, at the end
        torch._foreach_mul_(moved, [*torch.rsub(moving, 1, alpha=rate * decay).unbind()])
        torch._foreach_add_(moved, [_of_form(step, weight) for step, weight in zip(steps, weights, strict=True)])
        if moving.dtype != weights[0].dtype:
            torch._foreach_copy_(weights, moved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; torch alone would round the momentum to the type of the weights."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, weight in zip(indices, weights, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                self.state[weight]["momentum"] = saved["momentum"].to(weight.device, _wide(weight), copy=True)


def _matrix(weights: Tensor) -> Tensor:
    """Return a row per output channel, in the order in which a convolution's weights lie in memory (channels last)."""
    return weights.movedim(1, -1).flatten(1) if weights.ndim > 1 else weights[:, None]


def _of_form(matrix: Tensor, weights: Tensor) -> Tensor:
    """Return what :func:`_matrix` made of a tensor in the form of the weights."""
    return matrix.view_as(weights.movedim(1, -1)).movedim(-1, 1) if weights.ndim > 1 else matrix[:, 0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
