"""One row, one bad image: the error names the file and the way out, or the image is read as anomalib reads it."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from PIL import Image
from torchvision.transforms.v2 import Lambda

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.data import OneClassFolder
from kd_multiresolution.plugin.finite import NonFiniteError

pytestmark = pytest.mark.slow

SIZE = 64
NAN, INF = float("nan"), float("inf")
Save = Callable[[Path], None]
BOTH = (KdMultiresolution, KdMultiresolutionDual)


def pixels(height: int = SIZE, width: int = SIZE, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, channels), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def cut(path: Path) -> None:
    """Write the first half of a file."""
    whole = io.BytesIO()
    Image.fromarray(pixels()).save(whole, "PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


def rotated(path: Path) -> None:
    """Write an image with a note that it lies on its side, which anomalib does not heed."""
    image = Image.fromarray(pixels(SIZE, 2 * SIZE))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def nan_in_a_float_image(path: Path) -> None:
    array = np.zeros((SIZE, SIZE), np.float32)
    array[3, 3] = NAN
    Image.fromarray(array).save(path)


REFUSED: dict[str, Save] = {
    "cut.png": cut,
    "cut.jpg": cut,
    "empty.png": lambda path: path.write_bytes(b"") and None,
    "text.png": lambda path: path.write_text("no image") and None,
    "16bit.png": lambda path: save(path, np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)),
    "32bit.tif": lambda path: save(path, np.arange(SIZE * SIZE, dtype=np.int32).reshape(SIZE, SIZE)),
    "float.tif": nan_in_a_float_image,
    "bomb.png": lambda path: Image.new("1", (20_000, 20_000)).save(path),
}
READ: dict[str, Save] = {
    "one_pixel.png": lambda path: save(path, pixels(1, 1)),
    "below_the_stride.png": lambda path: save(path, pixels(7, 9)),
    "wide.png": lambda path: save(path, pixels(8, 20_000)),
    "palette.png": lambda path: save(path, pixels(), "P"),
    "alpha.png": lambda path: save(path, pixels(channels=4)),
    "grey_alpha.png": lambda path: save(path, pixels(), "LA"),
    "grey.png": lambda path: save(path, pixels(), "L"),
    "two_levels.png": lambda path: save(path, pixels(), "1"),
    "cmyk.jpg": lambda path: save(path, pixels(), "CMYK"),
    "rotated.jpg": rotated,
    "constant.png": lambda path: save(path, np.zeros((SIZE, SIZE, 3), np.uint8)),
}


def model(model_class: type[AnomalibModule] = KdMultiresolution, **arguments: Any) -> AnomalibModule:
    settings = {"source": "small_vgg", "image_size": SIZE, "epochs": 1, "visualizer": False, "evaluator": False}
    return model_class(**{**settings, **arguments})


def engine(folder: Path, **arguments: Any) -> Engine:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Engine(default_root_dir=folder, **settings, **arguments)


def folder(root: Path, normal: int = 5, **arguments: Any) -> Folder:
    for i in range(normal):
        save(root / "good" / f"{i}.png", pixels(seed=i))
    save(root / "normal_test" / "0.png", pixels(seed=90))
    save(root / "bad" / "0.png", pixels(seed=99))
    settings = {"normal_test_dir": "normal_test", "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder("parts", root=root, normal_dir="good", abnormal_dir="bad", **{**settings, **arguments})


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_aright_is_named(name: str, tmp_path: Path) -> None:
    REFUSED[name](tmp_path / name)
    with pytest.raises((OSError, ValueError, Image.DecompressionBombError), match=f"{tmp_path / name}"):
        engine(tmp_path).predict(model(anomaly_map=None), data_path=tmp_path / name)


# One error of each class has to cross the border of a loader's process.
@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in REFUSED), ("cut.png", 1), ("bomb.png", 1)])
def test_our_own_data_modules_name_it_too(name: str, workers: int, tmp_path: Path) -> None:
    for path in ("train/a/0.png", "test/a/1.png", "test/b/2.png"):
        save(tmp_path / path, pixels(seed=len(path)))
    path = tmp_path / "test" / "b" / name
    REFUSED[name](path)
    data = OneClassFolder(tmp_path, "a", num_workers=workers, eval_batch_size=4)
    data.setup()
    with pytest.raises(OSError, match=rf"{path}: not a readable image \(.*Replace the file, or take it out"):
        next(iter(data.test_dataloader()))


@pytest.mark.parametrize("where", ["good", "bad", "masks"])
def test_a_file_cut_off_is_named_wherever_it_lies(where: str, tmp_path: Path) -> None:
    save(tmp_path / "masks" / "0.png", pixels(channels=3), "L")
    data = folder(tmp_path, mask_dir="masks")
    name = {"good": "4.png", "bad": "0.png", "masks": "0.png"}[where]
    cut(tmp_path / where / name)
    with pytest.raises(OSError, match=f"{tmp_path / where / name}: not a readable image .*Replace the file"):
        engine(tmp_path / "out").fit(model(), datamodule=data)


@pytest.mark.parametrize("model_class", BOTH)
def test_a_deep_training_image_is_refused(model_class: type[AnomalibModule], tmp_path: Path) -> None:
    data = folder(tmp_path)
    REFUSED["16bit.png"](tmp_path / "good" / "3.png")
    with pytest.raises(ValueError, match=f"{tmp_path / 'good' / '3.png'}: mode I;16: expected eight bits per channel"):
        engine(tmp_path / "out").fit(model(model_class), datamodule=data)


def test_errors_about_something_else_are_left_alone(tmp_path: Path) -> None:
    data = folder(tmp_path, train_augmentations=Lambda(_full_disk))
    cut(tmp_path / "bad" / "0.png")
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        engine(tmp_path / "out").fit(model(cache=None), datamodule=data)  # reads training images first


def _full_disk(image: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("model_class", BOTH)
def test_every_other_image_is_read_as_anomalib_reads_it(model_class: type[AnomalibModule], tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    network = model(model_class)
    engine(tmp_path / "out").fit(network, datamodule=data)
    for name, write in READ.items():
        write(tmp_path / name)
        ((item,),) = engine(tmp_path / "out").predict(network, data_path=tmp_path / name)
        with Image.open(tmp_path / name) as image:
            rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
        expected = network.eval()(rgb)
        torch.testing.assert_close(item.pred_score, expected.pred_score[0], rtol=1e-3, atol=1e-4, msg=name)
        assert item.anomaly_map.shape[-2:] == (SIZE, SIZE), name
        assert item.anomaly_map.isfinite().all(), name


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38])
def test_an_image_that_is_not_finite_has_no_score(model_class: type[AnomalibModule], value: float) -> None:
    network = model(model_class).eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    images[1, 0, 5, 5] = value
    why = "pixels are not finite" if value != 1e38 else "pixels are finite, so weights or arithmetic are not"
    with pytest.raises(NonFiniteError, match=f"No finite anomaly score or map. image 1 of the batch: its {why}"):
        network(images)
    assert network(images[[0, 2]]).pred_score.isfinite().all()


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_error_names_the_file(model_class: type[AnomalibModule], verb: str, tmp_path: Path) -> None:
    data = folder(tmp_path, test_augmentations=Lambda(_nan_if_anomalous), val_augmentations=Lambda(_nan_if_anomalous))
    with pytest.raises(NonFiniteError, match=f"{tmp_path / 'bad' / '0.png'}: its pixels are not finite"):
        getattr(engine(tmp_path / "out"), verb)(model(model_class), datamodule=data)


def _nan_if_anomalous(image: torch.Tensor) -> torch.Tensor:
    return image * NAN if _is(image, seed=99) else image


def _nan_if(seed: int, image: torch.Tensor) -> torch.Tensor:
    return image * NAN if _is(image, seed) else image


def _is(image: torch.Tensor, seed: int) -> bool:
    return torch.allclose(image, torch.from_numpy(pixels(seed=seed)).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("sick", range(5))
def test_a_training_image_that_is_not_finite_is_named(
    model_class: type[AnomalibModule], batch_size: int, sick: int, tmp_path: Path
) -> None:
    """Whether the dual model holds it out or not."""
    data = folder(tmp_path, train_augmentations=Lambda(partial(_nan_if, sick)), train_batch_size=batch_size)
    with pytest.raises(ValueError, match=f"{tmp_path / 'good' / f'{sick}.png'}: its pixels are not finite"):
        engine(tmp_path / "out").fit(model(model_class), datamodule=data)


def test_a_training_that_diverges_stops(tmp_path: Path) -> None:
    # The weights of batch norm are bounded by nothing: they overflow. The dual model's decay, which bounds all of its
    # weights, refuses such a rate.
    data = folder(tmp_path, train_batch_size=1)
    with pytest.raises(
        ValueError, match=r"training loss is (nan|inf) after epoch \d+. learning_rate=1e\+30 may be too"
    ):
        engine(tmp_path / "out").fit(model(learning_rate=1e30, epochs=9), datamodule=data)


@pytest.mark.parametrize("model_class", BOTH)
def test_one_training_image(model_class: type[AnomalibModule], tmp_path: Path) -> None:
    data, runner, network = folder(tmp_path, normal=1), engine(tmp_path / "out"), model(model_class)
    if model_class is KdMultiresolutionDual:
        with pytest.raises(ValueError, match=r"1 training images: KdMultiresolutionDual.*Give it 4 or more"):
            runner.fit(network, datamodule=data)
        return
    runner.fit(network, datamodule=data)
    scores = [item.pred_score for batch in runner.predict(network, data_path=tmp_path / "bad") for item in batch]
    assert len(scores) == 1
    assert scores[0].isfinite()


def test_no_training_image(tmp_path: Path) -> None:
    data = folder(tmp_path, normal=0)
    (tmp_path / "good").mkdir()
    with pytest.raises(RuntimeError, match=f"Found 0 .*{tmp_path / 'good'}"):
        engine(tmp_path / "out").fit(model(), datamodule=data)
