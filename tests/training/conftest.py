"""A few pictures of noise, and which of them are read."""

from __future__ import annotations

from pathlib import Path

import anomalib.data.datasets.base.image as anomalib_images
import pytest
import torch
from anomalib.data import Folder
from torchvision.utils import save_image

NUM_IMAGES = 6


@pytest.fixture
def data(tmp_path: Path) -> Folder:
    (tmp_path / "good").mkdir()
    (tmp_path / "defect").mkdir()
    for i in range(NUM_IMAGES):
        save_image(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)), tmp_path / "good" / f"{i}.png")
    save_image(torch.ones(3, 40, 40), tmp_path / "defect" / "0.png")
    return Folder(
        "noise", root=tmp_path, normal_dir="good", abnormal_dir="defect", normal_test_dir="defect",
        train_batch_size=4, eval_batch_size=4, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the path of every image that is read."""
    paths: list[str] = []
    read = anomalib_images.read_image

    def counted(path: str, as_tensor: bool = False) -> object:
        paths.append(str(path))
        return read(path, as_tensor=as_tensor)

    monkeypatch.setattr(anomalib_images, "read_image", counted)
    return paths
