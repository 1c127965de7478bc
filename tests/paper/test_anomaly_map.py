from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_multiresolution import AnomalyMapGenerator
from kd_multiresolution.paper.anomaly_map import discrepancy_map, scale_to_percentile


def attribution(seed: int = 0, shape: tuple[int, ...] = (2, 3, 40, 56)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.8, 2.0, 4.0])
def test_blur_is_scipys(sigma: float) -> None:
    images = attribution()
    ours = AnomalyMapGenerator(sigma, opening=False)(images)
    total = images.abs().sum(1).double().numpy()
    expected = scipy.ndimage.gaussian_filter(total, sigma=(0, sigma, sigma))
    np.testing.assert_allclose(ours[:, 0].numpy(), expected, rtol=0, atol=2e-6)


def test_opening_is_scipys() -> None:
    images = attribution()
    ours = AnomalyMapGenerator(sigma=0)(images)
    # scipy extends the image; a border that can neither win the erosion nor the dilation ignores what lies outside.
    total = images.abs().sum(1).numpy()
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]]) > 0
    eroded = scipy.ndimage.grey_erosion(total, footprint=cross, mode="constant", cval=np.inf)
    opened = scipy.ndimage.grey_dilation(eroded, footprint=cross, mode="constant", cval=-np.inf)
    np.testing.assert_allclose(ours[:, 0].numpy(), opened, rtol=0, atol=1e-6)


def test_a_single_pixel_is_noise_a_cross_is_not() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[0, 0, 2, 2] = 1
    images[0, 0, 5:8, 6] = 1
    images[0, 0, 6, 5:8] = 1
    opened = AnomalyMapGenerator(sigma=0)(images)
    expected = images.clone()
    expected[0, 0, 2, 2] = 0
    torch.testing.assert_close(opened, expected, rtol=0, atol=1e-6)


def test_scaling_is_numpys_percentile() -> None:
    maps = attribution(shape=(3, 1, 20, 21)).abs()
    low, high = maps.amin((1, 2, 3)).numpy(), np.percentile(maps.numpy(), 99, axis=(1, 2, 3))
    expected = np.clip((maps.numpy().T - low) / (high - low), 0, 1).T
    np.testing.assert_allclose(scale_to_percentile(maps).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("percentile_scale", [False, True])
def test_constant_and_zero_attributions(percentile_scale: bool) -> None:
    images = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), -0.5)])
    maps = AnomalyMapGenerator(percentile_scale=percentile_scale)(images)
    expected = torch.tensor([0.0, 0.0 if percentile_scale else 1.5])[:, None, None, None].expand_as(maps)
    torch.testing.assert_close(maps, expected)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    channels=st.integers(1, 3),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    percentile_scale=st.booleans(),
)
def test_properties(
    height: int, width: int, channels: int, scale: float, dtype: torch.dtype, percentile_scale: bool
) -> None:
    images = (attribution(1, (3, channels, height, width)) * scale).to(dtype)
    generator = AnomalyMapGenerator(percentile_scale=percentile_scale)
    maps = generator(images)
    assert maps.shape == (3, 1, height, width)
    assert torch.isfinite(maps).all()
    assert (maps >= 0).all()
    torch.testing.assert_close(maps[1:2], generator(images[1:2]))


def test_errors_name_the_argument() -> None:
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma="):
            AnomalyMapGenerator(sigma)
    with pytest.raises(ValueError, match=r"sigma=4.0: the blur needs images of at least 16 pixels, not \(8, 64\)"):
        AnomalyMapGenerator()(torch.rand(1, 3, 8, 64))


def features(seed: int) -> list[torch.Tensor]:
    return [attribution(seed, (2, channels, size, size)).relu() for channels, size in ((8, 8), (16, 4))]


def test_discrepancy_map_by_hand() -> None:
    source = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
    cloner = torch.tensor([[4.0, 2.0], [3.0, 0.0]]).reshape(1, 2, 1, 2)
    # At the left (3, 4) and (4, 3): cosine 24 / 25, squares 1 and 1. At the right (1, 0) and (2, 0): cosine 1, 1 and 0.
    for terms, expected in (
        ("direction", [0.04, 0.0]),
        ("value", [1.0, 0.5]),
        ("total", [0.04 + 0.1, 0.05]),
    ):
        ours = discrepancy_map([source], [cloner], (1, 2), value_weight=0.1, terms=terms)
        torch.testing.assert_close(ours.flatten(), torch.tensor(expected))


def test_discrepancy_map_is_the_sum_of_the_upsampled_levels() -> None:
    source, cloner = features(0), features(1)
    total = torch.zeros(2, 1, 24, 24)
    for s, c in zip(source, cloner, strict=True):
        level = 1 - torch.cosine_similarity(s, c, dim=1)[:, None] + 0.5 * (s - c).square().mean(1, keepdim=True)
        # scipy's zoom in grid mode is bilinear upsampling with half-pixel centres.
        zoomed = scipy.ndimage.zoom(level.numpy(), (1, 1, 24 / level.shape[2], 24 / level.shape[3]), order=1,
                                    mode="nearest", grid_mode=True)  # fmt: skip
        total += torch.from_numpy(zoomed)
    torch.testing.assert_close(discrepancy_map(source, cloner, (24, 24), value_weight=0.5), total)


def test_discrepancy_map_is_zero_where_both_agree_even_on_dead_positions() -> None:
    source = features(0)
    source[1][:, :, 1, 2] = 0
    assert discrepancy_map(source, [f.clone() for f in source], (32, 32), value_weight=0.5).max() <= 2e-7
    cloner = [f.clone() for f in source]
    cloner[1][:, :, 1, 2] = 0.5
    changed = discrepancy_map(source, cloner, (32, 32), value_weight=0.5, terms="direction")
    assert changed[:, 0, 12, 20].min() > 0.4
    assert changed[:, 0, 28, 4].max() <= 2e-7


def test_discrepancy_map_refuses_features_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"source_features .*cloner_features"):
        discrepancy_map(features(0), features(1)[:1], (32, 32), value_weight=0.5)
