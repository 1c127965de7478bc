"""What tells weights apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.paper.torch_model import KdMultiresolutionModel
from kd_multiresolution.training.evaluation_mode import mark_of

MODELS = [KdMultiresolutionModel, KdMultiresolutionDualModel]


@pytest.mark.parametrize("make", MODELS)
def test_the_smallest_change_of_one_weight_is_noticed(make: Callable[..., nn.Module]) -> None:
    model = make("small_vgg")
    before = mark_of(model)
    assert mark_of(model) == before
    tensors = {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    trained = [tensor for name, tensor in tensors.items() if not name.startswith("source.") and tensor.numel() > 0]
    for tensor in (tensor for tensor in trained if tensor.is_floating_point()):
        one = tensor[(-1,) * tensor.dim()]  # in place, and past autograd, as averaged weights are put there
        value = one.clone()
        one.copy_(torch.nextafter(value, value + 1))
        assert mark_of(model) != before
        one.copy_(value)
        assert mark_of(model) == before
