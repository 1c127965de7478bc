"""The head CT images of Table 6 of arXiv 2011.11108."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from pathlib import Path

from anomalib.data.utils import TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Compose, InterpolationMode, RandomAffine, Transform

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
        train_batch_size: images per training step.
        eval_batch_size: images per validation, test and prediction step.
        num_workers: loader processes; 0 reads in the main process.
        train_augmentations: transform of training images.
        val_augmentations: transform of validation images.
        test_augmentations: transform of test images.
        augmentations: transform for the three stages that name none of their own.
        test_split_mode: ``from_dir`` (the test images), ``synthetic`` or ``none``, as in anomalib.
        val_split_mode: ``same_as_test``, ``from_train``, ``from_test``, ``synthetic`` or ``none``.
        val_split_ratio: part of the images, in (0, 1), that ``from_train``, ``from_test`` and ``synthetic`` take.
        seed: seed of the validation split.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, or the split mode is ``from_dir`` for the validation set; on
            setup, if ``labels.csv`` cannot be understood.
        FileNotFoundError: on setup, if ``labels.csv`` or an image it names is missing.

    Example:
        >>> datamodule = HeadCT(root="datasets/HeadCT", split_seed=3, augment=True)
    """

    def __init__(
        self,
        root: Path | str = "./datasets/HeadCT",
        split_seed: int = 0,
        augment: bool = False,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.1,
        seed: int | None = None,
    ) -> None:
        check_data_arguments(HeadCT.__init__, locals())
        if augment:
            given = train_augmentations or augmentations
            affine = RandomAffine(degrees=20, scale=(0.9, 1.05), interpolation=InterpolationMode.BILINEAR)
            train_augmentations = Compose([affine, given]) if given else affine
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        self.split_seed = split_seed
        self.category = f"split_{split_seed}"

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
