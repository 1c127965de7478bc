from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import Compose, RandomAffine, Resize

from kd_multiresolution.data import HeadCT
from tests.conftest import shared_path
from tests.data.generated import write_image

# As published: the second column's name has a leading blank.
HEADER = "id, hemorrhage\n"


@pytest.fixture(params=["head_ct", "head_ct/head_ct"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for number in range(24):
        write_image(tmp_path / request.param / f"{number:03d}.png", seed=number, mode="RGBA" if number % 3 else "RGB")
    rows = "".join(f"{number},{int(number < 8)}\n" for number in range(24))
    (tmp_path / "labels.csv").write_text(HEADER + rows)
    return tmp_path


def test_labels_come_from_the_table(root: Path) -> None:
    datamodule = HeadCT(root=root)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (6, 18)
    for item in [*datamodule.train_data, *datamodule.test_data]:
        assert int(item.gt_label) == (int(Path(item.image_path).stem) < 8)
    assert len({item.image_path for item in [*datamodule.train_data, *datamodule.test_data]}) == 24


def test_augmentation_changes_training_images_only(root: Path) -> None:
    plain, augmented = HeadCT(root=root), HeadCT(root=root, augment=True)
    plain.setup()
    augmented.setup()
    torch.manual_seed(0)
    for split in ("test_data", "val_data"):
        for before, after in zip(getattr(plain, split), getattr(augmented, split), strict=True):
            assert torch.equal(before.image, after.image)
    first, second = augmented.train_data[0].image, augmented.train_data[0].image
    assert not torch.equal(first, second)
    affine = augmented.train_augmentations
    assert isinstance(affine, RandomAffine)
    assert (affine.degrees, affine.scale) == ([-20.0, 20.0], (0.9, 1.05))


def test_augmentation_comes_before_the_users(root: Path) -> None:
    datamodule = HeadCT(root=root, augment=True, augmentations=Resize((8, 8)))
    assert isinstance(datamodule.train_augmentations, Compose)
    assert [type(t) for t in datamodule.train_augmentations.transforms] == [RandomAffine, Resize]
    assert isinstance(datamodule.test_augmentations, Resize)


def test_fit_and_test_run(root: Path, run: Callable) -> None:
    _, auroc = run(HeadCT(root=root, num_workers=0, augment=True))
    assert 0 <= auroc <= 1


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"labels\.csv: no such file.*kaggle\.com"):
        HeadCT(root=root / "nowhere").setup()
    for number in (5, 7):
        next(root.rglob(f"{number:03d}.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 24 images.*first is 005\.png.*half-unpacked"):
        HeadCT(root=root).setup()


@pytest.mark.parametrize("text", ["number,label\n1,0\n", HEADER + "1\n", HEADER + "one,0\n", HEADER + "1,2\n"])
def test_a_table_that_is_something_else_is_refused(root: Path, text: str) -> None:
    (root / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.csv: .*hemorrhage"):
        HeadCT(root=root).setup()


def test_published_images_have_the_papers_counts_and_can_all_be_read() -> None:
    datamodule = HeadCT(root=shared_path("data/head_ct"))
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (90, 110)
    assert int(datamodule.test_data.samples.label_index.sum()) == 100
    assert all(item.image.shape[0] == 3 for item in [*datamodule.train_data, *datamodule.test_data])


def test_a_table_that_is_cut_off_or_contradicts_itself_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    HeadCT(root=root).setup()
    assert "16 images without and 8 with a haemorrhage; published are 100 and 100" in caplog.text
    table = root / "labels.csv"
    table.write_text(table.read_text() + "3,0\n")
    with pytest.raises(ValueError, match=r"labels\.csv: id 3 has more than one row"):
        HeadCT(root=root).setup()
