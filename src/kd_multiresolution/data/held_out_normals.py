"""Data sets without a split: some random normal images and all anomalous ones are the test set."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from anomalib.data.utils import Split

from kd_multiresolution.data.base import ImageFiles, OneClassDataModule, report_copies, sample_rows

# The paper holds out ten of 98 and of 100 normal images.
_NORMAL_TEST_IMAGES = 10


class HeldOutNormals(OneClassDataModule):
    """Base of the data sets that come without a split; the constructor sets ``root`` and ``split_seed``."""

    refused_split_modes: ClassVar[dict[str, str]] = {"from_dir": "has no validation folder"}

    root: Path
    split_seed: int

    @abstractmethod
    def _find_images(self) -> tuple[list[str], list[str]]:
        """Return the paths of the normal and of the anomalous images, each sorted."""

    def _setup(self, _stage: str | None = None) -> None:
        normal, anomalous = self._find_images()
        if len(normal) <= _NORMAL_TEST_IMAGES:
            msg = (
                f"{self.root}: {len(normal)} normal images; {_NORMAL_TEST_IMAGES} are held out for the test, "
                "so no training image is left. Is the archive half-unpacked?"
            )
            raise FileNotFoundError(msg)
        order = torch.randperm(len(normal), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        test_normal = sorted(normal[i] for i in order[:_NORMAL_TEST_IMAGES])
        train = sorted(normal[i] for i in order[_NORMAL_TEST_IMAGES:])
        test = test_normal + anomalous
        report_copies(train, test)
        test_classes = ["normal"] * len(test_normal) + ["anomalous"] * len(anomalous)
        self.train_data = ImageFiles(sample_rows(train, ["normal"] * len(train), "normal", Split.TRAIN))
        self.test_data = ImageFiles(sample_rows(test, test_classes, "normal", Split.TEST))
