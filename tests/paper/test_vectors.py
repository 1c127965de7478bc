"""Parity with numbers that the paper's published implementation produced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from kd_multiresolution import AnomalyMapGenerator, Cloner, discrepancy
from kd_multiresolution.paper.anomaly_map import scale_to_percentile
from kd_multiresolution.paper.attribution import input_gradient
from kd_multiresolution.source.network import Level

VGG16 = (("pool1", 64, 2), ("pool2", 128, 2), ("pool3", 256, 3), ("pool4", 512, 3), ("pool5", 512, 3))
POINTS = (2, 3, 4, 5)


def load(path: Path) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(array).squeeze() if array.size == 1 else torch.from_numpy(array)
        for name, array in np.load(path).items()
    }


def levels(plan: tuple[tuple[str, int, int], ...]) -> list[Level]:
    return [
        Level(name, channels, 2 ** (i + 1), convolutions, rectified=True, critical=i > 0)
        for i, (name, channels, convolutions) in enumerate(plan)
    ]


def load_cloner(cloner: Cloner, arrays: dict[str, Tensor], prefix: str = "") -> Cloner:
    """Put the published weights, numbered in forward order, into our blocks."""
    convolution = -1
    for module in cloner.modules():
        if isinstance(module, nn.Conv2d):
            convolution += 1
            module.weight.data.copy_(arrays[f"{prefix}conv{convolution}.weight"])
        if isinstance(module, nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, name).data.copy_(arrays[f"{prefix}bn_after_conv{convolution}.{name}"])
    assert f"{prefix}conv{convolution + 1}.weight" not in arrays
    return cloner


@pytest.fixture(scope="module")
def loss(vectors: Path) -> dict[str, Tensor]:
    return load(vectors / "loss.npz")


@pytest.fixture(scope="module")
def maps(vectors: Path) -> dict[str, Tensor]:
    return load(vectors / "gradient_map.npz")


@pytest.mark.parametrize("value_weight", [0.5, 0.01])
def test_training_loss(loss: dict[str, Tensor], value_weight: float) -> None:
    source, cloner = ([loss[f"{net}_{i}"] for i in POINTS] for net in ("source", "cloner"))
    ours = discrepancy(source, cloner, value_weight=value_weight).mean()
    torch.testing.assert_close(
        ours, loss[f"training_loss_value_weight_{value_weight}"], rtol=1e-6, atol=0, check_dtype=False
    )
    direction = discrepancy(source, cloner, value_weight=value_weight, terms="direction").mean()
    torch.testing.assert_close(direction, loss["training_loss_direction_only"], rtol=1e-6, atol=0, check_dtype=False)
    value = discrepancy(source, cloner, value_weight=value_weight, terms="value").mean()
    torch.testing.assert_close(value, (ours - direction) / value_weight, rtol=2e-5, atol=0, check_dtype=False)


def test_score(loss: dict[str, Tensor]) -> None:
    source, cloner = ([loss[f"{net}_{i}"] for i in POINTS[1:]] for net in ("source", "cloner"))
    for value_weight in (0.5, 0.01):
        ours = discrepancy(source, cloner, value_weight=value_weight)
        torch.testing.assert_close(
            ours, loss[f"score_value_weight_{value_weight}"], rtol=1e-6, atol=0, check_dtype=False
        )
    ours = discrepancy(source, cloner, value_weight=1.0, terms="direction")
    torch.testing.assert_close(ours, loss["score_direction_only"], rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_cloner_activations(vectors: Path, mode: str) -> None:
    arrays = load(vectors / "cloner.npz")
    cloner = load_cloner(Cloner(levels(VGG16)), arrays).train(mode == "train")
    with torch.no_grad():
        features = cloner(arrays["image"])
    for i, feature in zip(POINTS, features, strict=True):
        torch.testing.assert_close(feature, arrays[f"{mode}_pool{i}"], rtol=1e-5, atol=1e-5)


class PublishedSource(nn.Module):
    """The narrow VGG of the vectors."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self.arrays = arrays

    def forward(self, x: Tensor) -> list[Tensor]:
        features, convolution = [], 0
        for count in (2, 2, 3, 3, 3):
            for _ in range(count):
                weight, bias = (self.arrays[f"source.conv{convolution}.{kind}"] for kind in ("weight", "bias"))
                x = torch.relu(torch.conv2d(x, weight, bias, padding=1))
                convolution += 1
            x = torch.max_pool2d(x, 2)
            features.append(x)
        return features[1:]


@pytest.mark.parametrize("path", ["both", "cloner"])
def test_input_gradient(maps: dict[str, Tensor], path: str) -> None:
    plan = (("pool1", 8, 2), ("pool2", 16, 2), ("pool3", 24, 3), ("pool4", 32, 3), ("pool5", 32, 3))
    cloner = load_cloner(Cloner(levels(plan), inner_width=4), maps, "cloner.").eval()
    source = PublishedSource(maps)

    def score(images: Tensor) -> Tensor:
        source_features = source(images if path == "both" else images.detach())
        return discrepancy(source_features[1:], cloner(images)[1:], value_weight=0.5)

    scores, gradient = input_gradient(score, maps["image"])
    torch.testing.assert_close(scores, maps["score_value_weight_0.5"], rtol=1e-6, atol=0, check_dtype=False)
    published = maps[f"input_gradient_{path}_value_weight_0.5"]
    error = (gradient - published).abs().amax((1, 2, 3))
    assert error.max() <= 1e-5
    # In image 1 a max pool has two activations so close that float32's last digit decides which one the gradient takes.
    assert (error / published.abs().amax((1, 2, 3)))[[0, 2, 3]].max() <= 1e-5


def test_maps(maps: dict[str, Tensor]) -> None:
    gradient = maps["input_gradient_both_value_weight_0.5"]
    scaled = scale_to_percentile(gradient.abs().sum(1, keepdim=True))
    blurred = AnomalyMapGenerator(opening=False, percentile_scale=True)(gradient)
    opened = AnomalyMapGenerator(percentile_scale=True)(gradient)
    for ours, name in ((scaled, "map_scaled"), (blurred, "map_scaled_blurred"), (opened, "map_scaled_blurred_opened")):
        torch.testing.assert_close(ours[:, 0], maps[name], rtol=0, atol=2e-6)


def test_grey_opening_gives_the_published_pixel_auroc(maps: dict[str, Tensor]) -> None:
    opened = AnomalyMapGenerator(percentile_scale=True)(maps["input_gradient_both_value_weight_0.5"])
    auroc = roc_auc_score(maps["mask"].flatten() > 0, opened.flatten())
    assert auroc == pytest.approx(float(maps["pixel_auroc_grey_opening_exact"]), abs=1e-6)
    assert auroc == pytest.approx(float(maps["pixel_auroc_1000_thresholds"]), abs=1e-3)
