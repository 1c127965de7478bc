from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_multiresolution.data import BrainMRI
from tests.conftest import shared_path
from tests.data.generated import write_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(16):
        write_image(tmp_path / "no" / f"{number} no.png", seed=number, mode="RGBA" if number % 2 else "L")
    for number in range(5):
        write_image(tmp_path / "yes" / f"Y{number}.JPG", seed=100 + number, size=(40 + number, 30))
    return tmp_path


def names(datamodule: BrainMRI, split: str) -> set[str]:
    return {Path(item.image_path).name for item in getattr(datamodule, f"{split}_data")}


def test_ten_normal_and_all_anomalous_images_are_tested(root: Path) -> None:
    datamodule = BrainMRI(root=root)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (6, 15)
    assert int(datamodule.test_data.samples.label_index.sum()) == 5
    assert not datamodule.train_data.has_anomalous
    assert not names(datamodule, "train") & names(datamodule, "test")
    assert len(names(datamodule, "train") | names(datamodule, "test")) == 21


def test_split_depends_on_the_seed_alone(root: Path, tmp_path: Path) -> None:
    def train(folder: Path, split_seed: int) -> set[str]:
        datamodule = BrainMRI(root=folder, split_seed=split_seed)
        datamodule.setup()
        return names(datamodule, "train")

    elsewhere = shutil.copytree(root, tmp_path / "elsewhere" / "brain_tumor_dataset").parent
    assert train(root, 1) == train(root, 1) == train(elsewhere, 1)
    assert len({frozenset(train(root, seed)) for seed in range(8)}) > 4


@pytest.mark.parametrize("mode", ["same_as_test", "from_train", "from_test", "synthetic", "none"])
def test_fit_and_test_run_with_every_validation_split(root: Path, run: Callable, mode: str) -> None:
    _, auroc = run(BrainMRI(root=root, num_workers=0, val_split_mode=mode, val_split_ratio=0.5))
    assert 0 <= auroc <= 1


def test_copies_across_the_split_are_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = root / "no" / "0 no.png"
    for number in range(1, 16):
        shutil.copy(original, root / "no" / f"{number} no.png")
    with caplog.at_level(logging.WARNING):
        BrainMRI(root=root).setup()
    assert "10 of 15 test images are copies of training images" in caplog.text
    assert "published are 98 and 155" in caplog.text


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"from_dir.*no validation folder"):
        BrainMRI(val_split_mode="from_dir")
    with pytest.raises(FileNotFoundError, match=r"no image in no and yes.*kaggle\.com"):
        BrainMRI(root=root / "nowhere").setup()
    for number in range(6):
        (root / "no" / f"{number} no.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"10 normal images.*half-unpacked"):
        BrainMRI(root=root).setup()
    shutil.rmtree(root / "yes")
    with pytest.raises(FileNotFoundError, match="no image in yes"):
        BrainMRI(root=root).setup()


def test_published_images_have_the_papers_counts_and_can_all_be_read() -> None:
    datamodule = BrainMRI(root=shared_path("data/brain_mri"))
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (88, 165)
    assert int(datamodule.test_data.samples.label_index.sum()) == 155
    for item in [*datamodule.train_data, *datamodule.test_data]:
        assert item.image.shape[0] == 3
        assert item.image.min() >= 0
        assert item.image.max() <= 1
