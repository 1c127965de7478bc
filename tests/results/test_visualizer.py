from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageItem
from anomalib.engine import Engine
from PIL import Image

from kd_multiresolution import KdMultiresolution, ThresholdVisualizer
from kd_multiresolution.results.visualizer import FrameVisualizer
from tests.data.generated import write_noise_folders

SIZE = (32, 32)


def item(**fields: torch.Tensor) -> ImageItem:
    """A grey picture whose right half is suspicious."""
    scores = torch.cat([torch.full((32, 16), 0.4), torch.full((32, 16), 0.6)], 1)
    return ImageItem(**{"image": torch.full((3, 32, 32), 0.5), "anomaly_map": scores, **fields})


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def test_low_scores_are_omitted() -> None:
    drawn = pixels(ThresholdVisualizer(field_size=SIZE).draw(item()))
    assert drawn.shape == (32, 64, 3)
    picture, heat = drawn[:, :32], drawn[:, 32:]
    assert np.array_equal(heat[:, :15], picture[:, :15])
    assert np.abs(heat[:, 17:] - picture[:, 17:]).max(-1).min() > 20


@pytest.mark.parametrize(("omit_below", "share"), [(0.0, 1.0), (0.5, 0.5), (0.7, 0.0)])
def test_threshold(omit_below: float, share: float) -> None:
    drawn = pixels(ThresholdVisualizer(omit_below, field_size=SIZE).draw(item()))
    changed = (drawn[:, :32] != drawn[:, 32:]).any(-1).mean()
    assert changed == pytest.approx(share, abs=0.05)


def test_true_mask_stands_between_the_two() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:24, 20:30] = True
    drawn = pixels(ThresholdVisualizer(field_size=SIZE).draw(item(gt_mask=mask)))
    assert drawn.shape == (32, 96, 3)
    assert np.array_equal(drawn[:, 32:64, 0] > 127, mask.numpy())


def test_files_of_a_test_run(tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 4)
    data = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    visualizer = ThresholdVisualizer(field_size=SIZE, output_dir=tmp_path / "drawn")
    model = KdMultiresolution("small_vgg", image_size=32, visualizer=visualizer)
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").test(model, datamodule=data)
    files = list((tmp_path / "drawn").rglob("*.png"))
    assert files
    for file in files:
        drawn = Image.open(file)
        width = drawn.width // 2
        with Image.open(tmp_path / file.parent.name / file.name) as picture:
            assert width / drawn.height == pytest.approx(picture.width / picture.height, rel=0.05)
            assert width * drawn.height == pytest.approx(SIZE[0] * SIZE[1], rel=0.05)
            expected = pixels(picture.resize((width, drawn.height)))
        assert np.abs(pixels(drawn)[:, :width] - expected).mean() < 2


def test_what_a_format_cannot_hold_is_a_png(tmp_path: Path) -> None:
    Image.new("RGB", (9000, 8)).save(tmp_path / "wide.webp")
    visualizer = FrameVisualizer(as_large_as_file=True, output_dir=tmp_path / "drawn")
    model = KdMultiresolution("small_vgg", image_size=32, visualizer=visualizer)
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").predict(model, data_path=tmp_path / "wide.webp")
    (file,) = (path for path in (tmp_path / "drawn").rglob("*") if path.is_file())
    assert file.name == "wide.webp.png"
    with Image.open(file) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 16_383


@pytest.mark.parametrize("arguments", [{"anomaly_map": None}, {"post_processor": False}])
def test_model_without_normalised_maps_refuses_it(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"ThresholdVisualizer\(\), .* it draws normalised maps"):
        KdMultiresolution("small_vgg", image_size=32, visualizer=ThresholdVisualizer(), **arguments)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"omit_below=1.5: expected a normalised score"):
        ThresholdVisualizer(1.5)
    with pytest.raises(ValueError, match=r"field_size=\(0, 9\): expected a width and a height"):
        ThresholdVisualizer(field_size=(0, 9))
    for wrong in ({"omit_below": "x"}, {"field_size": (256,)}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*expected"):
            ThresholdVisualizer(**wrong)
    with pytest.raises(ValueError, match="anomaly_map=None"):
        ThresholdVisualizer().draw(ImageItem(image=torch.zeros(3, 8, 8)))
