"""Training and inference are timed, on small pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import speed

pytestmark = pytest.mark.slow

SMALL = ["--source", "small_vgg", "--critical_points", "pool2", "pool3", "--size", "32", "--threads", "1"]


@pytest.mark.parametrize("model", ["paper", "dual"])
def test_training_is_held_against_its_floor(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "in_own_process", lambda function, *arguments: function(*arguments))
    options = ["--model", model, "--images", "8", "--batches", "4", "--epochs", "2", "--turns", "1"]
    speed.main(["training", *SMALL, *options, "--output", str(tmp_path / "out")])
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    assert f"| {model} | 32 | 8 | 4 |" in text
    stored = json.loads((tmp_path / "out.json").read_text())
    (row,) = stored["result"]
    assert stored["environment"]["threads"] == 1
    assert {*row["epoch_ms"]} == {"cached", "uncached"}
    assert min(*row["epoch_ms"].values(), *row["floor_ms"].values()) > 0
    assert min(row["peak_mib"].values()) > 100
    assert 100 < row["operators"] <= 450


def test_inference_is_held_against_the_source(tmp_path: Path) -> None:
    options = [
        "--batches",
        "2",
        "--repetitions",
        "2",
        "--readings",
        "score",
        "dual",
        "--runtimes",
        "torch",
        "onnxruntime",
    ]
    speed.main(["inference", *SMALL, *options, "--output", str(tmp_path / "out")])
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())["result"]
    assert found["failures"] == {}
    assert [row["runtime"] for row in found["rows"]] == ["torch", "onnxruntime"]
    for row in found["rows"]:
        assert {*row["figures"]} == {"source", "score", "dual"}
        assert row["figures"]["source"]["ratio"] == 1
        assert (row["figures"]["dual"]["export_mib"] is None) == (row["runtime"] == "torch")
    assert found["operators"]["source"] < found["operators"]["score"] < found["operators"]["dual"]
    assert f"| per image | {found['operators']['source']} |" in (tmp_path / "out.md").read_text()
    assert "| onnxruntime | dual |" in (tmp_path / "out.md").read_text()
