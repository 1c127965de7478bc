"""What is normal at each position."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kd_multiresolution.dual.calibration import LEAST_GAIN, _weigh_positions, deviation_of_most
from kd_multiresolution.dual.position import SHARE, PositionError, PositionMoments
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from tests.dual.calibrated import SIZE, alone, calibrated, pictures


def features(count: int, seed: int = 0) -> Tensor:
    """Three channels of other means and deviations, the last without any."""
    noise = torch.randn(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    places = torch.linspace(1, 3, 24).view(4, 6)
    return (
        places * torch.tensor([1.0, 10, 0])[:, None, None] * (1 + 0.1 * noise)
        + torch.tensor([0.0, 5, 7])[:, None, None]
    )


def known(level: Tensor) -> PositionError:
    moments, error = PositionMoments(), PositionError(level.shape[1])
    for part in torch.split(level, 5):
        moments.add(part)
    error.set(moments, alone)
    return error


def test_differences_are_in_units_of_their_position() -> None:
    level, other = features(12), features(3, seed=1)
    mean, variance = level.mean(0), level.var(0, unbiased=False)
    floor = SHARE * level.var((0, 2, 3), unbiased=False)[:, None, None]
    expected = ((other - mean).square() / (variance + floor))[:, :2].sum(1, keepdim=True) / 3
    torch.testing.assert_close(known(level)(other), expected, rtol=1e-3, atol=1e-5)


def test_a_channel_that_never_varies_is_no_division_by_zero() -> None:
    assert known(torch.ones(4, 3, 4, 6))(features(2)).isfinite().all()
    level = features(12)
    raised = features(2)
    raised[:, 2] += 1e-3
    assert known(level)(raised).isfinite().all()


def test_half_precision_keeps_numbers() -> None:
    error = PositionError(3).half()
    moments = PositionMoments()
    moments.add(300 * torch.ones(4, 3, 4, 6))
    error.set(moments, alone)
    assert error.factor.isfinite().all()
    assert error.offset.isfinite().all()
    assert error(torch.full((1, 3, 4, 6), 300.0)).isfinite().all()


def test_before_it_is_known_nothing_is_unusual() -> None:
    assert torch.equal(PositionError(3)(features(2)), torch.zeros(2, 1, 4, 6))


def test_it_is_told_from_the_images_of_all_processes() -> None:
    level = features(12)
    parts = [PositionMoments() for _ in range(2)]
    parts[0].add(level[:5])
    parts[1].add(level[5:])
    error = PositionError(3)
    error.set(parts[0], lambda sums: sums + parts[1].sums)
    torch.testing.assert_close(error.factor, known(level).factor)
    torch.testing.assert_close(error.offset, known(level).offset)


def test_images_of_another_size_are_compared_with_what_lies_there() -> None:
    error = known(features(12))
    large = torch.rand(2, 3, 8, 12)
    factor, offset = (F.interpolate(part, scale_factor=2, mode="bilinear") for part in (error.factor, error.offset))
    torch.testing.assert_close(error(large), (large * factor + offset).square().sum(1, keepdim=True))


def test_a_state_keeps_it_and_older_states_go_without() -> None:
    model = calibrated(KdMultiresolutionDualModel("small_vgg"), pictures(8))
    assert model.position.factor.shape[2:] == (SIZE[0] // 8, SIZE[1] // 8)
    state = copy.deepcopy(model.state_dict())
    images = pictures(2, seed=5)
    again = KdMultiresolutionDualModel("small_vgg").eval()
    again.load_state_dict(state)
    assert torch.equal(again(images).pred_score, model(images).pred_score)
    older = {name: value for name, value in state.items() if "position" not in name}
    again.load_state_dict(older)
    local, overall = again.predictions(again.source(images))
    families = again.families(again.source(images), local, overall)
    of_maps, of_positions = again.tops(families, again.positions(again.source(images)))
    assert not of_positions.any()
    again.judged_as_whole.fill_(value=False)
    torch.testing.assert_close(again(images).pred_score, of_maps)
    with pytest.raises(RuntimeError, match=r"position\.factor"):
        again.load_state_dict({name: value for name, value in state.items() if name != "position.factor"})


def test_what_a_state_does_not_have_stays_as_it_is() -> None:
    model = calibrated(KdMultiresolutionDualModel("small_vgg"), pictures(8))
    state = copy.deepcopy(model.state_dict())
    cloner = {name: value for name, value in state.items() if name.startswith("local_cloner.")}
    model.load_state_dict(cloner, strict=False)
    other = KdMultiresolutionDualModel("small_vgg", critical_points=["pool3", "pool4", "pool5"]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other)
    for name, tensor in (*model.position.named_buffers(prefix="position"), ("position_weight", model.position_weight)):
        assert torch.equal(tensor, state[name]), name


def test_both_parts_of_a_score_count_by_the_cube_of_what_a_defect_raises_them() -> None:
    model = KdMultiresolutionDualModel("small_vgg")
    before = model.family_weight.clone()
    normal = 50 + torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0])
    deviation = deviation_of_most(torch.cat([normal, normal]), alone).float()
    _weigh_positions(model, normal, normal, normal + torch.tensor([1.0, 2.0]) * deviation, reduce=alone)
    torch.testing.assert_close(model.position_weight, 8 / 9 / deviation[1])
    torch.testing.assert_close(model.family_weight[1], before[1] / 9 / deviation[0])
    assert torch.equal(model.family_weight[0], before[0]), "the map goes without"
    little = torch.tensor([-1.0, 0.9 * LEAST_GAIN]) * deviation
    _weigh_positions(model, normal, normal, normal + little, reduce=alone)
    assert model.position_weight == 0, "what a defect raises by no more than chance has no place of its own"


@pytest.mark.parametrize("moved", [False, True])
def test_a_part_that_lies_elsewhere_is_unusual(moved: bool) -> None:
    """A square that lies alike in every image, or, in which nothing else differs, sixteen pixels beside it."""
    images = 0.2 + 0.02 * pictures(16)
    images[..., 16:32, 16:32] += 0.6
    model = calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), images[:12])
    test = images[12:].roll(16, -1) if moved else images[12:]
    unusual = model.positions(model.source(model.checked_images(test))).amax((1, 2, 3))
    assert (unusual > 20).all() == moved
