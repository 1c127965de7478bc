from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_multiresolution import discrepancy


def features(seed: int, images: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((images, 4, 6, 5), (images, 8, 3, 2))
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_example_of_equation_2() -> None:
    """Both cloners are equally far from the source, but only the second has its direction."""
    e = 0.7
    target, first, second = (
        torch.tensor(vector).reshape(1, 4, 1, 1)
        for vector in ([0.0, e, 0.0, 0.0], [0.0, 0.0, e, 0.0], [0.0, (math.sqrt(2) + 1) * e, 0.0, 0.0])
    )
    values = [discrepancy([target], [c], value_weight=1, terms="value").item() for c in (first, second)]
    assert values[0] == pytest.approx(values[1]) == pytest.approx(2 * e**2 / 4)
    directions = [discrepancy([target], [c], value_weight=1, terms="direction").item() for c in (first, second)]
    assert directions == pytest.approx([1.0, 0.0], abs=1e-6)


def test_terms_add_up() -> None:
    source, cloner = features(0), features(1)
    value = discrepancy(source, cloner, value_weight=0.3, terms="value")
    direction = discrepancy(source, cloner, value_weight=0.3, terms="direction")
    total = discrepancy(source, cloner, value_weight=0.3)
    torch.testing.assert_close(total, direction + 0.3 * value)
    torch.testing.assert_close(total, discrepancy(source, cloner, value_weight=0.3, terms=["direction", "value"]))


def test_zero_where_the_cloner_equals_the_source() -> None:
    same = discrepancy(features(0), features(0), value_weight=0.5)
    assert (same >= 0).all()
    torch.testing.assert_close(same, torch.zeros(3), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_finite_and_never_negative(images: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    source = features(seed, images, dtype)
    cloner = [f * scale for f in features(seed + 1, images, dtype)]
    scores = discrepancy(source, cloner, value_weight=0.5)
    assert scores.shape == (images,)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


def test_an_image_does_not_depend_on_the_others() -> None:
    source, cloner = features(0, 4), features(1, 4)
    together = discrepancy(source, cloner, value_weight=0.5)
    order = torch.tensor([2, 0, 3, 1])
    alone = [
        discrepancy([f[i : i + 1] for f in source], [f[i : i + 1] for f in cloner], value_weight=0.5) for i in order
    ]
    torch.testing.assert_close(torch.cat(alone), together[order])


def test_gradient() -> None:
    source = features(0, 2, torch.float64)
    cloner = [f.requires_grad_() for f in features(1, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *c: discrepancy(source, c, value_weight=0.5), cloner)


def test_gradient_of_a_black_image_is_finite() -> None:
    source = [torch.zeros(1, 2, 3, 3)]
    cloner = [torch.zeros(1, 2, 3, 3, requires_grad=True)]
    discrepancy(source, cloner, value_weight=0.5).sum().backward()
    assert torch.isfinite(cloner[0].grad).all()


@pytest.mark.parametrize(
    ("source", "cloner", "terms", "message"),
    [
        ([], [], "total", "non-empty"),
        ([torch.ones(1, 2, 3, 3)], [], "total", "equally long"),
        ([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 4)], "total", r"\(1, 2, 3, 4\)"),
        ([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)], "cosine", "terms='cosine'"),
        ([torch.ones(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)], (), r"terms=\(\)"),
    ],
)
def test_errors_name_the_argument(source: list[Tensor], cloner: list[Tensor], terms: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discrepancy(source, cloner, value_weight=1.0, terms=terms)
