"""The factor of the value term, and ``auto``, the paper's rule for it (Sec. 3.1 of arXiv 2011.11108)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from kd_multiresolution.paper.cloner import Cloner
from kd_multiresolution.paper.discrepancy import discrepancy_terms

BATCHES = 4


def initial_value_weight(
    source: Callable[[Tensor], Sequence[Tensor]],
    cloner: Cloner,
    batches: Iterable[Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> float:
    """Return the ratio of the direction term to the value term on the first batches (below Eq. 4).

    The cloner and the global random generator stay as they are.

    Args:
        source: returns the features that the cloner has to imitate, one tensor per critical point.
        cloner: the untrained cloner.
        batches: training images, (N, 3, H, W) each.
        reduce: sums over all processes.

    Raises:
        ValueError: if the terms have no ratio.
    """
    untrained = copy.deepcopy(cloner).train()  # its batch norm's statistics will have moved
    sums = torch.zeros(2, device=next(untrained.parameters()).device)
    # The random generators decide the order of the images; a look ahead must not change it.
    generators = [sums.device] if sums.device.type == "cuda" else []
    with torch.random.fork_rng(generators), torch.no_grad():
        for images in islice(batches, BATCHES):
            terms = discrepancy_terms(source(images), untrained(images))
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


def checked_value_weight(value_weight: float | str) -> float | None:
    """Return the weight as a number, or ``None`` while ``auto`` has not found it.

    Raises:
        ValueError: if it is neither.
    """
    if value_weight == "auto":
        return None
    if isinstance(value_weight, str) or not 0 < value_weight < float("inf"):
        msg = f"value_weight={value_weight!r}: expected a number above 0, or 'auto'."
        raise ValueError(msg)
    return float(value_weight)
