from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_multiresolution.data import OneClassFolder
from tests.conftest import shared_path
from tests.data.generated import write_image


@pytest.mark.parametrize("normal_class", ["cat", "Cat", 1])
def test_one_class_is_trained_and_all_are_tested(class_folder: Path, normal_class: int | str) -> None:
    datamodule = OneClassFolder(root=class_folder, normal_class=normal_class)
    datamodule.setup()
    assert {Path(item.image_path).parent.name for item in datamodule.train_data} == {"cat"}
    assert (len(datamodule.train_data), len(datamodule.test_data), len(datamodule.val_data)) == (6, 12, 12)
    for item in datamodule.test_data:
        assert int(item.gt_label) == (Path(item.image_path).parent.name != "cat")


@pytest.mark.parametrize("mode", ["same_as_test", "from_train", "from_test", "from_dir", "synthetic", "none"])
def test_fit_and_test_run_with_every_validation_split(class_folder: Path, run: Callable, mode: str) -> None:
    _, auroc = run(OneClassFolder(root=class_folder, num_workers=0, val_split_mode=mode, val_split_ratio=0.5))
    assert 0 <= auroc <= 1


def test_validation_folder_is_the_validation_set(class_folder: Path) -> None:
    datamodule = OneClassFolder(root=class_folder, val_split_mode="from_dir")
    datamodule.setup()
    assert {Path(item.image_path).parents[1].name for item in datamodule.val_data} == {"val"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_of_its_own_size(class_folder: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    path = write_image(class_folder / "train" / "bird" / f"aaa.{suffix}", mode=mode, size=(31, 17))
    datamodule = OneClassFolder(root=class_folder)
    datamodule.setup()
    item = next(item for item in datamodule.train_data if item.image_path == str(path))
    assert item.image.shape == (3, 17, 31)
    assert 0 <= item.image.min() < item.image.max() <= 1


def test_unreadable_and_deep_files_are_named(class_folder: Path) -> None:
    folder = class_folder / "train" / "bird"
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    write_image(folder / "001.tif", mode="I")
    (folder / "001.png").unlink()
    (folder / ".hidden.png").write_bytes(b"of a Mac")
    datamodule = OneClassFolder(root=class_folder)
    datamodule.setup()
    assert len(datamodule.train_data) == 6
    with pytest.raises(OSError, match=r"bird/000\.png: not a readable image"):
        datamodule.train_data[0]
    with pytest.raises(OSError, match=r"bird/001\.tif.*mode I: expected eight bits"):
        datamodule.train_data[1]


def test_one_file_in_training_and_test_is_refused(class_folder: Path) -> None:
    (class_folder / "test" / "dog" / "link.png").symlink_to(class_folder / "train" / "bird" / "000.png")
    with pytest.raises(ValueError, match=r"1 test images are training images.*link\.png"):
        OneClassFolder(root=class_folder, normal_class="bird").setup()
    shutil.rmtree(class_folder / "test" / "dog")
    (class_folder / "test" / "dog").symlink_to(class_folder / "train" / "bird")
    with pytest.raises(ValueError, match="6 test images are training images"):
        OneClassFolder(root=class_folder, normal_class="bird").setup()


def test_copies_of_training_images_are_reported(class_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = class_folder / "test" / "dog"
    same_size = (class_folder / "train" / "bird" / "000.png").read_bytes()
    (folder / "same_size.png").write_bytes(same_size[:-1] + b"!")
    with caplog.at_level(logging.WARNING):
        OneClassFolder(root=class_folder, normal_class="bird").setup()
    assert "copies" not in caplog.text
    shutil.copy(class_folder / "train" / "bird" / "000.png", folder / "copy.png")
    with caplog.at_level(logging.WARNING):
        OneClassFolder(root=class_folder, normal_class="bird").setup()
    assert "1 of 14 test images are copies of training images: copy.png = 000.png." in caplog.text


def test_what_is_missing_is_named(class_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"normal_class='cow'.*0 bird, 1 cat, 2 dog"):
        OneClassFolder(root=class_folder, normal_class="cow").setup()
    with pytest.raises(FileNotFoundError, match=r"nowhere/test: no such folder.*train/<class>"):
        OneClassFolder(root=class_folder / "nowhere").setup()
    shutil.rmtree(class_folder / "train" / "bird")
    with pytest.raises(FileNotFoundError, match=r"train/bird: no training image"):
        OneClassFolder(root=class_folder, normal_class="bird").setup()
    for path in (class_folder / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test: no image in dog"):
        OneClassFolder(root=class_folder, normal_class="cat").setup()


def test_cifar10_as_files() -> None:
    datamodule = OneClassFolder(root=shared_path("data/cifar10_jpg"), normal_class="horse")
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (1000, 5000)
    assert int((datamodule.test_data.samples.label_index == 0).sum()) == 500
