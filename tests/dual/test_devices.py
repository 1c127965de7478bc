"""Statistics on devices that have no float64, such as Apple's: sums are then taken on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kd_multiresolution.dual.held_out import HeldOutImages
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.channel_moments import exact


class WithoutFloat64(TorchFunctionMode):
    """Refuses float64 to every tensor that was not brought to the host first."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[torch.Tensor] = []
        self.refused = 0

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cpu:
            self.on_host.append(args[0].clone())
            return self.on_host[-1]
        is_on_host = any(args[0] is tensor for tensor in self.on_host) if args else False
        if function is torch.Tensor.double and not is_on_host and args[0].dtype != torch.float64:
            self.refused += 1
            msg = "Cannot convert a tensor to float64: the device has no such numbers"
            raise TypeError(msg)
        return function(*args, **(kwargs or {}))


def test_exact_takes_what_the_device_refuses_to_the_host() -> None:
    with WithoutFloat64():
        assert exact(torch.ones(2)).dtype == torch.float64


@pytest.mark.parametrize("image_score", ["auto", "defects"])
def test_calibration_is_the_same_without_float64(image_score: Any) -> None:
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    paths = [str(i) for i in range(len(images))]

    def calibrated() -> tuple[dict[str, Any], Any]:
        model = KdMultiresolutionDualModel("small_vgg").eval()
        held_out = HeldOutImages(model, 0, image_score)
        held_out.start(paths, [(paths, images, model.source(images))], lambda tensor: tensor, resumed=False)
        return model.state_dict(), held_out.calibrate(lambda tensor: tensor)

    state, normal = calibrated()
    with WithoutFloat64() as device:
        other, normal_there = calibrated()
    assert device.refused
    assert normal == normal_there
    for name, tensor in state.items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, other[name]), name
