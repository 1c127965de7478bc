"""A few pictures to train on."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import Folder
from torchvision.utils import save_image


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("noise")
    for folder, count in (("good", 6), ("defect", 2)):
        (root / folder).mkdir()
        for i in range(count):
            picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))
            save_image(picture, root / folder / f"{i}.png")
    return Folder(
        "noise", root=root, normal_dir="good", abnormal_dir="defect", normal_test_dir="good", train_batch_size=3,
        num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
