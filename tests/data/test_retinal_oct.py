from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_multiresolution.data import RetinalOCT
from tests.data.generated import write_image

CLASSES = ("CNV", "DME", "DRUSEN", "NORMAL")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 5), ("test", 3), ("val", 1)):
        for name in CLASSES:
            for number in range(count):
                write_image(tmp_path / split / name / f"{name}-{len(split)}{ord(split[1])}-{number}.jpeg", seed=number)
    return tmp_path


def test_normal_is_trained_and_the_test_split_is_kept(root: Path) -> None:
    (root / "train" / "NORMAL" / ".DS_Store").write_bytes(b"")
    datamodule = RetinalOCT(root=root)
    datamodule.setup()
    assert {Path(item.image_path).parent.name for item in datamodule.train_data} == {"NORMAL"}
    assert (len(datamodule.train_data), len(datamodule.test_data), len(datamodule.val_data)) == (5, 12, 12)
    assert int(datamodule.test_data.samples.label_index.sum()) == 9


@pytest.mark.parametrize("folder", ["OCT2017", "OCT2017 "])
def test_folder_of_the_archive_is_found(root: Path, tmp_path: Path, folder: str) -> None:
    inside = tmp_path / "unpacked" / folder
    inside.mkdir(parents=True)
    for split in ("train", "test", "val"):
        shutil.move(root / split, inside / split)
    datamodule = RetinalOCT(root=inside.parent, val_split_mode="from_dir")
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.val_data)) == (5, 4)


def test_diseased_training_images_are_never_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    RetinalOCT(root=root).setup()
    assert root / "train" / "NORMAL" in listed
    assert not {root / "train" / name for name in ("CNV", "DME", "DRUSEN")} & set(listed)


@pytest.mark.parametrize("mode", ["same_as_test", "from_dir", "from_train"])
def test_fit_and_test_run(root: Path, run: Callable, mode: str) -> None:
    _, auroc = run(RetinalOCT(root=root, num_workers=0, val_split_mode=mode, val_split_ratio=0.4))
    assert 0 <= auroc <= 1


def test_unexpected_counts_and_shared_names_are_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(next((root / "train" / "NORMAL").iterdir()), root / "test" / "NORMAL")
    with caplog.at_level(logging.WARNING):
        RetinalOCT(root=root).setup()
    assert "holds 5 images; the published versions hold 26,315 or 51,140" in caplog.text
    assert "1 of 13 test images have the file name of a training image" in caplog.text


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/test: no such folder.*mendeley.*kaggle"):
        RetinalOCT(root=root / "nowhere").setup()
    shutil.rmtree(root / "train" / "NORMAL")
    with pytest.raises(FileNotFoundError, match=r"train/NORMAL: no training image.*mendeley"):
        RetinalOCT(root=root).setup()
    shutil.rmtree(root / "test" / "DME")
    with pytest.raises(FileNotFoundError, match="DME missing, half-unpacked"):
        RetinalOCT(root=root).setup()
