"""Painted defects, on images whose place and donor can be told from their values."""

from __future__ import annotations

import pytest
import torch

from kd_multiresolution.dual.painted_defects import out_of_focus, painted

HEIGHT, WIDTH = 96, 128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_small_patch_of_another_image() -> None:
    """Image i has the values i: a pasted pixel says where it comes from, and how opaque the patch is."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, HEIGHT, WIDTH)
    outcome = painted(images, generator())
    changed = (outcome - images).abs() > 0.25
    share = changed[:, 0].float().mean((1, 2))
    assert (share > 0).all()
    assert (share < 0.04).all()
    towards = images.roll(1, 0) - images
    assert (((outcome - images) / towards).amax((1, 2, 3)) > 0.25).all(), (
        "opaque by a third in the middle, but for its soft edge"
    )
    assert ((outcome - images) / towards).max() <= 1


def test_same_generator_same_patches_and_inputs_stay() -> None:
    images = torch.rand(3, 3, HEIGHT, WIDTH, generator=generator())
    before = images.clone()
    first, second, other = (painted(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(images, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_patches_lie_where_there_is_something_to_see() -> None:
    """Only the left quarter of the image has structure."""
    images = torch.full((64, 1, HEIGHT, WIDTH), 0.5)
    images[..., : WIDTH // 4] = torch.rand(64, 1, HEIGHT, WIDTH // 4, generator=generator())
    changed = (painted(images, generator()) - images).abs().amax(1).amax(1) > 1e-3
    assert changed[:, : WIDTH // 3].any(1).float().mean() > 0.95


def test_out_of_focus_is_a_gaussian_blur_of_seven_tenths_of_a_pixel() -> None:
    point = torch.zeros(1, 1, 11, 11)
    point[..., 5, 5] = 1
    blurred = out_of_focus(point.half())
    assert blurred.dtype == torch.float16
    offsets = torch.arange(11.0) - 5
    assert (blurred[0, 0].float().sum(0) * offsets.square()).sum() == pytest.approx(0.7**2, rel=0.02)
    assert blurred.float().sum() == pytest.approx(1, abs=1e-3)
    assert out_of_focus(torch.rand(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 32, 32), (2, 1, 16, 80)])
def test_any_number_of_images(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=generator())
    outcome = painted(images, generator())
    assert outcome.shape == images.shape
    assert outcome.isfinite().all()


def test_flat_images_do_not_divide_by_zero() -> None:
    assert torch.equal(painted(torch.ones(2, 3, 32, 32), generator()), torch.ones(2, 3, 32, 32))
