"""Every kind of exported file beside torch, and what counts as an equal pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

import export
from export import compared
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.data.texture_defects import TextureDefects, ensure_written
from kd_multiresolution.plugin.export_check import in_torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("moved", "equal"), [(0.9e-3, True), (1.1e-3, False)])
def test_a_pixel_is_equal_within_a_thousandth_of_its_maps_range(moved: float, equal: bool) -> None:
    # A gradient map: its range is far below 1.
    model = KdMultiresolution("small_vgg", image_size=32).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = in_torch(model, images.numpy())
    heat_map = expected["anomaly_map"].copy()
    assert 0 < np.ptp(heat_map) < 0.1
    heat_map[0, 0, 3, 4] += moved * np.ptp(heat_map)
    found = compared({"pred_score": expected["pred_score"] + 0.5, "anomaly_map": heat_map}, expected)
    assert found["score_difference"] == pytest.approx(0.5, abs=1e-6)
    assert min(found["correlations"]) > 0.9999
    assert found["equal_pixels"] == [1.0 if equal else 1 - 1 / heat_map.size]


@pytest.mark.parametrize(("name", "file"), [("paper", "OpenVINO"), ("dual", "ONNX")])
def test_a_file_has_a_row_beside_torch(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bottle").symlink_to(ensure_written(tmp_path / "textures", "brick", 0))
    kind = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}[name]
    model = kind("small_vgg", critical_points=["pool2", "pool3"], image_size=32, epochs=1, visualizer=False)
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(model, datamodule=TextureDefects(root=tmp_path / "textures", num_workers=0))
    monkeypatch.setattr(export, "FILES", {file: export.FILES[file]})  # each takes ten seconds, calibration more
    options = ["--checkpoint", str(engine.best_model_path), "--model", name, "--root", str(tmp_path)]
    export.main([*options, "--output", str(tmp_path / "out")])
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["result"]["rows"]
    assert [*rows] == ["torch", file]
    assert rows["torch"]["score_difference"] == 0
    assert rows[file]["score_difference"] < 1e-3
    assert min(rows[file]["correlations"]) > 0.999
    assert rows[file]["image_AUROC"] == pytest.approx(rows["torch"]["image_AUROC"], abs=0.01)
    assert rows[file]["labels_changed"] <= 1
