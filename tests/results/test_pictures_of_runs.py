"""Pictures, pages and log lines of whole runs: files in, files out."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, RandomCrop, Resize

from kd_multiresolution import FrameVisualizer, KdMultiresolution, KdMultiresolutionDual, ThresholdVisualizer
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor
from kd_multiresolution.results import report
from kd_multiresolution.results.decision import Decision
from kd_multiresolution.results.judged import JudgedRun
from kd_multiresolution.results.page import Heading
from kd_multiresolution.results.scored import ScoredImages, told_apart_at

pytestmark = pytest.mark.slow

WIDE = (192, 64)
SPOT = (60, 24, 84, 48)  # of the wide files: left, top, right, bottom
LIGHT: dict[str, Any] = {"source": "small_vgg", "critical_points": ["pool2", "pool3", "pool4"]}


def write(path: Path, seed: int, size: tuple[int, int] = WIDE, *, spot: bool = False, mask: Path | None = None) -> None:
    pixels = np.random.default_rng(seed).integers(90, 130, (size[1], size[0], 3), dtype=np.uint8)
    drawn, marks = Image.fromarray(pixels), Image.new("L", size)
    for file, picture, colour in ((path, drawn, (255, 255, 255)), (mask, marks, 255)):
        if file is None:
            continue
        if spot:
            ImageDraw.Draw(picture).rectangle((SPOT[0], SPOT[1], SPOT[2] - 1, SPOT[3] - 1), fill=colour)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Six wide good images, and four with a white spot each and its mask."""
    for number in range(6):
        write(tmp_path / "parts" / "good" / f"{number}.png", number)
    for number in range(4):
        file = f"{number}.png"
        root = tmp_path / "parts"
        write(root / "defect" / file, 10 + number, spot=True, mask=root / "masks" / file)
    return tmp_path / "parts"


def folder(root: Path, **arguments: Any) -> Folder:
    arguments = {
        "normal_dir": "good",
        "abnormal_dir": "defect",
        "mask_dir": "masks",
        "val_split_mode": "same_as_test",
        **arguments,
    }
    return Folder("a name", root=root, num_workers=0, **arguments)


def engine(root: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=root, logger=False, accelerator="cpu", enable_progress_bar=False, **arguments)


def pictures(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.png") if "images" in path.parts)


def panels(path: Path, count: int) -> list[np.ndarray]:
    """Return the pictures of one image, which stand side by side."""
    with Image.open(path) as picture:
        return np.split(np.asarray(picture.convert("RGB")).astype(int), count, axis=1)


def middle(bright: np.ndarray) -> np.ndarray:
    """Return the middle of what is bright, by height and width in [0, 1]."""
    return (np.argwhere(bright).mean(0) + 0.5) / bright.shape


CROP = Compose([Resize((64, 64)), CenterCrop((32, 32)), Normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))])


@pytest.mark.parametrize("model", [KdMultiresolution, KdMultiresolutionDual])
def test_pictures_show_what_the_model_saw_beside_its_mask(tmp_path: Path, parts: Path, model: Any) -> None:
    plain = FrameVisualizer(text_config={"enable": False})
    cropped = model(**LIGHT, pre_processor=PreProcessor(CROP), visualizer=plain)
    engine(tmp_path).test(cropped, datamodule=folder(parts))
    files = [path for path in pictures(tmp_path) if path.parent.name == "defect"]
    assert len(files) == 4
    for file in files:
        image, mask, *_ = panels(file, 4)
        assert image.shape[1] / image.shape[0] == pytest.approx(3, rel=0.05)
        with Image.open(parts / "defect" / file.name) as whole:
            expected = np.asarray(whole.crop((48, 16, 144, 48)).resize(image.shape[1::-1])).astype(int)
        assert np.abs(image - expected).mean() < 1
        assert middle(image.min(-1) > 200) == pytest.approx(middle(mask.min(-1) > 127), abs=0.03)
        assert middle(image.min(-1) > 200)[1] == pytest.approx(0.25, abs=0.03)


def test_heat_maps_lie_where_the_model_saw_what_they_are_about(tmp_path: Path, parts: Path) -> None:
    class Bright(Callback):
        """Stands in for a model that marks what is bright."""

        def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: ImageBatch, *_: Any) -> None:
            batch.anomaly_map = (batch.image.mean(1) > 1.5).float()
            batch.pred_mask = batch.anomaly_map > 0.5

    visualizer = ThresholdVisualizer()
    model = KdMultiresolution(**LIGHT, pre_processor=PreProcessor(CROP), visualizer=visualizer)
    engine(tmp_path).validate(model, datamodule=folder(parts))
    callbacks = model.configure_callbacks()
    callbacks.insert(callbacks.index(visualizer), Bright())
    model.configure_callbacks = lambda: callbacks  # type: ignore[method-assign]
    engine(tmp_path).test(model, datamodule=folder(parts))
    for file in (path for path in pictures(tmp_path) if path.parent.name == "defect"):
        image, _, heat = panels(file, 3)
        changed = np.abs(heat - image).max(-1) > 20
        assert middle(changed) == pytest.approx(middle(image.min(-1) > 200), abs=0.04)


def test_random_crops_are_shown_as_they_were_given(
    tmp_path: Path, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = folder(parts, test_augmentations=RandomCrop((32, 32)))
    model = KdMultiresolution(**LIGHT, image_size=32, visualizer=FrameVisualizer(text_config={"enable": False}))
    engine(tmp_path).test(model, datamodule=data)
    assert "Pictures show images as the model was given them, 32 x 32 pixels" in caplog.text
    files = [path for path in pictures(tmp_path) if path.parent.name == "defect"]
    for file in files:
        image, mask, *_ = panels(file, 4)
        assert image.shape[:2] == (256, 256)
        bright, marked = image.min(-1) > 180, mask.min(-1) > 127
        assert (bright ^ marked).mean() < 0.1


def test_every_image_of_nested_folders_has_its_picture(tmp_path: Path) -> None:
    for line in ("line1", "line2"):
        for number in range(2):
            write(tmp_path / "nested" / line / "cam" / f"{number}.png", number, spot=line == "line2")
    model = KdMultiresolution(**LIGHT, image_size=32)
    engine(tmp_path / "results").predict(model, data_path=tmp_path / "nested")
    found = [path.relative_to(path.parents[2]).as_posix() for path in pictures(tmp_path / "results")]
    assert found == [f"{line}/cam/{number}.png" for line in ("line1", "line2") for number in range(2)]
    first, second = (panels(path, 3)[0] for path in pictures(tmp_path / "results")[1::2])
    assert first[40:60].max() < 200 < second.max()


def test_two_folders_of_defects_have_a_picture_of_each_image(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("a", "b"):
        for number in range(2):
            write(parts / kind / "bad" / f"{number}.png", number, spot=True)
    pages = capture(monkeypatch)
    data = folder(parts, abnormal_dir=["a/bad", "b/bad"], mask_dir=None)
    engine(tmp_path / "results").test(KdMultiresolution(**LIGHT, image_size=32), datamodule=data)
    files = {path.relative_to(path.parents[2]).as_posix() for path in pictures(tmp_path / "results")}
    assert {f"{kind}/bad/{number}.png" for kind in "ab" for number in range(2)} < files
    assert len(files) == len(data.test_data)
    images = pages[0][0].images
    assert len({image.name for image in images}) == len(images)


def test_each_run_has_its_pictures_in_its_own_folder(tmp_path: Path, parts: Path) -> None:
    model = KdMultiresolution(**LIGHT, image_size=32)
    for run in ("first", "second"):
        engine(tmp_path / run).test(model, datamodule=folder(parts))
        assert len(pictures(tmp_path / run)) == 5


@pytest.mark.parametrize("model", [KdMultiresolution, KdMultiresolutionDual])
def test_the_default_is_anomalibs_layout_and_a_users_own_visualizer_stays(model: Any) -> None:
    default = model(**LIGHT).visualizer
    assert isinstance(default, FrameVisualizer)
    anomalibs = ImageVisualizer()
    assert (default.fields, default.overlay_fields) == (anomalibs.fields, anomalibs.overlay_fields)
    assert model(**LIGHT, visualizer=anomalibs).visualizer is anomalibs
    assert model(**LIGHT, visualizer=False).visualizer is None


def test_images_without_a_name_are_numbered(tmp_path: Path) -> None:
    visualizer = FrameVisualizer(output_dir=tmp_path)
    batch = ImageBatch(image=torch.rand(2, 3, 16, 16), anomaly_map=torch.rand(2, 16, 16))
    visualizer.on_test_batch_end(None, None, None, batch, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_00003_000.png", "0_00003_001.png"]
    drawn = visualizer.visualize(batch)
    assert isinstance(drawn, list)
    assert [picture.size for picture in drawn] == [(768, 256)] * 2
    assert visualizer(next(iter(batch))).size == (768, 256)


def test_an_exported_model_knows_nothing_of_the_last_run(tmp_path: Path, parts: Path) -> None:
    model = KdMultiresolution(**LIGHT, image_size=32)
    data = folder(parts, test_augmentations=Compose([Resize((48, 48))]))
    engine(tmp_path).test(model, datamodule=data)
    assert b"parts" not in pickle.dumps(model.visualizer)


def test_a_raw_map_has_its_own_range_and_says_so() -> None:
    batch = ImageBatch(image=torch.zeros(1, 3, 16, 16), anomaly_map=torch.linspace(2, 40, 256).reshape(1, 16, 16))
    noted, plain = (
        np.asarray(FrameVisualizer(overlay_fields=[("image", ["anomaly_map"])], text_config=text).visualize(batch))
        for text in ({}, {"enable": False})
    )
    below = np.s_[200:, 256:]
    assert np.any(noted[below] != plain[below])
    blue, red = plain[5, 300], plain[250, 500]
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def capture(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ScoredImages, JudgedRun, Decision]]:
    """Return a list that takes in what every page is made of."""
    found: list[tuple[ScoredImages, JudgedRun, Decision]] = []
    render = report.render_page

    def note(images: ScoredImages, run: JudgedRun, decision: Decision, heading: Heading) -> str:
        found.append((images, run, decision))
        return render(images, run, decision, heading)

    monkeypatch.setattr(report, "render_page", note)
    return found


class Labels(Callback):
    """Keeps the labels and scores that come out of a test."""

    def __init__(self) -> None:
        self.labels: list[bool] = []
        self.scores: list[float] = []

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: ImageBatch, *_: Any) -> None:
        self.labels += [] if batch.pred_label is None else batch.pred_label.tolist()
        self.scores += batch.pred_score.tolist()


@pytest.mark.parametrize(
    ("post_processor", "unit"),
    [
        (UnclampedPostProcessor(image_sensitivity=0.3), "normalised"),
        (UnclampedPostProcessor(enable_normalization=False), "raw"),
        (PostProcessor(image_sensitivity=0.6), "normalised"),
        (PostProcessor(enable_normalization=False), "raw"),
        (MEBinPostProcessor(sample_rate=32, min_interval_len=1), "normalised"),
        (PostProcessor(enable_thresholding=False), "normalised"),
        (False, "raw"),
    ],
    ids=["insensitive", "raw", "anomalib's", "anomalib's raw", "MEBin", "no threshold", "none"],
)
def test_pages_count_the_labels_that_were_given(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch, post_processor: Any, unit: str
) -> None:
    pages, labels = capture(monkeypatch), Labels()
    model = KdMultiresolution(**LIGHT, image_size=32, post_processor=post_processor)
    engine(tmp_path).validate(model, datamodule=folder(parts))
    model.configure_callbacks = lambda found=model.configure_callbacks: [*found(), labels]  # type: ignore[method-assign]
    engine(tmp_path).test(model, datamodule=folder(parts))
    [(scored, run, decision)] = pages
    images = scored.images
    assert run.scores.unit == unit
    assert [image.label for image in images if image.label is not None] == labels.labels
    assert [image.score for image in images] == pytest.approx(labels.scores)
    assert told_apart_at(images, decision.threshold) == bool(labels.labels and decision.threshold is not None)


def test_a_page_in_a_folder_that_goes_is_not_announced(
    tmp_path: Path, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = KdMultiresolution(**LIGHT, image_size=32)
    with TemporaryDirectory() as root:  # as in anomalib benchmark
        engine(Path(root)).test(model, datamodule=folder(parts))
    assert "Report:" not in caplog.text
    assert "Heat maps:" not in caplog.text
    engine(tmp_path / "kept").test(model, datamodule=folder(parts))
    announced = [record.args for record in caplog.records if record.msg.startswith(("%s: %s", "Heat maps:"))]
    paths = [Path(path) for words in announced for path in words if str(tmp_path) in str(path)]
    assert [path.name for path in paths] == ["scores.csv", "report.html", "images"]
    assert all(path.exists() for path in paths)
