"""What the cloners learn: the squared error of standardised features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel

LOCAL_SHARE = 4  # the local cloner learns from one in so many images: each has many positions, which it sees one by one


def cloner_losses(model: KdMultiresolutionDualModel, features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error of either cloner on standardised features, summed over the predicted levels.

    The local cloner's is that of the first quarter of the images, a random one, rounded up.

    Args:
        model: the model; gradients reach its cloners.
        features: the source's, (N, C_i, H_i, W_i) per critical point.
    """
    some = [level[: -(-len(level) // LOCAL_SHARE)] for level in features]
    cloners = {"local": (model.local_cloner, some), "global": (model.global_cloner, features)}
    losses = {}
    for name, (cloner, targets) in cloners.items():
        levels = zip(targets[1:], cloner(targets, model.levels_units), model.levels_units[1:], strict=True)
        losses[name] = torch.stack(
            [_mean_square((ours - source) * (1 / units.deviation)[:, None, None]) for source, ours, units in levels]
        ).sum()
    return losses


def _mean_square(difference: Tensor) -> Tensor:
    # A norm reads the numbers once, and its gradient is made in one pass, too: half the time of square and mean.
    root: Tensor = torch.linalg.vector_norm(difference) / difference.numel() ** 0.5
    return root.square()
