from __future__ import annotations

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolutionModel
from kd_multiresolution.attribution import input_gradient


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1)).eval()


def test_by_hand() -> None:
    images = torch.tensor([[[[1.0, -2.0]]], [[[3.0, 4.0]]]])
    scores, gradient = input_gradient(lambda x: x.pow(3).sum((1, 2, 3)), images)
    assert scores.tolist() == [-7.0, 91.0]
    assert gradient.tolist() == [[[[3.0, 12.0]]], [[[27.0, 48.0]]]]


def test_agrees_with_captum(network: nn.Module) -> None:
    images = torch.rand(3, 3, 6, 6)
    network(images)
    _, gradient = input_gradient(lambda x: network(x)[:, 0], images)
    torch.testing.assert_close(gradient, Saliency(network).attribute(images.clone(), target=0, abs=False))


def test_agrees_with_captum_on_the_whole_model() -> None:
    model = KdMultiresolutionModel("light_vgg", seed=1).eval()
    model.anomaly_map_generator = nn.Identity()
    images = torch.rand(2, 3, 64, 64)

    def score(x: Tensor) -> Tensor:
        return model._score(x)

    expected = Saliency(score).attribute(images.clone().requires_grad_(), abs=False)
    torch.testing.assert_close(model(images).anomaly_map.as_subclass(Tensor), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_context_and_leaves_nothing_behind(network: nn.Module, context: type) -> None:
    reference = torch.rand(2, 3, 6, 6)
    network(reference)
    expected = input_gradient(lambda x: network(x)[:, 0], reference)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with context():
        images = reference.clone()
        scores, gradient = input_gradient(lambda x: network(x)[:, 0], images)
    assert torch.equal(scores, expected[0])
    assert torch.equal(gradient, expected[1])
    assert not scores.requires_grad
    assert not gradient.requires_grad
    assert not images.requires_grad
    assert torch.equal(images, reference)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
