"""Features in units of their deviation, and the statistics that it takes."""

from __future__ import annotations

import torch
from torch import nn

from kd_multiresolution.dual.standardization import LevelConv, Standardization, standardize
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.channel_moments import ChannelMoments
from tests.dual.calibrated import alone, pictures


def test_folded_standardisation_equals_the_plain_one() -> None:
    features = torch.randn(2, 5, 6, 7) * 3 + 4
    before, after = Standardization(5), Standardization(4)
    before.set(features.mean((0, 2, 3)), features.square().mean((0, 2, 3)))
    after.set(torch.arange(4.0), torch.arange(4.0).square() + torch.tensor([1.0, 4.0, 9.0, 16.0]))
    torch.testing.assert_close(after.deviation, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    convolution = LevelConv(5, 4)

    def column(numbers: torch.Tensor) -> torch.Tensor:
        return numbers[:, None, None]

    standardized = (features - column(before.mean)) / column(before.deviation)
    expected = nn.functional.conv2d(standardized, convolution.weight, convolution.bias)
    torch.testing.assert_close(convolution.from_level(features, before), expected, rtol=1e-4, atol=1e-5)
    expected = column(after.mean) + column(after.deviation) * nn.functional.conv2d(
        features, convolution.weight, convolution.bias
    )
    torch.testing.assert_close(convolution.to_level(features, after), expected, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_all_images_at_once() -> None:
    model = KdMultiresolutionDualModel("small_vgg")
    features = [model.source(model.checked_images(pictures(count, seed=count))) for count in (1, 4)]
    moments = ChannelMoments()
    for part in features:
        moments.add(part)
    standardize(model.levels_units, moments, alone)
    for units, level in zip(model.levels_units, zip(*features, strict=True), strict=True):
        values = torch.cat(level).transpose(0, 1).flatten(1)
        torch.testing.assert_close(units.mean, values.mean(1), rtol=1e-4, atol=1e-5)
        alive = values.std(1) > 0.1 * values.std(1).mean()  # the others are held above a least deviation
        assert alive.sum() > len(alive) / 2
        torch.testing.assert_close(units.deviation[alive], values.std(1, unbiased=False)[alive], rtol=1e-3, atol=0)


def test_half_precision_divides_by_no_channel_that_it_rounds_to_nothing() -> None:
    level = Standardization(3).to(torch.float16)
    level.set(torch.zeros(3), torch.zeros(3))
    assert LevelConv(3, 2).to(torch.float16).from_level(torch.zeros(1, 3, 2, 2).half(), level).isfinite().all()
