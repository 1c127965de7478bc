"""The optimiser of both variants."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Return Adam for weights of any floating-point type, all of the same.

    Args:
        parameters: the weights.
        learning_rate: its rate.
    """
    weights = list(parameters)
    # Adam's own 1e-8 is zero in float16, where a weight with a small gradient would then be divided by zero.
    return torch.optim.Adam(weights, lr=learning_rate, eps=max(1e-8, torch.finfo(weights[0].dtype).tiny))
