"""Which epochs end with a validation."""

from __future__ import annotations

from pathlib import Path

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual


@pytest.mark.parametrize(
    ("model_class", "epochs"), [(KdMultiresolution, [10, 20, 21]), (KdMultiresolutionDual, [20, 21])]
)
def test_most_epochs_go_without_validation(
    data: Folder, tmp_path: Path, model_class: type[AnomalibModule], epochs: list[int]
) -> None:
    validated = []

    class Watch(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            validated.append(trainer.current_epoch + 1)

    network = model_class("light_vgg", image_size=32, epochs=21, visualizer=False)
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Engine(default_root_dir=tmp_path, callbacks=[Watch()], **settings).fit(network, datamodule=data)
    assert validated == epochs
