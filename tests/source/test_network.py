from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from kd_multiresolution.source.network import Source


@pytest.fixture(scope="module")
def resnet() -> Source:
    return Source("resnet18.tv_in1k", pretrained=False, critical_points=["layer2", "layer1"], seed=3)


def test_vgg16_has_the_papers_critical_points() -> None:
    source = Source("vgg16.tv_in1k", pretrained=False)
    assert source.critical_points == ("pool2", "pool3", "pool4", "pool5")
    assert [level.channels for level in source.levels] == [64, 128, 256, 512, 512]
    assert [level.convolutions for level in source.levels] == [2, 2, 3, 3, 3]
    assert [level.stride for level in source.levels] == [2, 4, 8, 16, 32]
    images = torch.rand(1, 3, 64, 96)
    features = source(images)
    assert [tuple(f.shape) for f in features] == [(1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 512, 2, 3)]
    assert not any("pre_logits" in name for name, _ in source.named_parameters()), "the classifier must be gone"


def test_features_are_those_of_the_network(resnet: Source, tmp_path: Path) -> None:
    """Independent reference: timm's own forward, layer by layer, with the same weights."""
    network = timm.create_model("resnet18").eval()
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    source = Source("resnet18", weights=file, critical_points=["layer1", "layer3"])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        x = network.maxpool(network.act1(network.bn1(network.conv1(images))))
        expected = [x := network.layer1(x), network.layer3(network.layer2(x))]
        for ours, theirs in zip(source(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "points"),
    [("efficientnet_b0", "blocks.4"), ("convnext_atto", "stages.3"), ("regnety_002", "s4"), ("vgg11_bn", "pool5")],
)
def test_other_backbones(name: str, points: str) -> None:
    source = Source(name, pretrained=False)
    features = source(torch.rand(1, 3, 64, 128))
    critical = [level for level in source.levels if level.critical]
    assert source.critical_points[-1] == points or name == "efficientnet_b0"
    for level, feature in zip(critical, features, strict=True):
        assert feature.shape[1:] == (level.channels, 64 // level.stride, 128 // level.stride)
        assert level.rectified == bool(feature.min() >= 0)


def test_frozen(resnet: Source) -> None:
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    resnet.train()
    resnet(torch.rand(4, 3, 32, 32))
    assert not any(module.training for module in resnet.modules())
    assert not any(parameter.requires_grad for parameter in resnet.parameters())
    for name, tensor in resnet.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_points_come_from_fine_to_coarse(resnet: Source) -> None:
    assert resnet.critical_points == ("layer1", "layer2")
    assert resnet.stride == 8
    assert not any("layer3" in name for name, _ in resnet.named_parameters()), (
        "what lies behind the last point is cut off"
    )


def test_random_weights_are_seeded_and_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second = (Source("small_vgg", pretrained=False, seed=5) for _ in range(2))
    other = Source("small_vgg", pretrained=False, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg99"}, "source='vgg99'.*vgg19"),
        ({"name": "small_vgg", "critical_points": ["pool6"]}, r"critical_points=\['pool6'\].*pool1, pool2"),
        ({"name": "small_vgg", "critical_points": []}, r"critical_points=\[\]"),
        ({"name": "small_vgg", "weights": "nowhere.pth"}, "source_weights='nowhere.pth': no such file"),
        ({"name": "inception_v3", "pretrained": False}, "source='inception_v3'.*choose a convolutional model"),
        (
            {"name": "vit_tiny_patch16_224", "pretrained": False},
            "source='vit_tiny_patch16_224'.*choose a convolutional model",
        ),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**arguments)
