"""The discrepancy of source and cloner (Eqs. 1, 3 and 4 of arXiv 2011.11108), per image.

Its mean over a batch is the training loss, itself the anomaly score, its gradient at the input the anomaly map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TERMS = ("value", "direction")


def normalize_terms(terms: str | Sequence[str]) -> tuple[str, ...]:
    """Return the terms in canonical order: ``("value", "direction")`` or one of the two.

    Args:
        terms: ``"total"`` (both), ``"value"``, ``"direction"``, or a sequence of the last two.

    Raises:
        ValueError: if there is none, or one that does not exist.
    """
    names = (terms,) if isinstance(terms, str) else tuple(terms)
    if names == ("total",):
        return TERMS
    if not names or not set(names) <= set(TERMS):
        msg = f"terms={terms!r}: expected 'total', 'value', 'direction' or a list of the last two."
        raise ValueError(msg)
    return tuple(term for term in TERMS if term in names)


def value(source_features: Sequence[Tensor], cloner_features: Sequence[Tensor]) -> Tensor:
    """Sum over critical points of the mean squared difference of all activations (Eq. 1), (N,), >= 0."""
    points = zip(source_features, cloner_features, strict=True)
    return torch.stack([(s - c).square().mean((1, 2, 3)) for s, c in points]).sum(0)


def direction(source_features: Sequence[Tensor], cloner_features: Sequence[Tensor]) -> Tensor:
    """Sum over critical points of 1 - cosine, each (C, H, W) block being one vector (Eq. 3), (N,), >= 0.

    Eq. 3 writes one minus the sum of cosines, which is the same up to a constant.
    """
    points = zip(source_features, cloner_features, strict=True)
    cosines = torch.stack([F.cosine_similarity(s.flatten(1), c.flatten(1), dim=1) for s, c in points])
    # Rounding can put the cosine of equal vectors a little above one.
    return (1 - cosines).clamp_min(0).sum(0)


def discrepancy_terms(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    terms: str | Sequence[str] = TERMS,
) -> dict[str, Tensor]:
    """Return the terms by name, each (N,), float32 or wider, unweighted.

    Args:
        source_features: the source's activations, one (N, C_i, H_i, W_i) tensor per critical point.
        cloner_features: the cloner's, of the same shapes.
        terms: see :func:`discrepancy`.

    Raises:
        ValueError: if the sequences are empty or differ in length or shape, or a term does not exist.
    """
    names = normalize_terms(terms)
    source, cloner = checked_features(source_features, cloner_features)
    functions = {"value": value, "direction": direction}
    return {name: functions[name](source, cloner) for name in names}


def checked_features(
    source_features: Sequence[Tensor], cloner_features: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return both in float32 or wider: sums over 100,000 activations lose their digits in half precision."""
    source_shapes, cloner_shapes = ([tuple(f.shape) for f in fs] for fs in (source_features, cloner_features))
    if not source_shapes or source_shapes != cloner_shapes:
        msg = (
            f"source_features {source_shapes} and cloner_features {cloner_shapes}: "
            "expected two equally long, non-empty sequences of tensors of the same shapes, (N, C_i, H_i, W_i)."
        )
        raise ValueError(msg)
    return wide(source_features), wide(cloner_features)


def wide(levels: Iterable[Tensor]) -> list[Tensor]:
    """Return features in float32 at least: half precision loses small errors and the squares of large ones."""
    return [level if level.dtype in {torch.float32, torch.float64} else level.float() for level in levels]


def weighted_sum(terms: Mapping[str, Tensor], value_weight: float | Tensor) -> Tensor:
    """Return direction + value_weight * value (Eq. 4), or the only term as it is.

    The weight balances the two terms; a term that stands alone has nothing to be balanced against.
    """
    if len(terms) == 1:
        return next(iter(terms.values()))
    return terms["direction"] + value_weight * terms["value"]


def discrepancy(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    *,
    value_weight: float | Tensor,
    terms: str | Sequence[str] = TERMS,
) -> Tensor:
    """Return one number per image: how far the cloner is from the source at the critical points.

    Args:
        source_features: the source's activations, one (N, C_i, H_i, W_i) tensor per critical point.
        cloner_features: the cloner's, of the same shapes.
        value_weight: factor of the value term; 1 / lambda of the paper's Eq. 4, up to the overall scale. Not used
            when a term stands alone.
        terms: ``"total"`` or ``("value", "direction")`` for both, ``"value"``, ``"direction"``.

    Returns:
        (N,), >= 0. An image's number does not depend on the other images.

    Raises:
        ValueError: if the sequences are empty or differ in length or shape, or a term does not exist.

    Example:
        >>> a = torch.tensor([0.0, 1.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
        >>> b = torch.tensor([0.0, 3.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
        >>> discrepancy([a], [b], value_weight=0.5)  # same direction, squared distance 4 over 4 activations
        tensor([0.5000])
    """
    return weighted_sum(discrepancy_terms(source_features, cloner_features, terms), value_weight)


def local_value(source: Tensor, cloner: Tensor) -> Tensor:
    """Mean over channels of the squared difference at each position: (N, C, H, W) twice to (N, 1, H, W), >= 0."""
    return (source - cloner).square().mean(1, keepdim=True)


def local_direction(source: Tensor, cloner: Tensor) -> Tensor:
    """One minus the cosine of the channels at each position: (N, C, H, W) twice to (N, 1, H, W), in [0, 2]."""
    norms: list[Tensor] = [torch.linalg.vector_norm(features, dim=1, keepdim=True) for features in (source, cloner)]
    eps = 1e-8  # as torch's cosine_similarity
    cosine = (source * cloner).sum(1, keepdim=True) / (norms[0].clamp_min(eps) * norms[1].clamp_min(eps))
    # Half the squared distance of the unit vectors. A zero vector has no direction: it is at 1/2 from every other, and
    # at 0 from another zero vector, as behind a ReLU on a flat image.
    present = torch.stack([norm >= eps for norm in norms]).to(cosine.dtype).sum(0)
    return (present / 2 - cosine).clamp_min(0)


def local_discrepancy(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    *,
    value_weight: float | Tensor,
    terms: str | Sequence[str] = TERMS,
) -> list[Tensor]:
    """Return the discrepancy at each position of each critical point, channels being one vector.

    Args:
        source_features: as :func:`discrepancy`.
        cloner_features: as :func:`discrepancy`.
        value_weight: as :func:`discrepancy`.
        terms: as :func:`discrepancy`.

    Returns:
        One (N, 1, H_i, W_i) tensor per critical point, >= 0; zero where source and cloner agree.

    Raises:
        ValueError: as :func:`discrepancy`.
    """
    names = normalize_terms(terms)
    points = zip(*checked_features(source_features, cloner_features), strict=True)
    functions = {"value": local_value, "direction": local_direction}
    return [weighted_sum({name: functions[name](s, c) for name in names}, value_weight) for s, c in points]
