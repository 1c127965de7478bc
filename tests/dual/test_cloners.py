"""What the cloners know of an image."""

from __future__ import annotations

import torch

from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from tests.dual.calibrated import pictures


def test_global_cloner_knows_of_an_image_what_its_code_says(model: KdMultiresolutionDualModel) -> None:
    codes = []
    handle = model.global_cloner.to_code.register_forward_hook(
        lambda module, given, code: codes.append(code) or torch.ones_like(code)
    )
    features = model.source(pictures(2))
    predicted = model.predictions(features)[1]
    handle.remove()
    assert codes[0].flatten(1).shape == (2, 64)
    assert not codes[0][0].allclose(codes[0][1]), "two pictures, two codes"
    for level in predicted:
        torch.testing.assert_close(level[0], level[1])
