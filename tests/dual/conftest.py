"""The torch model that most of these tests look at."""

from __future__ import annotations

import pytest

from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from tests.dual.calibrated import calibrated, pictures


@pytest.fixture(scope="module")
def model() -> KdMultiresolutionDualModel:
    return calibrated(KdMultiresolutionDualModel("small_vgg"), pictures(6))
