from __future__ import annotations

import copy

import pytest
import torch
from captum.attr import GuidedBackprop, NoiseTunnel, Saliency
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolutionModel, discrepancy
from kd_multiresolution.paper.anomaly_map import scale_to_percentile
from kd_multiresolution.paper.attribution import guided_relu, input_gradient, smooth_grad


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
    model = KdMultiresolutionModel("small_vgg", seed=1).eval()
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


def test_chunks_change_nothing(network: nn.Module) -> None:
    images, sizes = torch.rand(5, 3, 6, 6), []

    def score(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return network(part)[:, 0]

    expected = input_gradient(score, images)
    assert sizes == [5]
    torch.testing.assert_close(input_gradient(score, images, chunk_size=2), expected)
    assert sizes == [5, 2, 2, 1]


# Guided backpropagation


class Score(nn.Module):
    """The model's score, with the cloner alone in captum's reach."""

    def __init__(self, model: KdMultiresolutionModel) -> None:
        super().__init__()
        self.cloner = copy.deepcopy(model.cloner)
        for module in self.cloner.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # captum's hooks want it so
        self.others = [model]

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self.others
        source = model.source(images if model.attribution_path == "both" else images.detach())
        return discrepancy(source[1:], self.cloner(images)[1:], value_weight=model.known_value_weight)


@pytest.mark.parametrize("path", ["both", "cloner"])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_guided_backprop_agrees_with_captum_on_the_whole_model(path: str) -> None:
    model = KdMultiresolutionModel("small_vgg", anomaly_map="guided_backprop", attribution_path=path, seed=1).eval()
    model.anomaly_map_generator = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    expected = GuidedBackprop(Score(model)).attribute(images.clone().requires_grad_())
    plain = Saliency(Score(model)).attribute(images.clone().requires_grad_(), abs=False)
    with torch.inference_mode():
        ours = model(images).anomaly_map
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)
    assert (ours - plain).abs().max() > 0.1 * plain.abs().max()
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_guided_relu_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 1.0], requires_grad=True)
    y = guided_relu(x)
    assert y.tolist() == [0.0, 0.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([1.0, 1.0, 2.0, -2.0]))
    assert gradient.tolist() == [0.0, 0.0, 2.0, 0.0]


# SmoothGrad


def cubes_gradient(images: Tensor) -> Tensor:
    """The gradient of the sum of cubes."""
    return 3 * images.square()


def test_smooth_grad_by_hand() -> None:
    # The mean of 3 (x + n)^2 is 3 x^2 + 3 deviation^2; the two images have the ranges 1 and 4.
    images = torch.rand(2, 1, 16, 16) * torch.tensor([0.5, 2.0])[:, None, None, None]
    images[:, :, 0, 0], images[:, :, 0, 1] = 0.0, torch.tensor([[1.0], [4.0]])
    ours = smooth_grad(cubes_gradient, images, samples=4000, noise=0.5)
    added = (ours - cubes_gradient(images)).mean((1, 2, 3))
    torch.testing.assert_close(added, 3 * torch.tensor([0.5, 2.0]).square(), rtol=0.02, atol=0)


def test_smooth_grad_agrees_with_captum() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 1)).eval()
    images = torch.rand(2, 3, 8, 8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0.0, 1.0  # captum wants one deviation for all

    def gradient(x: Tensor) -> Tensor:
        return input_gradient(lambda leaf: network(leaf)[:, 0], x)[1]

    ours, plain = smooth_grad(gradient, images, samples=2000, noise=0.8), gradient(images)
    tunnel = NoiseTunnel(Saliency(network))
    theirs = tunnel.attribute(
        images, nt_type="smoothgrad", nt_samples=2000, nt_samples_batch_size=500, stdevs=0.8, target=0, abs=False
    )
    # Two independent means of 2,000 draws: the noise they share with neither the gradient nor each other.
    spread = (ours - theirs).abs().max()
    assert spread < 0.1 * plain.abs().max()
    assert (ours - plain).abs().max() > 3 * spread


def test_smooth_grad_as_published() -> None:
    images = torch.rand(3, 3, 16, 16)
    images[0] = 0.25  # flat: no range, no noise
    ours = smooth_grad(cubes_gradient, images, samples=3, as_published=True, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = torch.zeros(3, 1, 16, 16)
    for _ in range(3):
        draw = torch.randn(3, 16, 16, generator=generator)
        for i, image in enumerate(images):
            span = float(image.max() - image.min())
            noisy = image + draw * (0.05 / span) ** 2 if span else image
            expected[i] += scale_to_percentile(cubes_gradient(noisy[None]).sum(1, keepdim=True))[0] / 3
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("as_published", [False, True])
def test_chunks_and_neighbours_change_nothing(as_published: bool) -> None:
    images = torch.rand(5, 3, 9, 7)
    sizes: list[int] = []

    def gradient(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.pow(3)

    def run(chunk_size: int, chosen: Tensor) -> Tensor:
        return smooth_grad(gradient, chosen, samples=7, noise=0.3, as_published=as_published, chunk_size=chunk_size)

    expected = run(1, images)
    for chunk_size in (1, 2, 5, 12, 100):
        sizes.clear()
        torch.testing.assert_close(run(chunk_size, images), expected)
        assert max(sizes) <= chunk_size
        assert sum(sizes) == 35
    torch.testing.assert_close(run(12, images[3:4]), expected[3:4])


def test_noise_has_a_seed_of_its_own() -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (smooth_grad(cubes_gradient, images, samples=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_smooth_grad_of_the_model_is_the_functions() -> None:
    arguments = {"smooth_grad_samples": 3, "smooth_grad_noise": 0.1, "seed": 4}
    plain, smooth = (
        KdMultiresolutionModel("small_vgg", anomaly_map=name, **arguments).eval()
        for name in ("gradient", "smooth_grad")
    )
    images = torch.rand(2, 3, 64, 64)

    def gradient(x: Tensor) -> Tensor:
        return input_gradient(plain._score, x)[1]

    mean = smooth_grad(gradient, images, samples=3, noise=0.1, seed=4)
    predictions = smooth(images)
    torch.testing.assert_close(predictions.anomaly_map, smooth.anomaly_map_generator(mean))
    torch.testing.assert_close(predictions.pred_score, plain(images).pred_score, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"chunk_size": 0}, {"noise": -0.1}, {"noise": float("nan")}])
def test_smooth_grad_errors_name_the_argument(arguments: dict[str, float]) -> None:
    ((name, number),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={number!r}: expected"):
        smooth_grad(cubes_gradient, torch.rand(1, 3, 8, 8), **arguments)
