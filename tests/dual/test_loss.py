"""What the cloners learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_multiresolution.dual.loss import cloner_losses
from kd_multiresolution.dual.standardization import standardize
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.channel_moments import ChannelMoments
from tests.dual.calibrated import alone, pictures


@pytest.mark.parametrize("scale", [1, 1000])
def test_loss_is_in_standardised_units(scale: float) -> None:
    """A cloner that predicts the mean of every channel has an error of one per level, whatever the source's scale."""
    model = KdMultiresolutionDualModel("resnet18", pretrained=False)
    generator = torch.Generator().manual_seed(0)
    features = [
        scale * (2 + torch.randn(level.shape, generator=generator))
        for level in model.source(model.checked_images(pictures(3)))
    ]
    moments = ChannelMoments()
    moments.add(features)
    standardize(model.levels_units, moments, alone)
    for cloner in (model.local_cloner, model.global_cloner):
        for head in cloner.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    losses = cloner_losses(model, features)
    assert losses["local"].item() == pytest.approx(2, rel=0.03), "one image of three"
    assert losses["global"].item() == pytest.approx(2, rel=1e-3)
