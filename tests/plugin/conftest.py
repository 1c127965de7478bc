"""A few pictures to train on."""

from __future__ import annotations

import pytest
from anomalib.data import Folder

from tests.data.generated import write_squares


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = write_squares(tmp_path_factory.mktemp("noise"), {"good": 6, "defect": 2})
    return Folder(
        "noise", root=root, normal_dir="good", abnormal_dir="defect", normal_test_dir="good", train_batch_size=3,
        num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
