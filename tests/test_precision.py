"""Trainings and scores of either model in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from tests.data.generated import write_noise_folders

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_class", [KdMultiresolution, KdMultiresolutionDual])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "16-mixed", "64-true"])
def test_every_precision_trains_and_scores(precision: str, model_class: type[AnomalibModule], tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 10)
    data = Folder(
        "noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", train_batch_size=3, eval_batch_size=3,
        num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    network = model_class("small_vgg", image_size=32, epochs=2, visualizer=False)
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    engine = Engine(default_root_dir=tmp_path / "out", precision=precision, max_epochs=2, **settings)
    engine.fit(network, datamodule=data)
    assert torch.isfinite(engine.trainer.callback_metrics["train_loss"])
    (metrics,) = engine.test(network, datamodule=data)
    assert {"image_AUROC"} <= metrics.keys()
    for batch in engine.predict(network, datamodule=data):
        assert batch.pred_score.isfinite().all()
        assert batch.anomaly_map.isfinite().all()
