from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import Resize

from kd_multiresolution.data import OneClassCIFAR10, OneClassFashionMNIST, OneClassMNIST
from kd_multiresolution.data.torchvision_sets import read_idx
from tests.conftest import shared_path
from tests.data.generated import write_idx


def test_training_images_are_the_class_and_test_images_are_all(idx_root: Path) -> None:
    datamodule = OneClassMNIST(root=idx_root, normal_class=3)
    datamodule.setup()
    train = {int(item.image[0, 0, 0] * 255) for item in datamodule.train_data}
    assert train == {3, 13, 23, 33, 43, 53}
    assert [int(item.image[0, 0, 0] * 255) for item in datamodule.test_data] == list(range(40))
    assert [int(item.gt_label) for item in datamodule.test_data] == [int(i % 10 != 3) for i in range(40)]
    assert datamodule.test_data[13].image_path == "OneClassMNIST/three/test/three/00013.png"
    assert datamodule.test_data[0].image.shape == (3, 28, 28)


def test_copies_of_training_images_are_told(idx_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    OneClassMNIST(root=idx_root, normal_class=3).setup()
    told = "4 of 40 test images are copies of training images: 00003.png = 00003.png, 00013.png = 00013.png"
    assert told in caplog.text


def test_a_folder_with_nothing_but_archives_is_left_as_it_is(idx_root: Path) -> None:
    before = sorted(idx_root.rglob("*"))
    datamodule = OneClassFashionMNIST(root=idx_root, normal_class="Ankle boot")
    datamodule.prepare_data()
    datamodule.setup()
    assert sorted(idx_root.rglob("*")) == before
    assert datamodule.normal_class == 9
    assert datamodule.category == "ankle_boot"


def test_splits_share_the_pixels_and_copies_do_not_leak_augmentations(idx_root: Path) -> None:
    datamodule = OneClassMNIST(root=idx_root, val_split_mode="from_train", val_split_ratio=0.5, seed=1)
    datamodule.train_augmentations = Resize((8, 8))
    datamodule.setup()
    splits = (datamodule.train_data, datamodule.val_data, datamodule.test_data)
    assert len({split.pixels.images.data_ptr() for split in splits}) == 1
    assert len(datamodule.train_data) == len(datamodule.val_data) == 3
    assert datamodule.train_data[0].image.shape == (3, 8, 8)
    assert datamodule.val_data[0].image.shape == (3, 28, 28)
    paths = {item.image_path for split in splits[:2] for item in split}
    assert len(paths) == 6


def test_test_set_stays_whole_by_default(idx_root: Path) -> None:
    datamodule = OneClassMNIST(root=idx_root)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)) == (6, 40, 40)


@pytest.mark.parametrize("mode", ["same_as_test", "from_train", "from_test", "none"])
def test_fit_and_test_run_and_leave_a_few_pictures_per_class(idx_root: Path, run: Callable, mode: str) -> None:
    datamodule = OneClassMNIST(root=idx_root, val_split_mode=mode, val_split_ratio=0.5, pictures_per_class=2)
    engine, auroc = run(datamodule)
    assert 0 <= auroc <= 1
    pictures = list((idx_root / "results").rglob("images/test/*/*.png"))
    tested = datamodule.test_data.samples["class_name"].value_counts()
    assert len(pictures) == tested.clip(upper=2).sum()
    with Image.open(pictures[0]) as image:
        assert image.width > image.height
    predictions = engine.predict(engine.model, datamodule=datamodule)
    assert predictions is not None
    assert all(path.startswith("OneClassMNIST/zero/test/") for batch in predictions for path in batch.image_path)
    assert not any(type(callback).__name__ == "SampledVisualizer" for callback in engine.trainer.callbacks)


@pytest.mark.parametrize("argument", ["val_split_mode", "test_split_mode"])
def test_synthetic_anomalies_need_files(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}='synthetic'.*from memory"):
        OneClassMNIST(**{argument: "synthetic"})


@pytest.mark.parametrize("wrong", ["ten", 10, -1])
def test_unknown_class_lists_those_there_are(wrong: int | str) -> None:
    with pytest.raises(ValueError, match=r"0 zero.*9 nine"):
        OneClassMNIST(normal_class=wrong)


def test_absent_data_say_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = OneClassMNIST(root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw.*https://"):
        datamodule.setup()

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.download", offline)
    with pytest.raises(RuntimeError, match=r"no network.*https://"):
        datamodule.prepare_data()


def test_class_without_training_image_is_named(idx_root: Path) -> None:
    write_idx(idx_root / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz", np.ones(60))
    with pytest.raises(FileNotFoundError, match="no training image of class 'two'"):
        OneClassMNIST(root=idx_root, normal_class=2).setup()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    write_idx(path, np.zeros((4, 28, 28)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(OSError, match=r"images\.gz: damaged archive"):
        read_idx(path, 3)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(OSError, match=r"images\.gz: cut off"):
        read_idx(path, 3)
    path.write_bytes(whole)
    with pytest.raises(OSError, match=r"images\.gz: not an idx file"):
        read_idx(path, 1)


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with 10 images each, red, green and blue planes filled with 1, 2 and 3."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    images = np.repeat(np.array([[1, 2, 3]], np.uint8), 1024, axis=1).repeat(10, axis=0)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": list(range(10))}))
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({CIFAR10.meta["key"]: ["x"] * 10}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return tmp_path


def test_cifar10_is_read_channel_first(cifar_root: Path) -> None:
    datamodule = OneClassCIFAR10(root=cifar_root, normal_class="cat")
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (5, 10)
    expected = torch.tensor([1, 2, 3]).reshape(3, 1, 1).expand(3, 32, 32) / 255
    torch.testing.assert_close(datamodule.train_data[0].image.as_subclass(torch.Tensor), expected)


def test_damaged_cifar10_is_named(cifar_root: Path) -> None:
    (cifar_root / CIFAR10.base_folder / "data_batch_2").write_bytes(b"\x80")
    with pytest.raises(OSError, match=r"cifar-10-batches-py: damaged files.*https://"):
        OneClassCIFAR10(root=cifar_root).setup()


def test_mnist_digit_three_has_the_papers_counts() -> None:
    root = shared_path("data/MNIST/raw").parents[1]
    datamodule = OneClassMNIST(root=root, normal_class=3)
    datamodule.prepare_data()
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (6131, 10000)
    assert int((datamodule.test_data.samples.label_index == 0).sum()) == 1010
    # 6,131 + 10,000 images of 784 bytes: one copy, and nothing of the nine other digits' training images.
    assert datamodule.val_data.pixels.images.untyped_storage().nbytes() == 16131 * 784
