"""On a GPU, here a simulated one: models are trained and tested on it as on a CPU, and hardly wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch takes no device that is written in Python",
    ),
]

PROGRAM = Path(__file__).with_name("simulated_gpu.py")
MODELS = ["gradient", "discrepancy", "smooth_grad", "dual", "dual_in_a_file"]
MOST_WAITS = 30  # of an epoch with validation and a checkpoint


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    faults.write_pictures(folder / "good", 24)
    faults.write_pictures(folder / "bad", 6)
    command = [sys.executable, str(PROGRAM), str(folder), *MODELS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.parametrize("model", MODELS)
def test_scores_and_maps_are_those_of_a_cpu(found: dict[str, Any], model: str) -> None:
    on_cpu, on_gpu = found[model]["cpu"], found[model]["gpu"]
    assert len({*on_cpu["scores"]}) > 6
    for name, values in on_cpu.items():
        assert on_gpu[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("model", MODELS)
def test_no_step_waits_and_an_epoch_does_a_few_times(found: dict[str, Any], model: str) -> None:
    _, *later = found[model]["epochs"]  # in the first epoch images are looked at
    assert 0 < max(later) <= MOST_WAITS
    assert found[model]["steps"] == [0] * len(found[model]["steps"]) != []
