from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kd_multiresolution.results.tiles import SMALLEST, Tile, fit, heat_layer, pictured, side_for


def tile(side: int, seed: int = 0) -> Tile:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return pictured(Image.fromarray(pixels), torch.rand(side, side, generator=torch.Generator().manual_seed(seed)))


def test_a_very_wide_picture_has_what_webp_can_hold() -> None:
    wide = pictured(Image.new("L", (25_600, 10)), torch.rand(4, 4))
    with Image.open(io.BytesIO(wide.picture)) as picture:
        assert picture.size == (wide.width, wide.height) == (16_383, 6)


def test_what_fits_stays_as_it_is() -> None:
    tiles = [tile(64, seed) for seed in range(3)]
    assert fit(tiles, sum(one.length for one in tiles)) == tiles


def test_all_are_made_smaller_until_they_fit() -> None:
    tiles = [tile(128, seed) for seed in range(4)]
    room = sum(one.length for one in tiles) // 3
    fitted = fit(tiles, room)
    assert sum(one.length for one in fitted) <= room
    assert len({(one.width, one.height) for one in fitted}) == 1
    assert SMALLEST <= fitted[0].width < 128
    for one in fitted:
        for data in (one.picture, one.heat):
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.format == "WEBP"
                assert max(picture.size) <= 96 or picture.size == (one.width, one.height)


def test_where_even_the_smallest_are_too_many_the_last_have_none() -> None:
    tiles = [tile(40, seed) for seed in range(20)]
    room = 8 * tile(SMALLEST).length
    fitted = fit(tiles, room)
    kept = [bool(one.picture) for one in fitted]
    assert kept == sorted(kept, reverse=True)
    assert 0 < sum(kept) < 20
    assert sum(one.length for one in fitted) <= room


@pytest.mark.parametrize(("count", "side"), [(None, 256), (0, 256), (1, 512), (1_000_000, SMALLEST)])
def test_sides_have_bounds(count: int | None, side: int) -> None:
    assert side_for(count, 14_000_000) == side
    assert SMALLEST < side_for(1000, 14_000_000) < side_for(500, 14_000_000) < 512


def test_a_heat_map_gets_lighter_and_less_transparent() -> None:
    layer = np.asarray(heat_layer(torch.linspace(0, 1, 96).expand(4, 96))).astype(int)
    opacity, light = layer[0, :, 3], layer[0, :, :3] @ [0.299, 0.587, 0.114]
    assert opacity[0] == 0
    assert (np.diff(opacity) >= 0).all()
    assert (np.diff(light) > -1).all()
    assert light[-1] - light[48] > 60
