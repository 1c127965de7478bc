"""What counts as an equal pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export_parity import compared
from kd_multiresolution import KdMultiresolution


@pytest.mark.parametrize(("moved", "equal"), [(0.9e-3, True), (1.1e-3, False)])
def test_a_pixel_is_equal_within_a_thousandth_of_its_maps_range(moved: float, equal: bool) -> None:
    # A gradient map: its range is far below 1.
    model = KdMultiresolution("light_vgg", image_size=32).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    score, heat_map = expected.pred_score.numpy(), expected.anomaly_map.numpy().copy()
    assert 0 < np.ptp(heat_map) < 0.1
    heat_map[0, 0, 3, 4] += moved * np.ptp(heat_map)
    difference, correlation, shares = compared(
        lambda _: {"pred_score": score + 0.5, "anomaly_map": heat_map}, model, images
    )
    assert difference == pytest.approx(0.5, abs=1e-6)
    assert correlation > 0.9999
    assert shares == [1.0 if equal else 1 - 1 / heat_map.size]
