"""RESC and OCT2017 as anomalib's BMAD has them, with our model."""

from __future__ import annotations

from pathlib import Path

import pytest
from anomalib.data import BMAD
from anomalib.engine import Engine

from kd_multiresolution import EvaluationAfterConvergence, KdMultiresolution
from kd_multiresolution.data import BMADWithoutMasks
from tests.data.generated import write_image


def write_bmad(root: Path, category: str, *, masks: bool) -> Path:
    """Four training images, two normal and two anomalous ones for validation and for test."""
    for number in range(4):
        write_image(root / category / "train" / "good" / f"{number}.png", seed=number, size=(40, 40))
    for split in ("valid", "test"):
        for number in range(4):
            folder = root / category / split / ("good" if number < 2 else "Ungood")
            write_image(folder / "img" / f"{number}.png", seed=10 + number, size=(40, 40))
            if masks:
                write_image(folder / "label" / f"{number}.png", seed=20 + number, size=(40, 40), mode="1")
    return root


@pytest.mark.parametrize(
    ("data_module", "category", "masks", "metrics"),
    [
        (BMAD, "Retina_RESC", True, {"image_AUROC", "image_F1", "pixel_AUROC", "pixel_AUROC_anomalous", "AUPRO"}),
        (BMADWithoutMasks, "Retina_OCT2017", False, {"image_AUROC", "image_F1"}),
    ],
)
def test_our_model_trains_and_tests_on_bmad(
    tmp_path: Path, data_module: type[BMAD], category: str, masks: bool, metrics: set[str]
) -> None:
    data = data_module(root=write_bmad(tmp_path / "BMAD", category, masks=masks), category=category, num_workers=0)
    evaluation = EvaluationAfterConvergence()
    network = KdMultiresolution("small_vgg", image_size=32, visualizer=False)
    engine = Engine(
        default_root_dir=tmp_path / "results", logger=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[evaluation], max_epochs=1,
    )  # fmt: skip
    engine.fit(network, datamodule=data)
    assert set(evaluation.values) == metrics
    assert 0 <= engine.test(network, datamodule=data)[0]["image_AUROC"] <= 1
