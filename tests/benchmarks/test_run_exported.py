"""The example that runs an exported model reads a picture as it is, or refuses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugin.pictures import DEEP, READ, SEVERAL

import run_exported
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor

# The example is short: of two pages it does not ask whether one is a preview.
TAKEN = [name for name in READ if Path(name).suffix in {".png", ".jpg", ".bmp", ".tif", ".webp"}]
TAKEN.remove("preview.tif")


@pytest.mark.parametrize("name", [*DEEP, *SEVERAL])
def test_what_would_be_read_wrongly_is_refused(name: str, tmp_path: Path) -> None:
    (DEEP | SEVERAL)[name](tmp_path / name)
    with pytest.raises(ValueError, match=r"^expected one picture of eight bits per channel"):
        run_exported.read(tmp_path / name)


@pytest.mark.parametrize("name", TAKEN)
def test_a_picture_is_read(name: str, tmp_path: Path) -> None:
    READ[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"), np.float32) / 255
    np.testing.assert_array_equal(run_exported.read(tmp_path / name)[0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("sensitivity", [0.5, 0.1, 0.9])
def test_the_label_is_the_models_own(sensitivity: float, tmp_path: Path) -> None:
    post_processor = UnclampedPostProcessor(image_sensitivity=sensitivity)
    network = KdMultiresolution("small_vgg", image_size=32, anomaly_map="discrepancy", post_processor=post_processor)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    raw = float(network.eval().model(image).pred_score)
    # The normalised score lies at 0.7.
    for name, number in (("image_min", 0.5), ("image_max", 1.5), ("_image_threshold", 0.8)):
        getattr(network.post_processor, name).fill_(raw * number)
    model, _ = run_exported.load(network.to_onnx(tmp_path))
    outputs = model(image.numpy())
    assert run_exported.is_anomalous(outputs, None) == (float(outputs["pred_score"].item()) > 1 - sensitivity)


def test_a_file_without_labels_has_one_by_a_threshold_that_is_given() -> None:
    outputs = {"pred_score": np.array([0.3], np.float32), "anomaly_map": np.full((1, 1, 2, 2), 4, np.float32)}
    found = [run_exported.is_anomalous(outputs, threshold) for threshold in (None, 0.2, 0.4)]
    assert found == [None, True, False]
    assert [int(run_exported.grey(outputs, white)[0, 0]) for white in (None, 4, 8)] == [255, 255, 127]
    masked = {**outputs, "pred_mask": np.ones((1, 1, 2, 2), bool), "anomaly_map": outputs["anomaly_map"] / 8}
    assert int(run_exported.grey(masked, None)[0, 0]) == 127, "a normalised map ends at 1"
