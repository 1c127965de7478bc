"""Large images in anomalib's tiles, for both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.engine import Engine

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.checkpoint import KEY
from tests.data.generated import write_noise_folders

POINTS = {"critical_points": ["pool1", "pool2", "pool3"]}
MODELS = {
    "paper": (KdMultiresolution, {**POINTS, "anomaly_map": "discrepancy"}),
    "paper, gradient": (KdMultiresolution, POINTS),
    "dual": (KdMultiresolutionDual, POINTS),
}
ENGINE = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}


def built(name: str, size: tuple[int, int] = (32, 64), **arguments: Any) -> KdMultiresolution | KdMultiresolutionDual:
    kind, settings = MODELS[name]
    return kind("small_vgg", image_size=size, visualizer=False, **{**settings, **arguments}).eval()


def tiled(network: Any, **arguments: Any) -> Any:
    network.model.tiler = Tiler(**{"tile_size": 32, "stride": 16, **arguments})
    network.setup("test")
    return network


@pytest.mark.parametrize("name", MODELS)
def test_networks_see_tiles_and_the_rest_the_whole_image(name: str) -> None:
    network = built(name)
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    whole = network.model(images)
    seen: list[torch.Size] = []
    network.model.source.stages.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    outputs = tiled(network).model(images)
    assert seen == [(6, 3, 32, 32)]
    assert outputs.anomaly_map.shape == whole.anomaly_map.shape == (2, 1, 32, 64)
    assert (outputs.pred_score - whole.pred_score).abs().min() > 1e-5, "at their borders tiles see nothing beyond"
    one = network.model(images[:1])
    torch.testing.assert_close(one.pred_score, outputs.pred_score[:1])
    network.model.tiler = None
    network.setup("test")
    torch.testing.assert_close(network.model(images).pred_score, whole.pred_score, rtol=0, atol=0)


def test_one_tile_is_the_image() -> None:
    network = built("paper", (32, 32))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = network.model(images)
    outputs = tiled(network, stride=32).model(images)
    torch.testing.assert_close(outputs.pred_score, whole.pred_score)
    torch.testing.assert_close(outputs.anomaly_map, whole.anomaly_map)


@pytest.mark.parametrize("name", ["paper", "dual"])
def test_a_training_in_tiles_is_tested_in_tiles(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_noise_folders(tmp_path / "data", 6, (80, 48))
    data = Folder("n", root=tmp_path / "data", normal_dir="good", abnormal_dir="bad", num_workers=0, train_batch_size=4)
    engine = Engine(**ENGINE, default_root_dir=tmp_path, callbacks=[TilerConfigurationCallback(True, 32, 16)])
    network = built(name)
    engine.fit(network, datamodule=data)
    (metrics,) = engine.test(network, datamodule=data)
    assert 0 <= metrics["image_AUROC"] <= 1
    file = engine.best_model_path
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint[KEY]["tiler"] == {"tile_size": [32, 32], "stride": [16, 16]}
    (batch, *_) = engine.predict(network, data_path=tmp_path / "data" / "bad")

    # Without a word of tiles, and of other ones.
    loaded = type(network).load_from_checkpoint(file, visualizer=False).eval()
    assert (loaded.model.tiler.tile_size_h, loaded.model.tiler.stride_w) == (32, 16)
    again = Engine(**ENGINE, default_root_dir=tmp_path).predict(loaded, data_path=tmp_path / "data" / "bad")
    torch.testing.assert_close(again[0].pred_score, batch.pred_score)
    assert "thresholds do not fit" not in caplog.text
    other = tiled(built(name), stride=32)
    Engine(**ENGINE, default_root_dir=tmp_path).predict(other, data_path=tmp_path / "data" / "bad", ckpt_path=file)
    assert "thresholds do not fit" in caplog.text
    assert other.model.tiler.stride_h == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 28}, r"^tiler: tile_size=\(28, 28\), stride=\(16, 16\): expected multiples of 8"),
        ({"stride": 24}, r"they do not cover images of \(32, 64\) pixels exactly. For example image_size=\(32, 56\)"),
        (
            {"tile_size": 64},
            r"they do not cover images of \(32, 64\) pixels exactly. For example image_size=\(64, 64\)",
        ),
        ({"remove_border_count": 1}, "Leave out remove_border_count and mode"),
        ({"mode": ImageUpscaleMode.INTERPOLATION}, "Leave out remove_border_count and mode"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled(built("paper"), **arguments)


@pytest.mark.parametrize("arguments", [{"anomaly_map": "guided_backprop"}, {"explicit_backward": True}])
def test_maps_that_know_no_tiles_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this map is computed operator by operator, without tiles"):
        tiled(built("paper, gradient", **arguments))


@pytest.mark.parametrize("name", ["paper", "dual"])
def test_a_model_in_tiles_is_exported_to_torch(name: str, tmp_path: Path) -> None:
    network = tiled(built(name))
    for export in (network.to_onnx, network.to_openvino):
        with pytest.raises(ValueError, match="A model with a tiler is exported to torch alone"):
            export(tmp_path)
    file = network.to_torch(tmp_path)
    note = json.loads(file.with_suffix(".json").read_text())
    assert note["tiles"] == {"tile_size": [32, 32], "stride": [16, 16]}
    assert note["check"]["runtimes"]["torch"]["deviation"] == 0
