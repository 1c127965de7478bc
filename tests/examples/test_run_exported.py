"""The example that users start from: it reads a picture as it is or refuses it, and gives what torch gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.measure import label, regionprops

import run_exported
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin import export_check
from kd_multiresolution.plugin.post_processor import NormalScores, UnclampedPostProcessor
from run_exported import Exported, boxes, check_pictures
from tests.plugin.pictures import DEEP, READ, SEVERAL

pytestmark = pytest.mark.slow

EXAMPLE = Path(run_exported.__file__)
SIZE = (32, 48)  # of the model
PICTURE = (40, 100)  # of the files
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


def run_alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the example as on a machine that has neither torch nor anomalib nor this package."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("torch", "anomalib", "kd_multiresolution"))
    code = f"import runpy, sys; {blocked}runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[KdMultiresolution, Path]:
    """The paper's model whose pictures lie on either side of the thresholds, as an ONNX file; its labels move with a
    sensitivity."""
    post_processor = UnclampedPostProcessor(image_sensitivity=0.6)
    network = KdMultiresolution(
        "small_vgg",
        image_size=SIZE,
        critical_points=["pool2", "pool3", "pool4"],
        anomaly_map="discrepancy",
        post_processor=post_processor,
    ).eval()
    raw = network.model(torch.from_numpy(check_pictures(SIZE, 3)).float() / 255)
    for kind, values in (("image", raw.pred_score), ("pixel", raw.anomaly_map)):
        for name, number in (("_{}_threshold", values.median()), ("{}_min", values.min()), ("{}_max", values.max())):
            getattr(network.post_processor, name.format(kind)).fill_(number)
    return network, network.to_onnx(tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for number, pixels in enumerate(check_pictures(PICTURE, 3)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    return [*sorted(folder.iterdir())]


def assert_as_in_torch(network: Any, judged: Path, files: list[Path]) -> None:
    results = json.loads((judged / "judged.json").read_text())
    assert [result["file"] for result in results] == [str(file) for file in files]
    for result, file in zip(results, files, strict=True):
        with torch.no_grad():
            expected = network(torch.from_numpy(run_exported.read(file)))
        assert result["score"] == pytest.approx(expected.pred_score.item(), abs=1e-5)
        assert result["anomalous"] == bool(expected.pred_label.item())
        name = f"{file.parent.name}_{file.stem}"
        with Image.open(judged / f"{name}_map.png") as picture:
            assert picture.size == PICTURE[::-1], "as large as the file"
            grey = np.asarray(picture.resize(SIZE[::-1], Image.Resampling.BOX), np.float32) / 255
        ours = expected.anomaly_map[0, 0].clamp(0, 1).numpy()
        assert np.corrcoef(grey.ravel(), ours.ravel())[0, 1] > 0.95
        mask = Image.fromarray(expected.pred_mask[0, 0].numpy().astype(np.uint8) * 255)
        as_large = np.asarray(mask.resize(PICTURE[::-1], Image.Resampling.NEAREST)) > 0
        with Image.open(judged / f"{name}_mask.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture) > 0, as_large)
        assert sorted(map(tuple, result["boxes"])) == skimage_boxes(as_large)
    assert {result["anomalous"] for result in results} == {True, False}


def skimage_boxes(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    found = (part.bbox for part in regionprops(label(mask, connectivity=2)))
    return sorted((left, top, right, bottom) for top, left, bottom, right in found)


def test_pictures_are_judged_as_in_torch(
    paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path
) -> None:
    network, model = paper
    done = run_alone(model, *files, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_as_in_torch(network, tmp_path, files)
    assert done.stdout.startswith(f"{files[0]}: score 0.")
    assert ", anomalous True, boxes [(" in done.stdout


def test_openvino_judges_as_torch(files: list[Path], tmp_path: Path) -> None:
    network = KdMultiresolutionDual("small_vgg", image_size=SIZE, critical_points=["pool2", "pool3"]).eval()
    raw = network.model(torch.from_numpy(check_pictures(SIZE, 3)).float() / 255)
    scores, peaks = raw.pred_score.sort().values, raw.anomaly_map.mean()
    network.post_processor.set_normal_scores(
        NormalScores(float(scores[1]) * 0.9, float(scores[1]) / 30, 30), NormalScores(float(peaks), 1e-3, 30)
    )
    model = network.to_openvino(tmp_path)
    done = run_alone(model, *files, "--output", tmp_path / "judged", "--check")
    assert done.returncode == 0, done.stderr
    assert "a score at the threshold moves by 0.0000" in done.stdout
    results = json.loads((tmp_path / "judged" / "judged.json").read_text())
    with torch.no_grad():
        expected = [network(torch.from_numpy(run_exported.read(file))).pred_score.item() for file in files]
    np.testing.assert_allclose([result["score"] for result in results], expected, atol=1e-5)


def test_one_bad_picture_costs_no_other_its_result(
    paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path
) -> None:
    _, model = paper
    (tmp_path / "no.png").write_text("no picture")
    done = run_alone(model, tmp_path / "no.png", files[0], "--output", tmp_path / "judged")
    assert done.returncode == 2
    assert "no.png: cannot identify image file" in done.stderr
    assert len(json.loads((tmp_path / "judged" / "judged.json").read_text())) == 1


def test_pictures_of_one_name_have_files_of_their_own(
    paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path
) -> None:
    pictures = [tmp_path / line / cam / "1.png" for line, cam in (("a", "cam"), ("b", "cam"), ("c", "CAM"))]
    for picture, file in zip(pictures, files, strict=False):
        picture.parent.mkdir(parents=True)
        picture.write_bytes(file.read_bytes())
    assert run_alone(paper[1], *pictures, "--output", tmp_path / "judged").returncode == 0
    results = json.loads((tmp_path / "judged" / "judged.json").read_text())
    assert [result["map"] for result in results] == ["cam_1_map.png", "cam_1_2_map.png", "CAM_1_3_map.png"]
    written = {file.name for file in (tmp_path / "judged").iterdir()} - {"judged.json"}
    assert written == {result[kind] for result in results for kind in ("map", "mask")}


def test_damaged_pictures_cost_the_others_nothing(
    paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    data = bytearray(broken.read_bytes())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = bytes(4)
    broken.write_bytes(data)
    done = run_alone(paper[1], broken, files[0], "--output", tmp_path / "judged")
    assert done.returncode == 2
    assert "broken.png: broken PNG file" in done.stderr
    assert len(json.loads((tmp_path / "judged" / "judged.json").read_text())) == 1


def test_a_picture_of_another_size_than_the_regions_mask_is_refused(
    paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path
) -> None:
    exported = run_exported.Exported(paper[1])
    assert exported.note["region"] is None
    exported.note["region"] = {"file_size": [1, 2]}
    with pytest.raises(ValueError, match=r"pixels, but the mask of what is judged was drawn on 1 x 2"):
        run_exported.judged(exported, files[0], tmp_path)


def test_a_threshold_of_ones_own(paper: tuple[KdMultiresolution, Path], files: list[Path], tmp_path: Path) -> None:
    _, model = paper
    for threshold, expected in ((0.0, True), (1.0, False)):
        run_alone(model, files[0], "--output", tmp_path, "--threshold", threshold)
        (result,) = json.loads((tmp_path / "judged.json").read_text())
        assert result["anomalous"] is expected


def test_a_machine_that_gives_other_scores_is_told(
    paper: tuple[KdMultiresolution, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = paper
    exported = Exported(model)
    assert run_exported.deviation(exported) < 1e-4
    run = exported.run
    # 1 % of the raw score.
    fitted = exported.note["score"]["raw"]
    scale = (fitted["largest"] - fitted["least"]) / 2

    def coarser(images: run_exported.Array) -> dict[str, run_exported.Array]:
        outputs = run(images)
        x = 2 * outputs["pred_score"].astype(np.float64) - 1
        x = (1.01 * (fitted["threshold"] + scale * x / (1 - abs(x))) - fitted["threshold"]) / scale
        return {**outputs, "pred_score": 0.5 + x / (1 + abs(x)) / 2}

    exported.run = coarser
    expected = 0.01 * max(fitted["threshold"], 2 * scale) / (2 * scale)
    assert run_exported.deviation(exported) == pytest.approx(expected, rel=0.05)


def test_a_compressed_file_is_held_against_what_it_gave_itself(paper: tuple[KdMultiresolution, Path]) -> None:
    exported = Exported(paper[1])
    kept = exported.note["check"]
    kept["scores_in_torch"] = [0.9 * score for score in kept["scores_in_torch"]]
    assert run_exported.deviation(exported) > kept["bounds"]["deviation"]
    exported.note["file"]["compression"] = "int8"
    assert run_exported.deviation(exported) < 1e-4


def test_files_of_different_exports_are_refused(paper: tuple[KdMultiresolution, Path], tmp_path: Path) -> None:
    _, model = paper
    for part in model.parent.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    note = tmp_path / "model.json"
    content = json.loads(note.read_text())
    with (tmp_path / "model.onnx.data").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match=r"model\.onnx\.data is not the file that .*model\.json was written with"):
        Exported(tmp_path / "model.onnx")
    note.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="format 2, but this program reads format 1"):
        Exported(tmp_path / "model.onnx")
    note.unlink()
    done = run_alone(tmp_path / "model.onnx", "--check")
    assert done.returncode == 2
    assert "model.json: no such file. The export writes it beside the model" in done.stderr


def test_a_map_of_a_cropped_picture_lies_where_it_was_cropped(paper: tuple[KdMultiresolution, Path]) -> None:
    exported = Exported(paper[1])
    assert exported.region() == run_exported.WHOLE
    resize, crop = {"step": "resize", "size": [40, 80]}, {"step": "centre crop", "size": [20, 40]}
    exported.note["preparation"]["steps"] = [resize, crop]
    assert exported.region() == (0.25, 0.25, 0.75, 0.75)
    drawn = run_exported.spread(np.full((2, 2), 255, np.uint8), (8, 16), (0.25, 0.25, 0.75, 0.75), smooth=False)
    assert drawn.getbbox() == (4, 2, 12, 6)
    for unknown in ({"step": "resize", "size": [40]}, {"step": "GaussianBlur"}):
        exported.note["preparation"]["steps"] = [unknown]
        assert exported.region() is None


@pytest.mark.parametrize("seed", range(5))
def test_boxes_are_those_of_scikit_image(seed: int) -> None:
    mask = np.random.default_rng(seed).random((30, 40)) < 0.15
    assert sorted(boxes(mask)) == skimage_boxes(mask)
    assert boxes(np.zeros((3, 3), bool)) == []


def test_example_and_export_make_the_same_pictures() -> None:
    np.testing.assert_array_equal(check_pictures((40, 56), 4), export_check.check_pictures((40, 56)))
