"""The comparison of the dual variant's maps, on the demo's bricks in MVTec AD's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image

import dual_families
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.data.texture_defects import ensure_written
from kd_multiresolution.dual.torch_model import FAMILIES


def test_every_map_has_a_row_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bottle").symlink_to(ensure_written(tmp_path / "textures", "brick", 0))
    model = KdMultiresolution(source="light_vgg", variant="dual", image_size=64, epochs=1, visualizer=False)
    data = MVTecAD(tmp_path, "bottle", train_batch_size=16, eval_batch_size=16, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(model, datamodule=data)
    options = ["--checkpoint", str(engine.best_model_path), "--root", str(tmp_path), "--output", str(tmp_path / "out")]
    dual_families.main([*options, "--defects", "2"])
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE)
    assert rows == [*FAMILIES, "sum of the three", "largest of the three", "by painted defects", "with coarser scales"]
    labels = data.test_data.samples.label_index
    assert re.search(rf"\d+ of {(labels == 0).sum()} good, \d+ of {(labels == 1).sum()} defective", text)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert [row["map"] for row in stored["rows"]] == rows
    assert [name for name, _ in stored["weights"]] == [*FAMILIES, *FAMILIES[1:], *FAMILIES, *FAMILIES]
    with pytest.raises(ValueError, match=r"1 images were held out of the training, of which 'bottle' has 0"):
        dual_families.read_all(model, ["elsewhere.png"], data)
    picture = Image.open(tmp_path / "out.png")
    assert picture.width == 8 * 160
    assert picture.height == 2 * 170 + 40


def test_nothing_to_draw_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dual_families.main(["--checkpoint", "model.ckpt", "--output", str(tmp_path / "out"), "--defects", "0"])
    assert "--defects=0: expected 1 or more" in capsys.readouterr().err
