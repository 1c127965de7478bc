from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from benchmarks.write_configs import render

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.paper.presets import LEARNING_RATE, PRESETS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", PRESETS)
def test_configs_are_written_from_the_presets(name: str) -> None:
    assert (CONFIGS / f"{name}.yaml").read_text() == render(name, PRESETS[name])


def test_defaults_of_the_model_are_the_preset_of_mvtec() -> None:
    parameters = inspect.signature(KdMultiresolution).parameters
    assert parameters["value_weight"].default == PRESETS["mvtec"].value_weight
    assert KdMultiresolution("small_vgg").learning_rate == LEARNING_RATE
    network = KdMultiresolution("small_vgg")
    assert network.input_size == PRESETS["mvtec"].image_size
