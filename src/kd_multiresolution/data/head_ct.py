"""The head CT images of Table 6 of arXiv 2011.11108."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from torchvision.transforms.v2 import Compose, InterpolationMode, RandomAffine

from kd_multiresolution.data.arguments import check_data_arguments
from kd_multiresolution.data.base import list_images
from kd_multiresolution.data.held_out_normals import HeldOutNormals

logger = logging.getLogger(__name__)


class HeadCT(HeldOutNormals):
    """Head CT hemorrhage (F. Kitamura): 100 images without and 100 with a haemorrhage.

    Trains on 90 normal images, tests on the other 10 and all 100. The validation set is by default the test set, so
    that both stay whole; thresholds then come from test labels, as with anomalib's ``MVTecAD``.

    Args:
        root: the folder of ``labels.csv`` and ``head_ct/*.png`` (or ``head_ct/head_ct/*.png``).
        split_seed: draws the ten normal test images; a split depends on it and the file names alone.
        augment: rotate within 20 degrees and scale by 0.9 to 1.05 at random, training images only: the paper's
            "+AUG". Comes before ``train_augmentations``.
        **kwargs: the arguments of :class:`CheckedDataModule`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, or the split mode is ``from_dir`` for the validation set; on
            setup, if ``labels.csv`` cannot be understood.
        FileNotFoundError: on setup, if ``labels.csv`` or an image it names is missing.

    Example:
        >>> datamodule = HeadCT(root="datasets/HeadCT", split_seed=3, augment=True)
    """

    def __init__(
        self, root: Path | str = "./datasets/HeadCT", split_seed: int = 0, augment: bool = False, **kwargs: Any
    ) -> None:
        check_data_arguments(HeadCT.__init__, locals())
        super().__init__(root, split_seed, **kwargs)
        if augment:
            given = self.train_augmentations
            affine = RandomAffine(degrees=20, scale=(0.9, 1.05), interpolation=InterpolationMode.BILINEAR)
            self.train_augmentations = Compose([affine, given]) if given else affine

    def _find_images(self) -> tuple[list[str], list[str]]:
        source = "https://www.kaggle.com/datasets/felipekitamura/head-ct-hemorrhage"
        table = self.root / "labels.csv"
        if not table.is_file():
            msg = f"{table}: no such file. Expected labels.csv and head_ct/*.png of {source}"
            raise FileNotFoundError(msg)
        labels = _read_labels(table)
        folders = (self.root / "head_ct", self.root / "head_ct" / "head_ct")
        paths = [Path(path) for folder in folders for path in list_images(folder)]
        by_number = {int(path.stem): str(path) for path in paths if path.stem.isdecimal()}
        if missing := sorted(labels.keys() - by_number.keys()):
            msg = (
                f"{self.root / 'head_ct'}: {len(missing)} of the {len(labels)} images of labels.csv are missing, the "
                f"first is {missing[0]:03d}.png; is the archive half-unpacked? {source}"
            )
            raise FileNotFoundError(msg)
        normal = [by_number[number] for number, label in sorted(labels.items()) if label == 0]
        anomalous = [by_number[number] for number, label in sorted(labels.items()) if label == 1]
        if not anomalous:
            msg = f"{table}: no image with a haemorrhage. Is the file cut off? {source}"
            raise ValueError(msg)
        counts = (len(normal), len(anomalous))
        if counts != (100, 100):
            logger.warning(
                "%s: %d images without and %d with a haemorrhage; published are 100 and 100.", table, *counts
            )
        return normal, anomalous


def _read_labels(table: Path) -> dict[int, int]:
    """Return the label, 0 or 1, of each image number of HeadCT's ``labels.csv``."""
    try:
        with table.open(newline="") as file:
            rows = [(int(r["id"]), int(r["hemorrhage"])) for r in csv.DictReader(file, skipinitialspace=True)]
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{table}: expected the columns id and hemorrhage with a whole number in each row ({error!r})."
        raise ValueError(msg) from error
    labels = dict(rows)
    if len(labels) < len(rows):
        twice = sorted(number for number, count in Counter(number for number, _ in rows).items() if count > 1)
        msg = f"{table}: id {twice[0]} has more than one row."
        raise ValueError(msg)
    if not set(labels.values()) <= {0, 1}:
        msg = f"{table}: hemorrhage must be 0 or 1, got {sorted(set(labels.values()))}."
        raise ValueError(msg)
    return labels
