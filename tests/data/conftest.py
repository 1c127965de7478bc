"""Small generated data sets, the shared ones, and a run of anomalib's own on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import Padim

from tests.data.generated import write_idx, write_image


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    """MNIST and Fashion-MNIST of 60 and 40 images: image i has the class i % 10 and is filled with the number i."""
    for name in ("MNIST", "FashionMNIST"):
        for prefix, count in (("train", 60), ("t10k", 40)):
            numbers = np.arange(count)
            raw = tmp_path / name / "raw"
            write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", np.broadcast_to(numbers[:, None, None], (count, 28, 28)))
            write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", numbers % 10)
    return tmp_path


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Train: 6 of each of bird, cat and dog; test and val: 4 of each, under the same file names."""
    for split, count in (("train", 6), ("test", 4), ("val", 4)):
        for seed, name in enumerate(("bird", "cat", "dog")):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number:03d}.png", seed=100 * len(split) + 10 * seed + number)
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Callable[[AnomalibDataModule], tuple[Engine, float]]:
    """Fit with a validation epoch, then test, both with anomalib's own model and default visualizer."""

    def fit_and_test(datamodule: AnomalibDataModule) -> tuple[Engine, float]:
        model = Padim(
            backbone="resnet18",
            layers=["layer1"],
            pre_trained=False,
            n_features=4,
            pre_processor=Padim.configure_pre_processor((32, 32)),
        )
        engine = Engine(
            default_root_dir=tmp_path / "results",
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        engine.fit(model, datamodule=datamodule)
        (metrics,) = engine.test(model, datamodule=datamodule)
        return engine, metrics["image_AUROC"]

    return fit_and_test
