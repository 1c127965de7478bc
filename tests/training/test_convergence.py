"""When a training has converged, by its losses alone."""

from __future__ import annotations

import pytest

from kd_multiresolution import ConvergenceStopping


def test_convergence_compares_two_windows() -> None:
    stopping = ConvergenceStopping(window=2, tolerance=0.1)
    stopping.losses = [1.0, 1.0, 0.95]
    assert not stopping.converged, "two whole windows are needed"
    stopping.losses = [1.0, 1.0, 0.95, 0.9]
    assert stopping.converged
    stopping.losses = [1.0, 1.0, 0.8, 0.8]
    assert not stopping.converged
    restored = ConvergenceStopping(window=2)
    restored.load_state_dict(stopping.state_dict())
    assert restored.losses == stopping.losses


@pytest.mark.parametrize(("window", "tolerance"), [(0, 0.1), (5, 0.0), (5, 1.0)])
def test_convergence_errors_name_the_argument(window: int, tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"window=0|tolerance="):
        ConvergenceStopping(window, tolerance)
