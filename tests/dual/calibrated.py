"""A dual model that knows what is normal, by pictures of noise."""

from __future__ import annotations

import torch

from kd_multiresolution.dual.calibration import Calibration, ImageScore, calibrate
from kd_multiresolution.dual.painted_defects import out_of_focus, painted
from kd_multiresolution.dual.position import PositionMoments
from kd_multiresolution.dual.standardization import standardize
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.channel_moments import ChannelMoments

SIZE = (64, 96)


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the only process."""
    return tensor


def calibration(
    model: KdMultiresolutionDualModel, images: torch.Tensor, image_score: ImageScore = "auto"
) -> Calibration:
    features = model.source(model.checked_images(images))
    moments = ChannelMoments()
    moments.add(features)
    standardize(model.levels_units, moments, alone)
    positions = PositionMoments()
    positions.add(features[1])
    model.position.set(positions, alone)
    defective = model.source(painted(model.checked_images(images), torch.Generator().manual_seed(0)))
    blurred = model.source(out_of_focus(model.checked_images(images)))
    return calibrate(
        model, features, blurred=blurred, defective=defective, image_size=SIZE, image_score=image_score, reduce=alone
    )


def calibrated(
    model: KdMultiresolutionDualModel, images: torch.Tensor, image_score: ImageScore = "auto"
) -> KdMultiresolutionDualModel:
    calibration(model, images, image_score)
    return model.eval()


def mean_of_neighbours(level: torch.Tensor) -> torch.Tensor:
    outcome = torch.empty_like(level)
    for row in range(level.shape[2]):
        for column in range(level.shape[3]):
            around = level[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            outcome[..., row, column] = around.mean((2, 3))
    return outcome
