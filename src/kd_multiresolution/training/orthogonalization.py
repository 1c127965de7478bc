"""Matrices whose singular values are all about one: the steps of Muon, of many matrices in one go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812
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
*_, OF_A_VECTOR = accumulate(POLYNOMIALS, lambda x, abc: x * (abc[0] + abc[1] * x**2 + abc[2] * x**4), initial=1.0)
"""What becomes of a single singular value."""
NOTHING = 1e-20  # a matrix whose numbers are all smaller; its quotients would not be numbers
SMALLEST_GRAM = 64  # rows; smaller Gram matrices are padded, so that there are few different sizes


def orthogonalized(matrices: list[Tensor], factors: Tensor | None = None) -> list[Tensor]:
    """Return matrices with their singular values near one (0.97 to 1.04), but for those of less than 0.3 % of the norm.

    Those of like size are taken together. One of a single row or column is divided by its norm.

    Args:
        matrices: (M_i, N_i), K of them, of any scale; float32 or wider, of one type and device. What is 1e-20 at most
            throughout becomes zero.
        factors: (K,), by which the results are multiplied; default: one.
    """
    largest = torch.stack(torch._foreach_norm(matrices, torch.inf))
    # Neither squares nor their sum can then leave the range. What is not a number stays so, and ends the training.
    inverse = largest.reciprocal().masked_fill_(largest <= NOTHING, 0)
    scaled = torch._foreach_mul(matrices, [*inverse.unbind()])
    each = (torch.ones_like(largest) if factors is None else factors).unbind()
    results: dict[int, Tensor] = {}
    if vectors := [i for i, matrix in enumerate(scaled) if 1 in matrix.shape]:
        results |= zip(vectors, _divided([scaled[i] for i in vectors], [each[i] for i in vectors]), strict=True)
    for size, by_shape in _by_size([matrix.shape for matrix in scaled]).items():
        stacks = [torch.stack([_wide(scaled[i]) for i in members]) for members in by_shape]
        grams = [_padded(stack @ stack.mT, size) for stack in stacks]
        products = _products(torch.cat(grams), torch.stack([each[i] for members in by_shape for i in members]))
        parts = torch.split(products, [len(stack) for stack in stacks])
        for members, stack, part in zip(by_shape, stacks, parts, strict=True):
            rows = stack.shape[1]
            for i, result in zip(members, (part[:, :rows, :rows] @ stack).unbind(), strict=True):
                results[i] = result if scaled[i].shape == result.shape else result.mT
    return [results[i] for i in range(len(scaled))]


def _by_size(shapes: Sequence[torch.Size]) -> dict[int, list[list[int]]]:
    """Return the indices of those that are no vectors, by the size of their Gram matrices, in lists of one shape."""
    groups: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for i, shape in enumerate(shapes):
        rows, columns = sorted(shape)
        if rows > 1:
            size = max(SMALLEST_GRAM, 1 << (rows - 1).bit_length())
            groups.setdefault(size, {}).setdefault((rows, columns), []).append(i)
    return {size: [*by_shape.values()] for size, by_shape in groups.items()}


def _divided(vectors: list[Tensor], factors: list[Tensor]) -> Sequence[Tensor]:
    norms = torch.stack(torch._foreach_norm(vectors)).clamp_min_(torch.finfo(vectors[0].dtype).tiny)
    return torch._foreach_mul(vectors, [*(torch.stack(factors) * (OF_A_VECTOR / norms)).unbind()])


def _products(grams: Tensor, factors: Tensor) -> Tensor:
    """Return by what to multiply matrices, from their products with their own transposes, (K, M, M), and (K,) factors.

    Every step multiplies by a polynomial of the Gram matrix, and those commute: the matrix itself is needed at the
    start and at the end alone.
    """
    squares = grams.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min_(torch.finfo(grams.dtype).tiny)  # of the norms
    gram = grams / squares[:, None, None]
    (a, b, c), *others = POLYNOMIALS
    step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the polynomial, but for a times the unit matrix
    product = step.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for following in others:
        half = torch.baddbmm(gram, step, gram, beta=a)
        gram = torch.baddbmm(half, half, step, beta=a)
        a, b, c = following
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, step, product, beta=a)
    return product * (squares.rsqrt_() * factors)[:, None, None]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _padded(grams: Tensor, size: int) -> Tensor:
    """Return (K, M, M) matrices with rows and columns of zeros, of which no product ever makes anything else there."""
    missing = size - grams.shape[-1]
    return F.pad(grams, (0, missing, 0, missing)) if missing else grams
