"""What a user gives to anomalib is refused by its name before it is read wrongly; hidden files are left out."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from kd_multiresolution import EvaluationAfterConvergence, KdMultiresolution
from kd_multiresolution.data import OneClassFolder
from tests.data.generated import write_image, write_noise_folders
from tests.plugin.pictures import DEEP, EIGHT, READ, SEVERAL

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def model(**arguments: Any) -> KdMultiresolution:
    settings = {"source": "small_vgg", "image_size": 64, "epochs": 1, "visualizer": False, "evaluator": False}
    return KdMultiresolution(**{**settings, **arguments})


def engine(root: Path, **arguments: Any) -> Engine:
    return Engine(
        default_root_dir=root / "results", logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", **arguments,
    )  # fmt: skip


def folder(root: Path, **arguments: Any) -> Folder:
    write_noise_folders(root, 4, (64, 64))
    write_image(root / "normal_test" / "0.png", 9, "RGB", (64, 64))
    settings = {"normal_test_dir": "normal_test", "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder("parts", root=root, normal_dir="good", abnormal_dir="bad", **{**settings, **arguments})


def predicted(root: Path, **what: Any) -> dict[str, float]:
    batches = engine(root).predict(model(), **what)
    return {Path(item.image_path).name: float(item.pred_score) for batch in batches for item in batch}


@pytest.mark.parametrize("name", ["rgb.png", "grey_alpha.png", "planes.tif", "rgb.ppm", "pages.tif", "film.webp"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_prediction_refuses(name: str, whole_folder: bool, tmp_path: Path) -> None:
    file = tmp_path / "new" / name
    write_image(file.with_name("0.png"), 0, "RGB", (64, 64))
    (DEEP | SEVERAL)[name](file)
    with pytest.raises(ValueError, match=f"^{file}: .*: expected "):
        predicted(tmp_path, data_path=file.parent if whole_folder else file)


def test_a_preview_behind_a_picture_changes_nothing(tmp_path: Path) -> None:
    for name in ("rgb.png", "preview.tif", "phone.jpg"):
        READ[name](tmp_path / name)
    Image.fromarray(EIGHT).save(tmp_path / "plain.jpg")
    scores = predicted(tmp_path, data_path=tmp_path)
    assert scores["preview.tif"] == scores["rgb.png"]
    assert scores["phone.jpg"] == scores["plain.jpg"]


@pytest.mark.parametrize("where", ["good", "bad", "normal_test", "masks"])
@pytest.mark.parametrize("kind", ["rgb.png", "film.png"])
def test_training_refuses_before_it_begins(where: str, kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    data = folder(tmp_path, mask_dir="masks")
    shutil.copytree(tmp_path / "bad", tmp_path / "masks")
    file = tmp_path / where / "0.png"
    (DEEP | SEVERAL)[kind](file)
    monkeypatch.setattr(KdMultiresolution, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=f"^{file}: .*: expected "):
        engine(tmp_path).fit(model(), datamodule=data)


def test_a_deep_grey_mask_is_read_aright(tmp_path: Path) -> None:
    data = folder(tmp_path, mask_dir="masks")
    mask = np.zeros((64, 64), np.uint16)
    mask[:5] = 7  # the number of a defect
    (tmp_path / "masks").mkdir()
    for name in range(4):
        assert cv2.imwrite(str(tmp_path / "masks" / f"{name}.png"), mask)
    runner, network = engine(tmp_path), model()
    runner.fit(network, datamodule=data)
    masks = [item.gt_mask.sum() for batch in runner.predict(network, datamodule=data) for item in batch]
    assert sorted(map(int, masks)) == [0, *[5 * 64] * 4]


def test_what_is_not_read_is_not_refused(tmp_path: Path) -> None:
    data = folder(tmp_path, val_split_mode="from_train", val_split_ratio=0.5)
    runner, network = engine(tmp_path), model()
    DEEP["rgb.png"](tmp_path / "bad" / "0.png")
    runner.fit(network, datamodule=data)
    assert runner.predict(network, data_path=tmp_path / "good")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'bad' / '0.png'}: 16 bits per channel"):
        runner.test(network, datamodule=data)


class Wrapped(Dataset[Any]):
    """A data set that is not anomalib's, of anomalib's items."""

    def __init__(self, path: Path) -> None:
        self.items = PredictDataset(path)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize("kind", [PredictDataset, Wrapped])
def test_a_loader_of_ones_own_is_seen_too(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "0.png"
    write_image(file.with_name("1.png"), 0, "RGB", (64, 64))
    DEEP["rgb.png"](file)
    loader = DataLoader(kind(file.parent), collate_fn=ImageBatch.collate, num_workers=1)
    with pytest.raises(ValueError, match=f"^{file}: 16 bits per channel"):
        predicted(tmp_path, dataloaders=loader)


def test_the_protocol_refuses_before_training(tmp_path: Path) -> None:
    """It reads the test set itself."""
    data = folder(tmp_path, val_split_mode="from_train", val_split_ratio=0.5)
    file = tmp_path / "bad" / "0.png"
    DEEP["rgb.png"](file)
    runner = engine(tmp_path, callbacks=[EvaluationAfterConvergence()])
    with pytest.raises(ValueError, match=f"^{file}: 16 bits per channel"):
        runner.fit(model(), datamodule=data)


def test_synthetic_defects_are_not_made_of_a_deep_image(tmp_path: Path) -> None:
    data = folder(tmp_path, test_split_mode="synthetic", normal_test_dir="good")
    data.setup(TrainerFn.TESTING)
    (source, *_) = {*data.test_data.source_samples.image_path} - {*data.test_data.samples.image_path}
    DEEP["rgb.png"](Path(source))
    with pytest.raises(ValueError, match=f"^{source}: 16 bits per channel"):
        engine(tmp_path).test(model(), datamodule=data)


@pytest.mark.parametrize("kind", ["rgb.png", "film.png"])
def test_our_own_data_modules_refuse(kind: str, tmp_path: Path) -> None:
    for path in ("train/a/0.png", "test/a/1.png", "test/b/2.png"):
        write_image(tmp_path / path, len(path), "RGB", (64, 64))
    file = tmp_path / "test" / "b" / "3.png"
    (DEEP | SEVERAL)[kind](file)
    data = OneClassFolder(tmp_path, "a", num_workers=0)
    data.setup()
    with pytest.raises(OSError, match=rf"^{file}: not a readable image \(.*: expected .*Replace the file"):
        next(iter(data.test_dataloader()))


def write_hidden(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(APPLE_DOUBLE)


@pytest.mark.parametrize("workers", [0, 1])
def test_prediction_leaves_hidden_files_out(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A folder that is hidden itself is the user's choice.
    new = tmp_path / ".cache" / "new"
    write_image(new / "a.png", 0, "RGB", (64, 64))
    write_image(new / "below" / "b.png", 1, "RGB", (64, 64))
    write_hidden(new, "._a.png", "below/._b.png")
    loader = DataLoader(PredictDataset(new), collate_fn=ImageBatch.collate, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        assert predicted(tmp_path, dataloaders=[loader]).keys() == {"a.png", "b.png"}
    assert f"2 hidden files are left out: {new}/._a.png, {new}/below/._b.png" in caplog.messages


def test_a_hidden_file_asked_for_by_name_is_read(tmp_path: Path) -> None:
    write_image(tmp_path / ".a.png", 0, "RGB", (64, 64))
    write_hidden(tmp_path, "._a.png")
    assert predicted(tmp_path, data_path=tmp_path / ".a.png").keys() == {".a.png"}
    with pytest.raises(OSError, match=str(tmp_path / "._a.png")):
        predicted(tmp_path, data_path=tmp_path / "._a.png")


@pytest.mark.parametrize("given", ["data module", "loaders"])
def test_training_and_test_leave_hidden_files_out(given: str, tmp_path: Path) -> None:
    data = folder(tmp_path, mask_dir="masks")
    shutil.copytree(tmp_path / "bad", tmp_path / "masks")
    write_hidden(tmp_path, "good/._0.png", "bad/._3.png", "masks/._3.png", "normal_test/._0.png")
    runner, network = engine(tmp_path), model()
    if given == "data module":
        runner.train(network, datamodule=data)
    else:
        data.setup()
        runner.fit(network, data.train_dataloader(), data.val_dataloader())
        runner.test(network, data.test_dataloader())
    assert len(data.train_data) == 4
    for tested in (data.val_data, data.test_data):
        assert len(tested) == 5
        defective = tested.samples[tested.samples.label_index == 1]
        assert [Path(mask).name for mask in defective.mask_path] == [f"{name}.png" for name in range(4)]


def test_a_data_set_that_is_not_anomalibs_is_left_alone(tmp_path: Path) -> None:
    write_image(tmp_path / ".a.png", 0, "RGB", (64, 64))
    write_image(tmp_path / "b.png", 0, "RGB", (64, 64))
    subset = Subset(PredictDataset(tmp_path), [0, 1])
    loader = DataLoader(subset, collate_fn=ImageBatch.collate)
    assert predicted(tmp_path, dataloaders=loader).keys() == {".a.png", "b.png"}
