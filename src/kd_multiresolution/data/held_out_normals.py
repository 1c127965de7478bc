"""Data sets without a split: some random normal images and all anomalous ones are the test set."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.data.utils import Split

from kd_multiresolution.data.arguments import check_data_arguments
from kd_multiresolution.data.base import ImageFiles, OneClassDataModule, report_copies, sample_rows

# The paper holds out ten of 98 and of 100 normal images.
_NORMAL_TEST_IMAGES = 10


class HeldOutNormals(OneClassDataModule):
    """Base of the data sets that come without a split.

    Args:
        root: the data set's folder.
        split_seed: draws the ten normal test images; a split depends on it and the file names alone.
        **kwargs: the arguments of :class:`CheckedDataModule`.
    """

    refused_split_modes: ClassVar[dict[str, str]] = {"from_dir": "has no validation folder"}

    def __init__(self, root: Path | str, split_seed: int, **kwargs: Any) -> None:
        check_data_arguments(HeldOutNormals.__init__, locals())
        super().__init__(**kwargs)
        self.root = Path(root)
        self.split_seed = split_seed
        self.category = f"split_{split_seed}"

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
