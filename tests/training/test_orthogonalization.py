"""Matrices whose singular values are about one: alone as together, whatever their shapes and scales."""

from __future__ import annotations

import pytest
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

from kd_multiresolution.training.orthogonalization import POLYNOMIALS, orthogonalized

SHAPES = [(32, 64), (128, 1152), (256, 128), (128, 256), (24, 216), (64, 1), (1, 64), (1, 1), (7, 7), (2048, 64)]


@pytest.mark.parametrize("shape", [(32, 64), (128, 1152), (256, 128), (64, 1), (1, 64)])
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1.0, 1e30])
def test_singular_values_come_near_one(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(0)
    (result,) = orthogonalized([scale * torch.randn(shape)])
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.97
    assert values.max() < 1.04


def iterated(matrix: Tensor) -> Tensor:
    """Return what timm makes of a matrix by the same polynomials, in the type of the matrix."""
    return zeropower_via_newtonschulz(matrix, len(POLYNOMIALS), [*POLYNOMIALS], dtype=matrix.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-12)])
def test_each_of_many_is_that_of_the_iteration_on_the_whole_matrix(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    matrices = [10.0**i * torch.randn(shape, dtype=dtype) for i, shape in enumerate(SHAPES)]
    factors = torch.randn(len(SHAPES), dtype=dtype)
    for found, matrix, factor in zip(orthogonalized(matrices, factors), matrices, factors, strict=True):
        torch.testing.assert_close(found, factor * iterated(matrix), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-40])
@pytest.mark.parametrize("shape", [(3, 5), (1, 5)])
def test_nothing_stays_nothing(scale: float, shape: tuple[int, int]) -> None:
    something, nothing = orthogonalized([torch.eye(*shape), scale * torch.ones(shape)])
    assert torch.equal(nothing, torch.zeros(shape))
    assert something.isfinite().all()


@pytest.mark.parametrize("matrix", [torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), torch.tensor([[float("nan"), 1]])])
def test_what_is_not_a_number_stays_so(matrix: Tensor) -> None:
    assert orthogonalized([matrix])[0].isnan().any()
