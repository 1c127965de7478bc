"""Exported models against the torch model, in ONNX Runtime and OpenVINO, on random, flat and half black pictures."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from PIL import Image
from skimage import data
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.plugin.export_check import FLOAT32, open_vino, open_vino_core
from tests.data.generated import write_noise_folders

pytestmark = pytest.mark.slow

Run = Callable[[npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]]]

EXAMPLE = Path(__file__).parents[1] / "examples" / "run_exported.py"
SIZE = 64
MODELS = {
    "small_vgg both": {"source": "small_vgg"},
    "small_vgg discrepancy": {"source": "small_vgg", "anomaly_map": "discrepancy", "percentile_scale": True},
    "efficientnet_lite0 both": {
        "source": "efficientnet_lite0", "critical_points": ["blocks.1", "blocks.2"], "scale_channels": True,
    },
    "small_vgg cloner": {"source": "small_vgg", "attribution_path": "cloner"},
    "resnet18 guided": {
        "source": "resnet18", "pretrained": False, "critical_points": ["layer1", "layer2"],
        "anomaly_map": "guided_backprop",
    },
}  # fmt: skip


def model(**arguments: object) -> KdMultiresolution:
    network = KdMultiresolution(**{"image_size": SIZE, **arguments}).eval()
    generator = torch.Generator().manual_seed(0)
    if (scale := network.model.channel_scale) is not None:
        scale.measure([torch.rand(factor.numel(), generator=generator) for factor in scale.factors])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # an untrained one does nothing
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return network


def pictures(count: int, size: int = SIZE) -> Tensor:
    """A flat one, a half black one, photographs, noise."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))
    images[0] = 0.5
    images[1:2, :, :, : size // 2] = 0
    for image, photograph in zip(images[2:], (data.astronaut(), data.coffee()), strict=False):
        image[:] = F.interpolate(torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255, (size, size))[0]
    return images


def onnx_runtime(file: Path) -> Run:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"input": images}), strict=True))


def assert_parity(run: Run, network: KdMultiresolution, images: Tensor, *, of_efficientnet: bool = False) -> None:
    with torch.no_grad():
        expected = network(images)
    ours = run(images.numpy())
    # EfficientNet's scores are in the hundreds. The last digit decides on which side of a kink an activation lies, and
    # ReLU6 has two.
    bound, share = ({"rtol": 2e-6, "atol": 0}, 0.95) if of_efficientnet else ({"rtol": 0, "atol": 1e-5}, 0.999)
    np.testing.assert_allclose(ours["pred_score"], expected.pred_score, **bound)
    assert ours["anomaly_map"].shape == expected.anomaly_map.shape
    for mine, reference in zip(ours["anomaly_map"], expected.anomaly_map.numpy(), strict=True):
        assert np.corrcoef(mine.ravel(), reference.ravel())[0, 1] >= 0.9999
        assert (np.abs(mine - reference) <= 1e-3 * np.ptp(reference)).mean() >= share


@pytest.mark.parametrize("name", MODELS)
def test_runtimes_give_the_same_scores_and_maps(name: str, tmp_path: Path) -> None:
    network = model(**MODELS[name])
    file = network.to_onnx(tmp_path)
    of_efficientnet = "efficientnet" in name
    for run in (onnx_runtime(file), open_vino(file, FLOAT32)):
        for count in (1, 2, 5):
            assert_parity(run, network, pictures(count), of_efficientnet=of_efficientnet)
        # Without a fixed input_size the graph itself resizes.
        assert_parity(run, network, pictures(2, 48), of_efficientnet=of_efficientnet)


def test_openvino_file_of_a_fixed_size(tmp_path: Path) -> None:
    network = model(source="small_vgg", anomaly_map="discrepancy")
    fitted = {"_image_threshold": 1, "image_min": 0, "image_max": 2}
    fitted |= {"_pixel_threshold": 1.73, "pixel_min": 1.4, "pixel_max": 2.1}  # about what the map of noise is
    for name, number in fitted.items():
        getattr(network.post_processor, name).fill_(number)
    file = network.to_openvino(tmp_path, input_size=(SIZE, SIZE))
    run = open_vino(file, FLOAT32)
    assert_parity(run, network, pictures(3))
    with pytest.raises(RuntimeError, match="shape"):
        run(pictures(3, 48).numpy())

    # The example runs it without torch. Its heat map is of normalised values, which lie on either side of 0.5.
    picture = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(EXAMPLE), str(file), str(picture), "--output", str(tmp_path / "maps")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = network(torch.from_numpy(noise).permute(2, 0, 1)[None] / 255)
    assert 0 < expected.anomaly_map.min() < 0.5 < expected.anomaly_map.max() < 1
    printed = re.search(r"score ([\d.]+), anomalous", done.stdout)
    assert printed, done.stdout
    assert float(printed[1]) == pytest.approx(expected.pred_score.item(), abs=2e-4)
    with Image.open(tmp_path / "maps" / f"{tmp_path.name}_noise_map.png") as heat_map:
        drawn = np.asarray(heat_map)
    np.testing.assert_allclose(drawn, (expected.anomaly_map[0, 0].clamp(0, 1) * 255).numpy(), rtol=0, atol=1.01)

    other = tmp_path / "other.png"
    Image.new("RGB", (48, 80)).save(other)
    done = subprocess.run(
        [*command[:4], str(file), str(other), *command[-2:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "other.png: 80 x 48 pixels, but the model takes 64 x 64 alone. Resize the image" in done.stderr


def test_example_runs_a_model_without_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = model(source="small_vgg", anomaly_map="discrepancy", post_processor=False)
    picture = tmp_path / "noise.png"
    Image.effect_noise((SIZE, SIZE), 100).save(picture)
    command = [str(EXAMPLE), str(network.to_onnx(tmp_path)), str(picture), "--output", str(tmp_path / "maps")]
    capsys.readouterr()  # the exporter's own
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(picture))}: score [\d.]+\n", printed), printed
    with Image.open(tmp_path / "maps" / f"{tmp_path.name}_noise_map.png") as heat_map:
        assert heat_map.getextrema()[1] == 255, "raw maps are drawn up to their own maximum"


def test_scores_alone_are_exported_without_a_map(tmp_path: Path) -> None:
    network = model(source="small_vgg", anomaly_map=None)
    ours = onnx_runtime(network.to_onnx(tmp_path))(pictures(2).numpy())
    assert "anomaly_map" not in ours
    np.testing.assert_allclose(ours["pred_score"], network(pictures(2)).pred_score, rtol=0, atol=1e-5)


def test_quantised_source_keeps_score_and_map(tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 6, (80, 80))
    folder = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    network = model(source="small_vgg", anomaly_map="discrepancy")
    file = network.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=folder)

    quantised = set()
    for operation in open_vino_core().read_model(file).get_ops():
        if operation.get_type_name() == "Convolution":
            node = operation.input_value(1).get_node()
            while node.get_type_name() != "Constant":
                node = node.input_value(0).get_node()
            quantised.add((str(node.get_element_type()), operation.input_value(0).get_node().get_type_name()))
    assert ("<Type: 'int8_t'>", "FakeQuantize") in quantised
    assert any("float32" in kind for kind, _ in quantised)

    images = pictures(8, 80)[4:]  # noise, of which it was calibrated
    with torch.no_grad():
        expected = network(images)
    ours = open_vino(file, FLOAT32)(images.numpy())
    np.testing.assert_allclose(ours["pred_score"], expected.pred_score, rtol=0.1)
    for mine, reference in zip(ours["anomaly_map"], expected.anomaly_map.numpy(), strict=True):
        assert np.corrcoef(mine.ravel(), reference.ravel())[0, 1] >= 0.9
