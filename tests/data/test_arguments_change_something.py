"""Every argument of a data module changes which images are read, how, or what they are called."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from anomalib.data import AnomalibDataModule, Folder
from torchvision.transforms.v2 import RandomHorizontalFlip

from kd_multiresolution.data import OneClassFolder, TextureDefects
from kd_multiresolution.data.arguments import CheckedDataModule
from tests.data.effects import another, changes_anything
from tests.data.generated import write_noise_folders

# The ratio counts where a set is split.
GIVEN = {"train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "seed": 0}
GIVEN |= {"val_split_mode": "from_test", "val_split_ratio": 0.5}
STAGES = ("augmentations", "train_augmentations", "val_augmentations", "test_augmentations")
OTHERS = {
    **dict.fromkeys(STAGES, RandomHorizontalFlip()),
    "test_split_mode": "none",
    "val_split_mode": "from_train",
    "category": "grass",
    "normal_class": "dog",
}


def arguments_of(module: type[AnomalibDataModule]) -> list[str]:
    own, common = (inspect.signature(made).parameters for made in (module, CheckedDataModule))
    return sorted({*own, *common} - {"root", "kwargs", "unknown"})


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("textures")


@pytest.mark.parametrize("name", arguments_of(TextureDefects))
def test_of_textures(name: str, textures: Path) -> None:
    given = {**GIVEN, "root": textures, "category": "brick"}
    assert changes_anything(TextureDefects, given, name, OTHERS.get(name) or another(given.get(name, 0.5)))


@pytest.mark.parametrize("name", arguments_of(OneClassFolder))
def test_of_a_folder_of_classes(name: str, class_folder: Path) -> None:
    given = {**GIVEN, "root": class_folder, "normal_class": "cat"}
    assert changes_anything(OneClassFolder, given, name, OTHERS.get(name) or another(given.get(name, 0.5)))


def test_one_that_changes_nothing_is_found(tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 8)
    given = {"name": "parts", "root": tmp_path, "normal_dir": "good", "abnormal_dir": "bad"}
    assert not changes_anything(Folder, given, "normal_split_ratio", 0.5)
    assert changes_anything(Folder, given, "test_split_ratio", 0.5)
