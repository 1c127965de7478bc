"""The explicit backward pass against autograd."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolutionModel, discrepancy
from kd_multiresolution.paper.attribution import guided_relu
from kd_multiresolution.paper.backward import RecordedNetwork, discrepancy_gradient

SOURCES = {
    "small_vgg": None,
    "vgg11_bn": ["pool1", "pool2", "pool3"],
    "resnet18": ["layer1", "layer2"],
    "resnet26d": ["layer1", "layer2"],  # bottleneck, deep stem, average pools
    "resnext50_32x4d": ["layer1", "layer2"],  # groups
    "efficientnet_lite0": ["blocks.1", "blocks.2"],  # depthwise convolutions, TensorFlow's padding, ReLU6, joined norms
}


def model(source: str = "small_vgg", **arguments: object) -> KdMultiresolutionModel:
    arguments = {
        "pretrained": source in {"small_vgg", "efficientnet_lite0"},
        "critical_points": SOURCES.get(source),
        **arguments,
    }
    network = KdMultiresolutionModel(source, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # an untrained one does nothing
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return network


def pictures(height: int = 64, width: int = 96) -> Tensor:
    """One of noise; a grey, a black, a half black and a striped one, in which max pools have ties."""
    images = torch.rand(5, 3, height, width, generator=torch.Generator().manual_seed(1))
    images[1], images[2], images[3, :, :, width // 2 :] = 0.5, 0.0, 0.0
    images[4] = (torch.arange(width) // 4 % 2).float()
    return images


def assert_gradients_close(ours: Tensor, expected: Tensor) -> None:
    """To a few units in float32's last digit of each image's largest gradient."""
    error = (ours - expected).abs().amax((1, 2, 3))
    assert (error <= 2e-5 * expected.abs().amax((1, 2, 3)) + 1e-12).all(), error


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("part", ["source", "cloner"])
def test_networks_are_autograds(source: str, part: str) -> None:
    network = getattr(model(source), part)
    images = pictures().requires_grad_()
    features = network(images)
    gradients = [torch.randn(f.shape, generator=torch.Generator().manual_seed(2)) for f in features]
    (expected,) = torch.autograd.grad(features, images, gradients)
    recorded = RecordedNetwork(network)
    with torch.inference_mode():
        outputs, results = recorded.forward(images)
        ours = recorded.backward(results, gradients)
    for output, feature in zip(outputs, features, strict=True):
        torch.testing.assert_close(output, feature)
    assert_gradients_close(ours, expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 5), padding=(0, 2)),
        nn.Conv2d(4, 6, 1, stride=2, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, 7, stride=2, padding=3),
        nn.Conv2d(4, 6, 4, stride=3),
        nn.Conv2d(4, 6, 2, stride=4),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.MaxPool2d(2, stride=3),
        nn.AvgPool2d(2),
        Conv2dSame(4, 6, 3, stride=2),
        Conv2dSame(4, 4, 5, stride=2, groups=4),
        nn.ReLU6(),
        BatchNormAct2d(4, act_layer=nn.ReLU6),
        BatchNormAct2d(4, apply_act=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(12, 16), (13, 11)])
def test_layers_are_autograds(layer: nn.Module, size: tuple[int, int]) -> None:
    # Few values, so that windows of max pools are full of ties.
    images = torch.randint(0, 3, (2, 4, *size), generator=torch.Generator().manual_seed(0)).double() * 4
    images.requires_grad_()
    layer = copy.deepcopy(layer).double().eval()
    output = layer(images)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    (expected,) = torch.autograd.grad(output, images, gradient)
    recorded = RecordedNetwork(Listed(layer))
    _, results = recorded.forward(images.detach())
    torch.testing.assert_close(recorded.backward(results, [gradient]), expected)


class Listed(nn.Module):
    """A layer whose output is a list, as a source's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layer(images)]


@pytest.mark.parametrize(
    "layer", [MaxPool2dSame(3, stride=2), BatchNormAct2d(4, act_layer=nn.Hardswish), StdConv2d(4, 4, 3)], ids=str
)
def test_what_computes_something_else_than_its_base_class_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has no backward rule|cannot be recorded"):
        RecordedNetwork(Listed(layer.eval()))


def test_max_pool_by_hand() -> None:
    images = torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 0.0, 2.0, 2.0]])[None, None]
    recorded = RecordedNetwork(Listed(nn.MaxPool2d(2)))
    _, results = recorded.forward(images)
    ours = recorded.backward(results, [torch.tensor([[[[3.0, 5.0]]]])])
    assert ours.tolist() == [[[[3.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]]]]


@pytest.mark.parametrize("terms", ["total", "value", "direction"])
def test_discrepancy_gradient_is_autograds(terms: str) -> None:
    generator = torch.Generator().manual_seed(0)
    source, cloner = (
        [torch.rand(3, c, h, 4, generator=generator, dtype=torch.double).requires_grad_() for c, h in ((5, 4), (7, 2))]
        for _ in range(2)
    )
    score = discrepancy(source, cloner, value_weight=0.3, terms=terms)
    expected = torch.autograd.grad(score.sum(), [*source, *cloner])
    at_source, at_cloner = discrepancy_gradient(source, cloner, value_weight=0.3, terms=terms)
    torch.testing.assert_close([*at_source, *at_cloner], list(expected))


def test_discrepancy_gradient_is_finite_at_zero_and_zero_where_both_agree() -> None:
    feature = torch.rand(2, 3, 4, 4)
    feature[1] = 0
    for gradients in discrepancy_gradient([feature], [feature.clone()], value_weight=0.5):
        assert gradients[0].abs().max() <= 1e-7


@pytest.mark.parametrize("source", ["small_vgg", "resnet18"])
@pytest.mark.parametrize("path", ["both", "cloner"])
@pytest.mark.parametrize("anomaly_map", ["gradient", "guided_backprop", "smooth_grad"])
def test_model_gives_autograds_scores_and_maps(source: str, path: str, anomaly_map: str) -> None:
    arguments = {"anomaly_map": anomaly_map, "attribution_path": path, "smooth_grad_samples": 2}
    images = pictures()[[0, 1, 3]]
    expected = model(source, **arguments)(images)
    network = model(source, **arguments, explicit_backward=True)
    with torch.inference_mode():
        ours = network(images)
    torch.testing.assert_close(ours.pred_score, expected.pred_score)
    assert_gradients_close(ours.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("explicit_backward", [False, True])
@pytest.mark.parametrize(("anomaly_map", "sizes"), [("gradient", [2, 2, 1]), ("smooth_grad", [5, *[2] * 7, 1])])
def test_a_batch_is_taken_in_chunks(explicit_backward: bool, anomaly_map: str, sizes: list[int]) -> None:
    arguments = {"anomaly_map": anomaly_map, "smooth_grad_samples": 3, "explicit_backward": explicit_backward}
    network, images, seen = model(**arguments, chunk_size=2), pictures(), []
    expected = model(**arguments)(images)
    first = next(module for module in network.cloner.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    ours = network(images)
    assert seen == sizes
    torch.testing.assert_close(ours.pred_score, expected.pred_score)
    assert_gradients_close(ours.anomaly_map, expected.anomaly_map)


def test_half_precision_does_not_reach_the_gradient() -> None:
    network, images = model(explicit_backward=True), pictures()
    expected = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = network(images)
    assert torch.equal(ours.anomaly_map, expected.anomaly_map)


def test_guided_rule_is_the_autograd_functions() -> None:
    cloner = model().cloner
    recorded = RecordedNetwork(cloner)
    images = pictures().requires_grad_()
    features, _ = recorded.forward(images, rectify=guided_relu)
    gradients = [torch.randn_like(f) for f in features]
    (expected,) = torch.autograd.grad(features, images, gradients)
    _, results = recorded.forward(images.detach())
    assert_gradients_close(recorded.backward(results, gradients, guided=True), expected)
    plain = recorded.backward(results, gradients)
    assert (plain - expected).abs().max() > 0.1 * expected.abs().max()


def test_recording_leaves_the_state_and_is_copied_and_saved_with_the_model() -> None:
    network, images = model(explicit_backward=True), pictures()
    names = list(network.state_dict())
    before = network(images)
    assert list(network.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(network), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images).anomaly_map, before.anomaly_map)
        with torch.no_grad():
            for parameter in other.cloner.parameters():
                parameter.mul_(0.5)
        assert not torch.allclose(other(images).anomaly_map, before.anomaly_map)
    assert torch.equal(network(images).anomaly_map, before.anomaly_map)


def test_source_without_rules_is_refused_with_the_ways_out() -> None:
    arguments = {"pretrained": False, "critical_points": ["blocks.0", "blocks.1"]}
    found, ways_out = "model.bn1, BatchNormAct2d, has no backward rule", ".*attribution_path='cloner'.*'discrepancy'"
    with pytest.raises(ValueError, match=f"source='efficientnet_b0'.*{found}{ways_out}"):
        model("efficientnet_b0", **arguments, explicit_backward=True)
    network = model("efficientnet_b0", **arguments, attribution_path="cloner")
    expected = network(pictures())
    network.explicit_backward = True
    assert_gradients_close(network(pictures()).anomaly_map, expected.anomaly_map)
