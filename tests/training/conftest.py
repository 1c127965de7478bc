"""A few pictures of noise."""

from __future__ import annotations

from pathlib import Path

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
