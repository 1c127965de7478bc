"""The brain MRI images of Table 6 of arXiv 2011.11108."""

from __future__ import annotations

import logging
from pathlib import Path

from anomalib.data.utils import TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

from kd_multiresolution.data.arguments import check_data_arguments
from kd_multiresolution.data.base import list_images
from kd_multiresolution.data.held_out_normals import HeldOutNormals

logger = logging.getLogger(__name__)


class BrainMRI(HeldOutNormals):
    """Brain MRI images for brain tumour detection (N. Chakrabarty): 98 without and 155 with a tumour.

    Trains on 88 normal images, tests on the other 10 and all 155. The validation set is by default the test set, so
    that both stay whole; thresholds then come from test labels, as with anomalib's ``MVTecAD``. The published files
    hold copies of each other: those that a split puts into training and test set are reported, not refused, since
    the paper's random split holds them as well.

    Args:
        root: the folder of ``yes`` and ``no``, or the one above their common folder ``brain_tumor_dataset``.
        split_seed: draws the ten normal test images; a split depends on it and the file names alone.
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
        ValueError: if an argument is out of range, or the split mode is ``from_dir`` for the validation set.
        FileNotFoundError: on setup, if a folder or its images are missing.

    Example:
        >>> datamodule = BrainMRI(root="datasets/BrainMRI", split_seed=3)
    """

    def __init__(
        self,
        root: Path | str = "./datasets/BrainMRI",
        split_seed: int = 0,
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
        check_data_arguments(BrainMRI.__init__, locals())
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
        folders = (self.root, self.root / "brain_tumor_dataset")
        folder = next((f for f in folders if (f / "no").is_dir() or (f / "yes").is_dir()), self.root)
        found = {name: list(list_images(folder / name)) for name in ("no", "yes")}
        if missing := [name for name, paths in found.items() if not paths]:
            msg = (
                f"{folder}: no image in {' and '.join(missing)}. Expected yes/ (155 images with a tumour) and no/ (98 "
                "without) of https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection"
            )
            raise FileNotFoundError(msg)
        counts = (len(found["no"]), len(found["yes"]))
        if counts != (98, 155):
            logger.warning("%s: %d images in no and %d in yes; published are 98 and 155.", folder, *counts)
        return found["no"], found["yes"]
