"""Two models, one after the other, in one Engine, whose trainer keeps callbacks and epochs of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.training.convergence import ConvergenceStopping

MODELS = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}


def model(name: str, **arguments: Any) -> Any:
    settings = {"critical_points": ["pool2", "pool3", "pool4"], "image_size": 32, "epochs": 1, "visualizer": False}
    return MODELS[name]("small_vgg", **{**settings, **arguments})


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")


def scores(runner: Engine, network: Any, noise: Folder) -> torch.Tensor:
    return torch.cat([batch.pred_score.flatten() for batch in runner.predict(network, datamodule=noise)])


@pytest.mark.parametrize("first", MODELS)
def test_a_second_model_scores_as_in_an_engine_of_its_own_and_is_not_trained_there(
    first: str, noise: Folder, tmp_path: Path
) -> None:
    (second,) = MODELS.keys() - {first}
    shared, own = engine(tmp_path / "shared"), engine(tmp_path / "own")
    shared.fit(model(first), datamodule=noise)
    with pytest.raises(ValueError, match=r"has trained another model for 1 epochs.* Engine of its own"):
        shared.fit(model(second), datamodule=noise)
    network = model(second)
    own.fit(network, datamodule=noise)
    assert torch.equal(scores(shared, network, noise), scores(own, network, noise))


def test_a_stop_at_convergence_does_not_stay_for_another_model(noise: Folder, tmp_path: Path) -> None:
    shared = engine(tmp_path)
    first = model("paper", epochs=None)
    for _ in range(2):  # it finds its own stop in the second run
        shared.validate(first, datamodule=noise)
    assert any(isinstance(callback, ConvergenceStopping) for callback in shared.trainer.callbacks)
    shared.validate(model("paper", epochs=5), datamodule=noise)
    assert not any(isinstance(callback, ConvergenceStopping) for callback in shared.trainer.callbacks)


def test_a_model_that_is_not_ours_is_told_to_take_another_engine(noise: Folder, tmp_path: Path) -> None:
    shared = engine(tmp_path)
    shared.validate(model("paper"), datamodule=noise)
    with pytest.raises(TypeError, match=r"Padim: this Engine, .* an Engine of its own"):
        shared.fit(Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10), datamodule=noise)
