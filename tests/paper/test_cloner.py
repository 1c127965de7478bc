from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_multiresolution import Cloner
from kd_multiresolution.source.network import Level, Source
from tests.paper.test_vectors import VGG16, levels

FIGURE_2 = "16 16 M 16 128 M 16 16 256 M 16 16 512 M 16 16 512 M"
VGG16_WIDTHS = "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M"


def plan(cloner: Cloner) -> str:
    names = {nn.Conv2d: lambda m: str(m.out_channels), nn.MaxPool2d: lambda m: "M" * (m.kernel_size // 2)}
    return " ".join(names[type(m)](m) for m in cloner.modules() if type(m) in names)


def test_compact_is_figure_2_and_equal_is_vgg16() -> None:
    assert plan(Cloner(levels(VGG16))) == FIGURE_2
    assert plan(Cloner(levels(VGG16), size="equal")) == VGG16_WIDTHS


def test_convolutions_are_3x3_without_bias_and_none_before_a_pool_has_batch_norm() -> None:
    for block in Cloner(levels(VGG16)).blocks:
        kinds = [type(module) for module in block]
        assert kinds[-3:] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU]
        assert kinds[:-3] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * (len(kinds[:-3]) // 3)
        convolutions = [module for module in block if isinstance(module, nn.Conv2d)]
        assert all(module.kernel_size == (3, 3) and module.bias is None for module in convolutions)


def test_bias_and_batch_norm_are_options() -> None:
    modules = list(Cloner(levels(VGG16), bias=True, batch_norm=False).modules())
    assert all(module.bias is not None for module in modules if isinstance(module, nn.Conv2d))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)


@pytest.mark.parametrize(
    ("name", "points"),
    [("resnet18", None), ("efficientnet_b0", None), ("convnext_atto", None), ("vgg11", ["pool1", "pool3"])],
)
def test_shapes_follow_the_source(name: str, points: list[str] | None) -> None:
    source = Source(name, pretrained=False, critical_points=points)
    images = torch.rand(2, 3, 64, 96)
    features = Cloner(source.levels).eval()(images)
    assert [f.shape for f in features] == [f.shape for f in source(images)]
    for level, feature in zip((level for level in source.levels if level.critical), features, strict=True):
        assert bool(feature.min() >= 0) == level.rectified, "a ReLU could not imitate negative activations"


def test_first_block_takes_the_sources_width_where_it_is_a_critical_point() -> None:
    level = Level("pool1", channels=64, stride=2, convolutions=2, rectified=True, critical=True)
    assert plan(Cloner([level])) == "16 64 M"


def test_initial_weights_are_xavier_uniform_and_seeded() -> None:
    first, second, other = (Cloner(levels(VGG16), seed=seed) for seed in (1, 1, 2))
    weights = [m.weight for m in first.modules() if isinstance(m, nn.Conv2d)]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.ndim > 1)
    for weight in weights:
        bound = (6 / (9 * (weight.shape[0] + weight.shape[1]))) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * bound


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="cloner='tiny': expected one of compact, equal"):
        Cloner(levels(VGG16), size="tiny")
