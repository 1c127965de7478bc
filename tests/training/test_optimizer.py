"""Muon: what it does to a matrix, and that it learns, whatever the type of the weights; scores follow every step."""

from __future__ import annotations

import pytest
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn

from kd_multiresolution.dual.loss import cloner_losses
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.paper.discrepancy import discrepancy
from kd_multiresolution.paper.torch_model import KdMultiresolutionModel
from kd_multiresolution.training.optimizer import Muon, adam
from kd_multiresolution.training.orthogonalization import POLYNOMIALS
from operators import WAITING, operators


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


def one_by_one(weights: list[Tensor], summed: list[Tensor], rate: float, decay: float) -> None:
    """Do a step of Muon on one weight after another, as plainly as it can be written."""
    for weight, momentum in zip(weights, summed, strict=True):
        momentum.mul_(0.95).add_(weight.grad)
        matrix = momentum.movedim(1, -1).flatten(1) if weight.ndim > 1 else momentum[:, None]
        step = zeropower_via_newtonschulz(matrix, len(POLYNOMIALS), [*POLYNOMIALS], dtype=torch.float32)
        step = step * 0.2 * rate * max(matrix.shape) ** 0.5
        step = step.view_as(weight.movedim(1, -1)).movedim(-1, 1) if weight.ndim > 1 else step[:, 0]
        weight.data.mul_(1 - rate * decay).sub_(step)


def cloner_weights(model: KdMultiresolutionDualModel) -> list[Tensor]:
    return [*model.local_cloner.parameters(), *model.global_cloner.parameters()]


def test_a_training_has_the_losses_of_one_weight_after_another() -> None:
    ours, theirs = (KdMultiresolutionDualModel("resnet18", pretrained=False) for _ in range(2))
    optimizer = Muon(cloner_weights(ours), lr=0.004, weight_decay=1.0)
    summed = [torch.zeros_like(weight) for weight in cloner_weights(theirs)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        features = ours.source(torch.rand(2, 3, 64, 64, generator=generator))
        losses = []
        for model in (ours, theirs):
            loss = torch.stack([*cloner_losses(model, features).values()]).sum()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        one_by_one(cloner_weights(theirs), summed, 0.004, 1.0)
        for model in (ours, theirs):
            model.zero_grad()
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_step_of_the_dual_model_takes_few_operators_and_waits_for_none() -> None:
    model = KdMultiresolutionDualModel("resnet18", pretrained=False).train()
    optimizer = Muon(cloner_weights(model), lr=0.004, weight_decay=1.0)
    features = model.source(torch.rand(2, 3, 64, 64))

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([*cloner_losses(model, features).values()]).sum().backward()
        optimizer.step()

    found = operators(step)
    assert found[WAITING] == 0
    assert found.total() <= 450


def test_scores_follow_the_steps_of_a_model_that_stays_in_evaluation_mode() -> None:
    """As with batch norm that is kept as it is. Fused kernels do not tell torch that they have changed a weight."""
    network = KdMultiresolutionModel("small_vgg", anomaly_map=None).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = adam(network.cloner.parameters(), 1e-3)
    for _ in range(3):
        source, cloner = network.features(images)
        torch.testing.assert_close(network(images).pred_score, discrepancy(source[1:], cloner[1:], value_weight=0.5))
        optimizer.zero_grad()
        discrepancy(source, cloner, value_weight=0.5).mean().backward()
        optimizer.step()
