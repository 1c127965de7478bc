"""Parts of the maps: the error per channel, and the highest hundredth."""

from __future__ import annotations

import torch

from kd_multiresolution.dual.maps import ChannelError, top_mean


def test_score_is_the_mean_of_the_highest_hundredth() -> None:
    maps = torch.arange(1000.0).reshape(1, 1, 20, 50).repeat(2, 1, 1, 1)
    torch.testing.assert_close(top_mean(maps), torch.full((2, 1), 994.5))
    torch.testing.assert_close(top_mean(maps[..., :1, :1]), torch.zeros(2, 1))


def test_channel_error_is_one_on_normal_images() -> None:
    error = ChannelError(3)
    difference = torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    error.set(difference.square().mean((0, 2, 3)))
    torch.testing.assert_close(error(difference).mean(), torch.tensor(1.0))
    dead = ChannelError(2)
    dead.set(torch.tensor([0.0, 1.0]))
    assert dead(torch.ones(1, 2, 1, 1)) < 1.001e4, "a dead channel is not divided by zero"


def test_channels_count_alike_in_half_precision() -> None:
    """Errors of a ten-thousandth, whose squares float16 does not have; features come in float32 all the same."""
    error = ChannelError(2).half()
    difference = torch.tensor([1e-4, 1e-3])[:, None, None].expand(1, 2, 4, 4)
    error.set(difference.square().mean((0, 2, 3)))
    torch.testing.assert_close(error(difference.half().float()), torch.ones(1, 1, 4, 4), rtol=2e-3, atol=0)
