"""What anomalib offers beside its commands, with both models: metrics, post-processors, data and inferencers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.callbacks import TimerCallback
from anomalib.data import Folder, Tabular
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from anomalib.metrics.pg_pb import PBn, PGn
from anomalib.metrics.pimo import AUPIMO
from anomalib.post_processing import MEBinPostProcessor
from PIL import Image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.results.visualizer import FrameVisualizer

pytestmark = pytest.mark.slow

SIZE = (32, 64)  # neither the models' default nor square
FILE = (40, 96)
COUNT = 6
POINTS = ["pool1", "pool2", "pool3"]
MODELS = {
    "paper": (KdMultiresolution, {"anomaly_map": "discrepancy"}),
    "dual": (KdMultiresolutionDual, {}),
}
ENGINE = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def built(name: str, **arguments: Any) -> Any:
    kind, settings = MODELS[name]
    settings = {"image_size": SIZE, "critical_points": POINTS, "epochs": 1, "visualizer": False, **settings}
    return kind("small_vgg", **{**settings, **arguments})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures with noise, some with a bright patch and its mask."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for folder in ("good", "bad", "masks"):
        (root / folder).mkdir()
    for number in range(2 * COUNT):
        pixels = generator.normal(100, 5, (*FILE, 3))
        mask = np.zeros(FILE, np.uint8)
        if number >= COUNT:
            mask[8:24, 4 * number : 4 * number + 20] = 255
            pixels[mask > 0] += 120
            Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        folder = "bad" if number >= COUNT else "good"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / folder / f"{number}.png")
    return root


def folder_data(pictures: Path) -> Folder:
    return Folder(
        "pictures", root=pictures, normal_dir="good", normal_test_dir="good", abnormal_dir="bad", mask_dir="masks",
        num_workers=0, train_batch_size=4, val_split_mode="same_as_test",
    )  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its engine, and its metrics in a test."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    metrics = [
        AUPIMO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", return_average=True, fpr_bounds=(1e-2, 0.3)),
        PGn(fields=["pred_score", "gt_label"]),
        PBn(fields=["pred_score", "gt_label"]),
    ]
    network = built(request.param, evaluator=Evaluator(test_metrics=metrics))
    engine = Engine(**ENGINE, default_root_dir=folder, callbacks=[TimerCallback()])
    engine.fit(network, datamodule=folder_data(pictures))
    (found,) = engine.test(network, datamodule=folder_data(pictures))
    return network, engine, found


def test_aupimo_and_presorted_metrics(trained: Any) -> None:
    _, _, found = trained
    assert found.keys() >= {"pixel_AUPIMO", "PG5", "PB5"}
    assert all(0 <= value <= 1 for value in found.values()), found


def test_the_four_inferencers_give_what_the_engine_gives(
    trained: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, engine, _ = trained
    monkeypatch.chdir(tmp_path)  # for the folder openvino_cache
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    files = [*sorted((pictures / "good").iterdir())[:2], *sorted((pictures / "bad").iterdir())[:2]]
    # lightning_inference.py
    expected = {}
    for folder in ("good", "bad"):
        for batch in engine.predict(network, data_path=pictures / folder):
            expected |= {Path(item.image_path): item for item in batch}
    torch_inferencer = TorchInferencer(network.to_torch(tmp_path), device="cpu")
    # OpenVINO computes in bfloat16 where a processor has it, unless it is told otherwise.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    openvino_inferencer = OpenVINOInferencer(network.to_openvino(tmp_path), device="CPU", config=precision)
    for file in files:
        item = expected[file]
        # gradio_inference.py gives either of them an array.
        pixels = np.asarray(Image.open(file))
        for inferencer in (torch_inferencer, openvino_inferencer):
            for given in (file, pixels):
                found = inferencer.predict(given)
                score, heat_map, mask = (
                    torch.as_tensor(output).squeeze()
                    for output in (found.pred_score, found.anomaly_map, found.pred_mask)
                )
                assert score.item() == pytest.approx(item.pred_score.item(), abs=1e-4)
                torch.testing.assert_close(heat_map, item.anomaly_map.squeeze(), rtol=1e-3, atol=1e-3)
                assert heat_map.shape == SIZE
                assert bool(torch.as_tensor(found.pred_label)) == bool(item.pred_label)
                assert (mask.bool() != item.pred_mask.squeeze()).float().mean() < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_masks_by_mebin_in_pictures_as_large_as_their_files(name: str, pictures: Path, tmp_path: Path) -> None:
    visualizer = FrameVisualizer(as_large_as_file=True, output_dir=tmp_path / "drawn")
    network = built(name, post_processor=MEBinPostProcessor(sample_rate=32, min_interval_len=2), visualizer=visualizer)
    engine = Engine(**ENGINE, default_root_dir=tmp_path)
    engine.fit(network, datamodule=folder_data(pictures))
    batches = engine.predict(network, data_path=pictures / "bad")
    masks = torch.cat([batch.pred_mask for batch in batches])
    assert masks.shape[-2:] == SIZE
    assert 0 < masks.float().mean() < 1
    drawn = [*(tmp_path / "drawn").rglob("*.png")]
    assert len(drawn) == COUNT
    for file in drawn:
        with Image.open(file) as picture:
            assert picture.size == (3 * FILE[1], FILE[0]), "image, map and mask"
    assert engine.test(network, datamodule=folder_data(pictures))


@pytest.mark.parametrize("name", MODELS)
def test_a_table_of_images_without_anything_around_the_training(name: str, pictures: Path, tmp_path: Path) -> None:
    files = [*sorted((pictures / "good").iterdir()), *sorted((pictures / "bad").iterdir())]
    table = pd.DataFrame(
        {
            "image_path": [str(file) for file in files],
            "label_index": [int(file.parent.name == "bad") for file in files],
            "split": ["test" if file.parent.name == "bad" else "train" for file in files],
        }
    )
    table.loc[:1, "split"] = "test"
    data = Tabular("pictures", table, num_workers=0, train_batch_size=4, val_split_mode="same_as_test")
    network = built(name)
    engine = Engine(accelerator="cpu", barebones=True, default_root_dir=tmp_path)
    engine.fit(network, datamodule=data)
    network.eval()
    assert bool(network.post_processor.image_threshold.isfinite())
    (metrics,) = Engine(**ENGINE, default_root_dir=tmp_path).test(network, datamodule=data)
    assert metrics["image_AUROC"] >= 0.5
