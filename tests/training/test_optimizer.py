"""Muon: what it does to a matrix, and that it learns, whatever the type of the weights."""

from __future__ import annotations

import pytest
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn

from kd_multiresolution.training.optimizer import POLYNOMIALS, Muon, orthogonalized


@pytest.mark.parametrize("shape", [(32, 64), (128, 1152), (256, 128), (64, 1), (1, 64)])
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1.0, 1e30])
def test_singular_values_come_near_one(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(scale * torch.randn(shape)))
    assert values.min() > 0.97
    assert values.max() < 1.04


@pytest.mark.parametrize("shape", [(32, 64), (256, 128)])
def test_agrees_with_the_iteration_on_the_whole_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = zeropower_via_newtonschulz(matrix, len(POLYNOMIALS), [*POLYNOMIALS], dtype=torch.float32)
    assert torch.allclose(orthogonalized(matrix), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-40])
def test_nothing_stays_nothing(scale: float) -> None:
    assert torch.equal(orthogonalized(scale * torch.ones(3, 5)), torch.zeros(3, 5))


def test_what_is_not_a_number_stays_so() -> None:
    assert orthogonalized(torch.tensor([[1.0, float("nan")], [2.0, 3.0]])).isnan().any()


@pytest.mark.parametrize(("rate", "decay"), [(0.01, 0.5), (0.1, 2.0)])
def test_steps_are_those_of_the_singular_vectors_of_the_summed_gradients(rate: float, decay: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    expected, summed = weight.detach().double(), torch.zeros(6, 8, dtype=torch.float64)
    optimizer = Muon([weight], lr=rate, momentum=0.9, weight_decay=decay)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        summed = 0.9 * summed + weight.grad
        left, _, right = torch.linalg.svd(summed, full_matrices=False)
        expected = (1 - rate * decay) * expected - rate * 0.2 * 8**0.5 * left @ right
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=rate * 0.2 * 8**0.5 * 0.05)


def test_a_weight_whose_gradient_has_gone_stays_where_it_is() -> None:
    """As behind a ReLU that has died, or in a batch of held-out images alone."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([weight], lr=0.01, weight_decay=0.5)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    for _ in range(1400):
        optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def test_a_step_has_the_size_that_the_rate_says_and_decay_takes_its_share() -> None:
    torch.manual_seed(0)
    weight, bias, unused = (nn.Parameter(torch.randn(shape)) for shape in ((16, 8, 3, 3), (16,), (2,)))
    before = [weight.detach().clone(), bias.detach().clone(), unused.detach().clone()]
    optimizer = Muon([weight, bias, unused], lr=0.01, weight_decay=0.5)
    weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
    optimizer.step()
    for now, then in ((weight, before[0]), (bias, before[1])):
        step = now - (1 - 0.01 * 0.5) * then
        assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.05)
        assert (step * now.grad).sum() < 0
    assert torch.equal(unused, before[2]), "no gradient, no step"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_learns_a_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    target = nn.Conv2d(3, 4, 3)(images).detach()
    layer = nn.Conv2d(3, 4, 3).to(dtype)
    optimizer = Muon(layer.parameters(), lr=0.02)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (layer(images.to(dtype)).float() - target).square().mean()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_resumed_optimizer_steps_as_an_uninterrupted_one(dtype: torch.dtype) -> None:
    def steps(layer: nn.Linear, optimizer: Muon, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.ones(1, 4, dtype=dtype)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole, resumed = nn.Linear(4, 3).to(dtype), nn.Linear(4, 3).to(dtype)
    resumed.load_state_dict(whole.state_dict())
    optimizers = [Muon(layer.parameters(), lr=0.01, weight_decay=0.1) for layer in (whole, resumed)]
    steps(whole, optimizers[0], 4)
    steps(resumed, optimizers[1], 2)
    again = Muon(resumed.parameters(), lr=1.0)
    again.load_state_dict(optimizers[1].state_dict())
    steps(resumed, again, 2)
    assert torch.equal(whole.weight, resumed.weight)
