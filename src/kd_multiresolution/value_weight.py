"""``value_weight="auto"``: the paper's rule for the factor of the value term (Sec. 3.1 of arXiv 2011.11108)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from kd_multiresolution.discrepancy import discrepancy_terms
from kd_multiresolution.torch_model import KdMultiresolutionModel

BATCHES = 4


def initial_value_weight(
    model: KdMultiresolutionModel, batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]
) -> float:
    """Return the ratio of the direction term to the value term on the first batches (below Eq. 4).

    The model and the global random generator stay as they are.

    Args:
        model: untrained.
        batches: training images, (N, 3, H, W) each.
        reduce: sums over all processes.

    Raises:
        ValueError: if the terms have no ratio.
    """
    cloner = copy.deepcopy(model.cloner).train()  # its batch norm's statistics will have moved
    sums = torch.zeros(2, device=next(cloner.parameters()).device)
    # The global random generator decides the order of the images; a look ahead must not change it.
    with torch.random.fork_rng(), torch.no_grad():
        for images in islice(batches, BATCHES):
            terms = discrepancy_terms(model.source(images), cloner(images))
            sums += torch.stack([terms["direction"].sum(), terms["value"].sum()])
    direction, value = reduce(sums).tolist()
    weight = direction / value if value > 0 else 0.0
    if not 0 < weight < float("inf"):
        msg = (
            f"value_weight='auto': the untrained cloner's errors are {direction} (direction) and {value} (value), "
            "which have no ratio. Check the training images, or give value_weight a number."
        )
        raise ValueError(msg)
    return weight
