"""Warnings of images that are no longer what was learnt: rarely by chance, not of what is harmless, in numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.results.changes import FEWEST, picture_change, score_change, share_change

pytestmark = pytest.mark.slow

SIZE = 64
MODELS: dict[str, Any] = {
    "paper": (KdMultiresolution, {"anomaly_map": "discrepancy"}),
    "dual": (KdMultiresolutionDual, {}),
}


def draws(generator: np.random.Generator, count: int, mean: float = 0.5) -> Sequence[float]:
    return generator.normal(mean, 0.05, count).tolist()


def test_chance_hardly_ever_warns() -> None:
    generator = np.random.default_rng(0)
    runs = 2000
    for learnt, found in ((26, 20), (64, 8), (200, 300)):
        warned = 0
        for _ in range(runs // 4):
            before, now = draws(generator, learnt), draws(generator, found)
            threshold = float(np.quantile(before, 0.9))
            said = (
                *(picture_change(name, before, now) for name in ("brightness", "contrast", "sharpness")),
                score_change(before, now, threshold),
                share_change(before, now, threshold),
            )
            warned += any(change is not None for change in said)
        assert warned <= 2


def test_what_is_real_but_harmless_does_not_warn() -> None:
    generator = np.random.default_rng(0)
    before = draws(generator, 1000)
    assert picture_change("brightness", before, draws(generator, 1000, 0.54)) is None, "8 % brighter"
    assert score_change(before, draws(generator, 1000, 0.52), 0.7) is None
    steady = (0.5 + 1e-4 * generator.normal(size=1000)).tolist()
    assert picture_change("brightness", steady, [value + 0.001 for value in steady]) is None, "all brighter, by nothing"
    # Half as many again above the threshold, of few.
    assert share_change([0.0] * 980 + [1.0] * 20, [0.0] * 970 + [1.0] * 30, 0.5) is None


def test_what_has_changed_is_said_in_numbers() -> None:
    before = [0.4 + i / 500 for i in range(101)]  # 0.5 in the middle
    assert picture_change("brightness", before, [value - 0.2 for value in before]) == (
        "brightness 0.3, learnt 0.5 (-40 %)"
    )
    higher = [value + 0.2 for value in before]
    assert score_change(before, higher, 0.65) == "median raw score 0.7, of normal images 0.5, threshold 0.65"
    assert share_change(before, higher, 0.65) == "75 of 101 above the threshold, of normal images 0 of 101"


def test_few_images_say_nothing() -> None:
    before, now = [0.5] * 100, [0.1] * (FEWEST - 1)
    assert picture_change("brightness", before, now) is None
    assert score_change(before, [9.0] * (FEWEST - 1), 0.6) is None
    assert share_change(before, [9.0] * (FEWEST - 1), 0.6) is None
    assert picture_change("brightness", before, [0.1] * FEWEST) is not None


def test_without_a_threshold_scores_are_compared_by_themselves() -> None:
    assert score_change([0.5] * 100, [0.9] * 20, float("nan")) == "median raw score 0.9, of normal images 0.5"
    assert share_change([0.5] * 100, [0.9] * 20, float("nan")) is None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for folder, count in (("train", 80), ("good", 20), ("dark", 20), ("defect", 20)):
        (root / folder).mkdir()
        for i in range(count):
            picture = 0.4 + 0.3 * torch.rand(3, SIZE, SIZE, generator=generator)
            if folder == "dark":
                picture *= 0.7
            if folder == "defect":
                picture[:, :40] = 1.0
            save_image(picture, root / folder / f"{i:02}.png")
    return root


def data(pictures: Path, normal_test: str = "good") -> Folder:
    return Folder(
        "noise", root=pictures, normal_dir="train", normal_test_dir=normal_test, abnormal_dir="defect",
        train_batch_size=8, eval_batch_size=8, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **arguments)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, settings = MODELS[request.param]
    runner = engine(tmp_path_factory.mktemp("trained"), max_epochs=1)
    network = model("efficientnet_lite0", image_size=SIZE, visualizer=False, imagenet_normalization=True, **settings)
    runner.fit(network, datamodule=data(pictures))
    return Path(runner.trainer.checkpoint_callback.best_model_path)


def loaded(path: Path) -> Any:
    name = torch.load(path, weights_only=True)["kd_multiresolution"]["model"]
    return {model.__name__: model for model, _ in MODELS.values()}[name].load_from_checkpoint(path, visualizer=False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "no longer" in record.getMessage()]


def test_dark_images_are_warned_of_once_and_good_ones_are_not(
    checkpoint: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = loaded(checkpoint)
    with caplog.at_level(logging.WARNING):
        engine(tmp_path).predict(network, data_path=pictures / "good")
        engine(tmp_path).test(network, datamodule=data(pictures))
        assert warnings(caplog) == [], "defective ones are known as such"
        engine(tmp_path).predict(network, data_path=pictures / "dark")
        (said,) = warnings(caplog)
        assert said.startswith("20 images are no longer like those")
        assert "brightness 0.385, learnt 0.55 (-30 %)" in said
        assert "sharpness" not in said, "no matter of light"
        engine(tmp_path).test(network, datamodule=data(pictures, "dark"))
        assert len(warnings(caplog)) == 2


def test_scores_that_rise_are_warned_of(
    checkpoint: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = loaded(checkpoint)
    network.post_processor._image_threshold.fill_(max(network.learnt.scores))
    with caplog.at_level(logging.WARNING):
        engine(tmp_path).predict(network, data_path=pictures / "defect")
    (said,) = warnings(caplog)
    assert "20 of 20 above the threshold, of normal images 0 of" in said
    assert "median raw score" in said


def test_a_checkpoint_that_knows_nothing_does_not_warn(
    checkpoint: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    del saved["kd_multiresolution"]["learnt"]
    torch.save(saved, tmp_path / "old.ckpt")
    with caplog.at_level(logging.WARNING):
        engine(tmp_path).predict(loaded(tmp_path / "old.ckpt"), data_path=pictures / "dark")
    assert warnings(caplog) == []
