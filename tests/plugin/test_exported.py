"""Every exported file is held against its model, and has a note beside it that says how to use it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin import export_check
from kd_multiresolution.plugin.export_check import (
    AS_INFERENCERS,
    BOUND,
    check_pictures,
    compared,
    in_torch,
    is_within_bounds,
    open_vino_core,
)
from kd_multiresolution.plugin.export_note import digest, write_note
from kd_multiresolution.plugin.exported import explained
from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, NormalScores, UnclampedPostProcessor

pytestmark = pytest.mark.slow

SIZE = 32


def paper(**arguments: Any) -> KdMultiresolution:
    """Return a model with thresholds near the scores that it gives."""
    settings = {"source": "small_vgg", "image_size": (SIZE, 2 * SIZE), "anomaly_map": "discrepancy"}
    network = KdMultiresolution(**{**settings, "imagenet_normalization": True, **arguments}).eval()
    images = torch.from_numpy(check_pictures((SIZE, 2 * SIZE)) / 255).float()
    raw = network.model(images)
    if isinstance(network.post_processor, PostProcessor):
        for kind, values in (("image", raw.pred_score), ("pixel", raw.anomaly_map)):
            least, largest = values.min(), values.max()
            for name, number in ((f"{kind}_min", least), (f"{kind}_max", largest), (f"_{kind}_threshold", least)):
                getattr(network.post_processor, name).fill_(number)
    return network


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[KdMultiresolution, Path]:
    network = paper()
    return network, network.to_onnx(tmp_path_factory.mktemp("exported"))


def note(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text())


def test_the_note_of_an_onnx_file(exported: tuple[KdMultiresolution, Path]) -> None:
    network, file = exported
    found = note(file)
    assert found["model"] == "KdMultiresolution"
    assert found["file"]["compression"] is None
    for name in ("model.onnx", "model.onnx.data"):
        assert found["file"]["sha256"][name] == hashlib.sha256((file.parent / name).read_bytes()).hexdigest()
    assert found["input"] == {"layout": "NCHW", "colours": "RGB", "range": [0, 1], "size": None}
    resize, normalize = found["preparation"]["steps"]
    assert resize == {"step": "resize", "size": [32, 64], "interpolation": "bilinear", "antialias": False}
    assert normalize == {"step": "normalize", "mean": [0.4, 0.45, 0.5], "deviation": [0.25, 0.3, 0.35]}
    for part, kind in (("score", "image"), ("map", "pixel")):
        assert found[part]["range"] == [0, 1]
        assert found[part]["threshold"] == 0.5
        assert found[part]["meaning"].startswith("0.5 is the threshold that was fitted to validation images")
        assert found[part]["raw"]["threshold"] == float(getattr(network.post_processor, f"_{kind}_threshold"))
    assert found["precision"]["needs"] == "float32"
    assert found["source"]["name"] == "small_vgg"
    assert found["source"]["sha256_of_tensors"] == digest(network.model.source.state_dict())
    assert {"kd-multiresolution", "anomalib", "torch", "onnxruntime"} <= found["versions"].keys()
    runtime = found["check"]["runtimes"]["ONNX Runtime"]
    assert runtime["deviation"] < 1e-4
    assert runtime["least_correlation"] > 0.9999
    np.testing.assert_allclose(runtime["scores"], found["check"]["scores_in_torch"], atol=1e-5)


def test_a_source_is_told_by_its_tensors() -> None:
    state = {"b": torch.ones(2), "a": torch.zeros(3)}
    again = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert digest(state) == digest(again)
    assert digest(state) != digest({**state, "a": torch.zeros(1, 3)}) != digest({**state, "c": torch.zeros(3)})


def test_a_file_of_another_model_is_refused_and_deleted(
    exported: tuple[KdMultiresolution, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, file = exported
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    copy = tmp_path / file.name
    other = paper(seed=1)
    # What compression costs is the user's choice.
    explained(other, copy, compression="INT8")
    assert "a score at the threshold moves by up to" in caplog.text
    assert "compression_type=INT8 costs it" in caplog.text
    assert note(copy)["check"]["runtimes"]["ONNX Runtime"]["deviation"] > BOUND
    with pytest.raises(RuntimeError, match="The file is not the model, and was deleted"):
        explained(other, copy)
    assert not copy.exists()
    assert not copy.with_name("model.onnx.data").exists()
    assert not copy.with_suffix(".json").exists(), "that of the export before"


def test_what_anomalibs_inferencers_would_get_is_warned_of(
    exported: tuple[KdMultiresolution, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, file = exported

    def rounded(images: np.ndarray) -> export_check.Outputs:
        """As a processor with bfloat16: a share of the raw score."""
        found = in_torch(network, images)
        return {**found, "pred_score": found["pred_score"] - np.float32(0.02)}

    monkeypatch.setattr(export_check, "runtimes", lambda _: {AS_INFERENCERS: rounded})
    explained(network, file)
    assert f"{AS_INFERENCERS}: a score at the threshold moves" in caplog.text
    assert "load it with INFERENCE_PRECISION_HINT=f32" in caplog.text


def test_scores_that_are_not_finite_are_refused_whatever_was_compressed(
    exported: tuple[KdMultiresolution, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, file = exported
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    sick = {
        name: np.full_like(output, np.nan)
        for name, output in in_torch(network, np.zeros((1, 3, 32, 64), np.float32)).items()
        if output.dtype != bool
    }
    monkeypatch.setattr(export_check, "runtimes", lambda _: {"sick": lambda images: sick})
    with pytest.raises(RuntimeError, match="moves by up to inf"):
        explained(network, tmp_path / file.name, compression="INT8")


def test_a_file_that_nothing_runs_is_not_checked_and_says_so(
    exported: tuple[KdMultiresolution, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, file = exported
    monkeypatch.setattr(export_check, "find_spec", lambda _: None)
    explained(network, file)
    assert "was not held against the model: nothing here runs it. pip install onnxruntime" in caplog.text
    assert note(file)["check"] is None


def test_a_deviation_is_what_a_score_at_the_threshold_would_move() -> None:
    network = paper()
    for name, number in (("image_min", 1), ("image_max", 3), ("_image_threshold", 4)):
        getattr(network.post_processor, name).fill_(number)

    def outputs(raw: float) -> list[dict[str, np.ndarray]]:
        normalized = network.post_processor._normalize(
            torch.tensor([raw], dtype=torch.float64), *(torch.tensor(float(n)) for n in (1, 3, 4))
        )
        return [{"pred_score": normalized.numpy()}]

    # 1 % more: of a score at the threshold, 0.04 of raw, in a range of 2.
    for raw in (0.5, 4.0, 400.0):
        found = compared(network, outputs(1.01 * raw), outputs(raw))
        assert found["deviation"] == pytest.approx(0.02, rel=0.03), raw
    moved = outputs(4.04)[0]["pred_score"] - outputs(4.0)[0]["pred_score"]
    assert moved.item() == pytest.approx(0.02, rel=0.05), "as it is normalised"
    assert not is_within_bounds(found)
    assert not is_within_bounds(compared(network, [{"pred_score": np.array([np.nan])}], outputs(4.0)))


@pytest.mark.parametrize("post_processor", [False, PostProcessor()])
def test_a_torch_file_with_another_post_processor_or_none(post_processor: PostProcessor | bool, tmp_path: Path) -> None:
    network = paper(post_processor=post_processor)
    found = note(network.to_torch(tmp_path))
    assert found["check"]["runtimes"]["torch"]["deviation"] == 0
    assert found["score"]["normalized"] == bool(post_processor)
    meaning = "0.5 is the threshold that was fitted to validation images; clamped to [0, 1]"
    assert found["score"]["meaning"] == (meaning if post_processor else "raw: there is no threshold")
    assert found["score"]["threshold"] == (0.5 if post_processor else None)


def test_the_note_says_of_what_rate_the_threshold_is_and_what_is_cropped(tmp_path: Path) -> None:
    cropping = PreProcessor(transform=Compose([Resize((40, 40), antialias=True), CenterCrop((32, 32))]))
    network = KdMultiresolutionDual(
        "small_vgg",
        pre_processor=cropping,
        critical_points=["pool2", "pool3"],
        post_processor=FalseAlarmPostProcessor(0.02),
    ).eval()
    network.post_processor.set_normal_scores(NormalScores(1, 0.1, 20), NormalScores(2, 0.1, 20))
    found = note(network.to_torch(tmp_path))
    assert found["score"]["meaning"].startswith("0.5 is the score that 2 % of normal images exceed")
    assert found["map"]["meaning"].startswith("0.5 is the highest value of a map that 2 % of normal images exceed")
    resize, crop = found["preparation"]["steps"]
    assert (resize["size"], resize["antialias"]) == ([40, 40], False)
    assert crop["size"] == [32, 32]
    assert "crop" in crop["step"].lower()


def test_an_untrained_model_has_no_threshold(tmp_path: Path) -> None:
    network = KdMultiresolution("small_vgg", image_size=SIZE, anomaly_map=None)
    (tmp_path / "model.pt").write_bytes(b"")
    write_note(network, tmp_path / "model.pt", input_size=(4, 5), compression=None, check=None)
    found = note(tmp_path / "model.pt")
    assert found["input"]["size"] == [4, 5]
    assert found["map"] is None
    assert (found["score"]["threshold"], found["score"]["range"]) == (None, [0, None])


def test_the_operations_of_an_openvino_file_ask_for_float32(tmp_path: Path) -> None:
    network = paper()
    assert isinstance(network.post_processor, UnclampedPostProcessor)
    file = network.to_openvino(tmp_path, input_size=(SIZE, 2 * SIZE))
    assert note(file)["input"]["size"] == [SIZE, 2 * SIZE]
    assert not (tmp_path / "weights" / "onnx").exists()
    asking = [
        "DisablePrecisionConversion_0" in operation.get_rt_info()
        for operation in open_vino_core().read_model(file).get_ops()
        if operation.get_type_name() not in {"Constant", "Parameter", "Result"}
    ]
    assert len(asking) > 20
    assert all(asking)
    runtimes = note(file)["check"]["runtimes"]
    assert [*runtimes] == ["OpenVINO, float32", AS_INFERENCERS]
    assert runtimes["OpenVINO, float32"]["deviation"] < 1e-4


SIGNALLED = """
import gc, signal, subprocess, sys
import numpy as np
from kd_multiresolution.plugin.export_check import FLOAT32, open_vino

image = np.zeros((1, 3, 32, 64), np.float32)
first, second = (open_vino(sys.argv[1], FLOAT32) for _ in range(2))
first(image), second(image)
for run in ("first", "second"):  # in this order, as the check of an export gives them up
    del globals()[run]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("the end of a worker was noticed"))
subprocess.run([sys.executable, "-c", ""], check=True)
"""


def test_what_has_run_openvino_survives_the_end_of_a_data_loaders_worker(
    exported: tuple[KdMultiresolution, Path],
) -> None:
    _, file = exported
    ended = subprocess.run([sys.executable, "-c", SIGNALLED, file], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "the end of a worker was noticed\n"), ended.stderr
